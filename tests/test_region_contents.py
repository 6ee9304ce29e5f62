"""What regions of a layout hold beside their place: keys, errors, checksums, and the background's address."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from multisubject.layout import Region, as_layout, layout_checksum, parse_layout, region_names
from multisubject.region_contents import describe_contents, digest_contents

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def parse(*entries: dict[str, Any]) -> tuple[Region, ...]:
    return parse_layout(list(entries), height=16, width=16)


def one(**entry: Any) -> Region:
    return parse({"box": LEFT, **entry})[0]


def test_a_region_says_what_it_holds():
    picture = Image.new("L", (4, 4))
    region = one(
        subject="dog",
        prompt=" a red dog ",
        negative_prompt="hat",
        lora="anna",
        ip_adapter_image=picture,
        begin=0.1,
        end=0.8,
        strength=2,
    )
    assert (region.subject, region.is_named) == ("dog", True)
    assert (region.prompt, region.negative_prompt) == ("a red dog", "hat")
    assert region.lora == {"anna": 1.0} and region.ip_adapter_image is picture
    assert (region.begin, region.end, region.strength) == (0.1, 0.8, 2.0)


def test_without_the_keys_a_region_and_its_checksum_are_as_before():
    plain, said = one(subject="dog"), one(subject="dog", prompt=None, lora=None, begin=0, end=1, strength=1)
    assert plain == plain and describe_contents(plain) == describe_contents(said) == []
    assert layout_checksum([plain]) == layout_checksum([said])
    # What pictures made before these keys were known have in their settings.
    assert layout_checksum([plain]) == "0b999b535385cb47c495394134b566a4835394272ec9804e4273a8c974c8466e"


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ({"prompt": "a red ball"}, "a red ball"),
        ({"lora": {"anna": 0.5, "film": 1}}, "anna + film"),
        ({"ip_adapter_image": np.zeros((4, 4, 3), np.uint8)}, "reference picture"),
        ({"negative_prompt": "hats"}, "no hats"),
    ],
)
def test_a_region_that_holds_something_needs_no_words_of_the_prompt(entry, name):
    region = one(**entry)
    assert (region.subject, region.is_named) == (name, False)


def test_regions_of_equal_own_words_stay_apart_and_are_numbered():
    regions = parse({"prompt": "a ball", "box": LEFT}, {"prompt": "a ball", "box": RIGHT, "lora": "film"})
    assert region_names(regions) == ["a ball 1", "a ball 2"]


def test_the_background_is_what_no_other_region_covers():
    dog, background = parse({"subject": "dog", "box": LEFT}, {"subject": "background", "prompt": "a beach"})
    assert background.is_background and not background.is_named
    np.testing.assert_array_equal(background.mask, 1 - dog.mask)
    inside, behind = parse(
        {"subject": "dog", "box": LEFT, "priority": -9}, {"subject": "Background", "lora": "film", "weight": 1}
    )
    assert inside.mask.max() == 1 and behind.mask[:, :8].max() == 0 and behind.weight == 1


def test_with_a_box_background_is_a_word_like_any_other():
    region = one(subject="background")
    assert region.is_named and not region.is_background


def test_strength_0_is_no_region():
    off = {"subject": "cat", "box": LEFT, "strength": 0, "priority": 1}
    (dog,) = parse({"subject": "dog", "box": LEFT}, off)
    assert dog.subject == "dog" and dog.mask[:, :8].min() == 1, "what is switched off takes no place from others"
    assert parse(off) == ()


def test_regions_become_the_layout_that_they_came_of():
    regions = parse(
        {"subject": "dog", "box": LEFT, "weight": 3, "negative_prompt": "hat", "begin": 0.5},
        {"prompt": "a ball", "box": (0.5, 0, 1, 0.5), "strength": 0.5, "ip_adapter_image": torch.ones(1, 4)},
        {"subject": "background", "prompt": "a beach", "lora": {"film": 0.7}},
    )
    again = parse_layout(as_layout(regions), height=16, width=16)
    assert layout_checksum(again) == layout_checksum(regions)
    assert [(region.is_named, region.is_background) for region in again] == [(1, 0), (0, 0), (0, 1)]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("prompt", ("a ball", "a box")),
        ("negative_prompt", ("hat", "hats")),
        ("lora", ({"anna": 1}, {"anna": 0.5}, ["anna", "film"])),
        ("ip_adapter_image", (np.zeros((4, 4)), np.ones((4, 4)), {"face": np.ones((4, 4))}, [np.ones((4, 4))])),
        ("begin", (0.1, 0.2)),
        ("end", (0.8, 0.9)),
        ("strength", (0.5, 2)),
    ],
)
def test_every_key_is_in_the_checksum(key, values):
    checksums = [layout_checksum([one(subject="dog", **given)]) for given in ({}, *({key: value} for value in values))]
    assert len(set(checksums)) == len(checksums)


def test_parts_of_one_subject_hold_the_same():
    parts = [{"subject": "dog", "box": LEFT, "lora": "anna"}, {"subject": "dog", "box": RIGHT, "lora": {"anna": 1.0}}]
    (dog,) = parse(*parts)
    assert dog.lora == {"anna": 1.0} and dog.mask.min() == 1
    with pytest.raises(ValueError, match="'dog' has regions with different `lora`"):
        parse(parts[0], {"subject": "dog", "box": RIGHT})


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"prompt": 3}, TypeError, "prompt is 3, expected text"),
        ({"negative_prompt": " "}, ValueError, "negative_prompt is ' ', expected words"),
        ({"lora": 3}, TypeError, "lora is 3, expected the name of a loaded LoRA"),
        ({"lora": []}, ValueError, r"lora is \[\], expected the name"),
        ({"lora": ["anna", "anna"]}, ValueError, "every LoRA once"),
        ({"lora": [3]}, TypeError, r"lora is \[3\]"),
        ({"lora": {"anna": "much"}}, ValueError, "the scale of 'anna' is 'much'"),
        ({"ip_adapter_image": 3}, TypeError, "ip_adapter_image is of type int, expected a picture"),
        ({"ip_adapter_image": []}, ValueError, "ip_adapter_image is empty"),
        ({"ip_adapter_image": {"face": 3}}, TypeError, r"ip_adapter_image\['face'\] is of type int"),
        ({"ip_adapter_image": {"face": {"face": 3}}}, TypeError, "expected a picture"),
        ({"ip_adapter_image": "no such file.png"}, ValueError, "'no such file.png' cannot be read"),
        ({"begin": -0.1}, ValueError, "begin is -0.1, expected a finite number from 0 to 1"),
        ({"end": 25}, ValueError, "end is 25, expected a finite number from 0 to 1"),
        ({"begin": 0.5, "end": 0.5}, ValueError, "begin is 0.5 and end is 0.5, expected begin < end"),
        ({"strength": -1}, ValueError, "strength is -1, expected a finite number of at least 0"),
    ],
)
def test_a_value_that_a_region_cannot_hold_is_named(entry, error, message):
    with pytest.raises(error, match=message):
        one(subject="dog", **entry)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"subject": "background"}], "holds nothing: expected prompt, negative_prompt, lora or ip_adapter_image"),
        ([{"subject": "background", "prompt": "a", "priority": 1}], "has `priority`, which the background cannot"),
        (
            [{"subject": "dog", "box": (0, 0, 1, 1)}, {"subject": "background", "prompt": "a"}],
            "has no place: the other",
        ),
        ([{"prompt": "a ball"}], "needs exactly one of `box` and `mask`"),
        ([{"prompt": "a ball", "box": LEFT, "occurrence": 2}], "occurrence is 2 without a `subject`"),
        ([{"box": LEFT, "strength": 2}], "exactly one of `subject` and `phrase`"),
    ],
)
def test_an_address_that_means_nothing_is_named(entries, message):
    with pytest.raises(ValueError, match=message):
        parse(*entries)


def test_a_colour_of_a_map_holds_what_a_region_does():
    array = np.zeros((16, 16, 3), np.uint8)
    array[:, :8] = 255, 0, 0
    contents = {"prompt": "a ball", "lora": "film"}
    (region,) = parse_layout(array, height=16, width=16, color_context={"255,0,0": contents})
    assert region.prompt == "a ball" and region.lora == {"film": 1.0} and region.mask[:, :8].min() == 1


def test_what_a_region_holds_is_told_in_short_lines():
    region = one(subject="dog", prompt="a red dog", lora={"anna": 0.5, "film": 1}, end=0.5, strength=2)
    assert describe_contents(region) == ["“a red dog”", "LoRA anna 0.5, film", "steps 0% to 50%", "strength 2"]
    assert describe_contents(one(prompt="a ball")) == [], "its name says it"


def test_a_region_without_words_reads_back_as_it_was():
    (region,) = parse({"lora": "petrucci", "box": LEFT})
    (again,) = parse(*as_layout([region]))
    assert digest_contents(again) == digest_contents(region) and not again.is_named
