"""What the browser sends and what a dropped file brings: checked as if from a stranger, and nothing of it lost."""

import io
import json
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import multisubject
from multisubject.generation.base_model import BaseModel
from multisubject.layout import parse_layout
from multisubject.page.document import MOST_POINTS, MOST_REGIONS, read_document
from multisubject.page.entries import DEFAULTS, METHODS, as_command, as_config, entry_of, read_settings
from multisubject.page.reading import read_file
from multisubject.pictures import data_url, png_bytes

ROOT = Path(multisubject.__file__).parent
SOURCES = {name: f"embeddings/{name}.safetensors" for name in ("petrucci", "majesty", "pepper", "lucille")}
LEFT, RIGHT = [0.05, 0.2, 0.45, 0.9], [0.55, 0.2, 0.95, 0.9]
PICTURE = data_url(Image.new("RGB", (8, 8), "red"))


@pytest.fixture(scope="module")
def base(base_path):
    return BaseModel.read(base_path)


def document(**changes):
    return {
        "size": [128, 128],
        "prompt": "a photo of <petrucci> and <majesty> on the beach",
        "negative_prompt": "",
        "regions": [
            {"id": "a", "subject": "petrucci", "shape": {"box": LEFT}},
            {"id": "b", "subject": "majesty", "shape": {"box": RIGHT}},
        ],
    } | changes


def region(**changes):
    return document(regions=[{"id": "a", "subject": "petrucci", "shape": {"box": LEFT}} | changes])


def mask_of(shape, size=(128, 128)):
    (part,) = read_document(region(shape=shape) | {"size": list(size)}).layout()
    return parse_layout([part], height=size[1], width=size[0])[0].mask


# --- documents -------------------------------------------------------------------------------------------------------


def test_a_document_is_an_entry():
    entry = entry_of(read_document(document()), DEFAULTS, SOURCES)
    assert entry == {
        "prompt": "a photo of <petrucci> and <majesty> on the beach",
        "residual_dict": {name: SOURCES[name] for name in ("petrucci", "majesty")},
        "layout": [
            {"subject": "petrucci", "box": LEFT},
            {"subject": "majesty", "box": RIGHT, "priority": 1},
        ],
        "seed": 0,
    }


def test_all_that_a_region_holds_is_in_the_entry():
    held = {"occurrence": 2, "weight": 2.0, "feather": 0.1, "begin": 0.1, "end": 0.9, "strength": 1.5}
    held |= {"prompt": "a hat", "negative_prompt": "snow", "lora": {"x": 0.5}}
    (part,) = read_document(region(**held, ip_adapter_image=PICTURE)).layout()
    assert part == {"subject": "petrucci", "box": LEFT, "ip_adapter_image": {"0": PICTURE}, **held}


def test_a_region_that_is_off_stays_in_the_entry_and_takes_no_place():
    layout = read_document(region(off=True, strength=2)).layout()
    assert layout[0]["strength"] == 0 and parse_layout(layout, height=64, width=64) == ()


def test_the_background_has_no_shape():
    layout = read_document(region(subject=None, phrase="background", prompt="palm trees", shape=None)).layout()
    assert layout == [{"phrase": "background", "prompt": "palm trees"}]


def test_an_ellipse_fills_its_box_but_for_the_corners():
    mask = mask_of({"ellipse": [0.25, 0.25, 0.75, 0.75]})
    assert mask[64, 64] == 1 and mask[64, 33] == 1 and mask[34, 34] == 0
    assert mask.mean() == pytest.approx(np.pi / 16, rel=0.01)


def test_strokes_are_as_wide_as_they_say_and_the_eraser_takes_away():
    stroke = {"erase": False, "width": 0.25, "points": [[0.0, 0.5], [1.0, 0.5]]}
    mask = mask_of({"strokes": [stroke]}, size=(128, 64))
    assert mask.mean() == pytest.approx(0.25, abs=0.01)  # a fraction of the shorter side
    assert (mask[:, 10] > 0.5).sum() == 16
    erased = mask_of({"strokes": [stroke, stroke | {"erase": True, "points": [[0.5, 0.5]]}]}, size=(128, 64))
    assert erased[32, 64] == 0 and erased[32, 10] == 1


def test_a_dot_is_a_stroke():
    assert mask_of({"strokes": [{"erase": False, "width": 0.5, "points": [[0.5, 0.5]]}]})[64, 64] == 1


def test_a_mask_is_read_anew_and_stands_for_its_transparency():
    drawn = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    drawn.paste((255, 0, 0, 255), (0, 0, 8, 16))
    mask = mask_of({"mask": data_url(drawn)})
    assert mask[:, :64].min() == 1 and mask[:, 64:].max() == 0


def test_what_is_checked_is_what_goes_back():
    read = read_document(document(underlay=PICTURE))
    assert read_document(read.plain()).plain() == read.plain()


LOTS = [[0.5, 0.5]] * (MOST_POINTS // 2 + 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("text", "of type str, expected a dictionary"),
        (document(size=[128, 129]), "multiples of 8"),
        (document(size=[1 << 20, 8]), "up to 4096"),
        (document(size=[128]), "expected 2 numbers"),
        (document(size=[float("nan"), 8]), "expected a number"),
        (document(prompt=["a"]), "prompt is of type list, expected text"),
        (document(prompt="a" * 2001), "at most 2,000"),
        (document(regions={}), f"a list of at most {MOST_REGIONS}"),
        (document(regions=[{"id": str(i)} for i in range(MOST_REGIONS + 1)]), f"at most {MOST_REGIONS}"),
        (document(regions=[{"id": "a"}, {"id": "a"}]), "one id"),
        (document(regions=["a"]), "region 1 is of type str"),
        (region(id=""), "region 1: id is ''"),
        (region(weight="1"), "region 1: weight is '1', expected a number"),
        (region(weight=True), "expected a number"),
        (region(occurrence=1.5), "expected a whole number from 1"),
        (region(lora=["a"]), "names with their scales"),
        (region(shape={"path": "/etc/passwd"}), "one of box, ellipse, strokes, mask"),
        (region(shape={"mask": "/etc/passwd"}), "mask is no picture"),
        (region(shape={"mask": "data:image/svg+xml;base64,AAAA"}), "mask is no picture"),
        (region(shape={"mask": "data:image/png;base64,AAAA"}), "cannot be read"),
        (region(ip_adapter_image="https://example.com/x.png"), "ip_adapter_image is no picture"),
        (region(ip_adapter_image={"0": "/etc/passwd"}), "ip_adapter_image is no picture"),
        (region(ip_adapter_image={"face": PICTURE}), "by the number of their IP-Adapter, '0' to '3'"),
        (region(ip_adapter_image=[PICTURE]), "ip_adapter_image is no picture"),
        (region(shape={"box": [0, 0, 1, "1"]}), "expected a number"),
        (region(shape={"ellipse": [0.5, 0, 0.2, 1]}), "in fractions, from 0 to 1"),
        (region(shape={"strokes": [{"width": 0.1, "points": []}]}), "1 to 20,000 of them"),
        (region(shape={"strokes": [{"width": 9, "points": [[0, 0]]}]}), "up to 1"),
        (region(shape={"strokes": [{"width": 0.1, "points": [[9, 0]]}]}), "far outside"),
        (region(shape={"strokes": [{"width": 0.1, "points": LOTS}] * 2}), "20,002 points"),
        (region(shape={"strokes": [{"width": 1, "points": LOTS}]}), "over too much too often"),
        (document(underlay="data:text/html;base64,AAAA"), "the picture under the regions is no picture"),
    ],
)
def test_what_is_no_document_is_refused(given, message):
    with pytest.raises(ValueError) as error:
        read_document(given)
    assert message in str(error.value) and len(str(error.value)) < 400


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_say_only_what_differs():
    settings = read_settings({"guidance_method": "cones2", "seed": 7, "recurrence": 2})
    entry = entry_of(read_document(document()), settings, SOURCES)
    assert {key: entry[key] for key in ("guidance_method", "seed", "recurrence")} == {
        "guidance_method": "cones2",
        "seed": 7,
        "recurrence": 2,
    }
    assert "guidance_weight" not in entry


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected a dictionary"),
        ({"steps": 1}, "unknown key 'steps'"),
        ({"num_images": 9}, "num_images is '9', expected a whole number from 1 to 8"),
        ({"num_inference_steps": 10**9}, "from 1 to 150"),
        ({"seed": 1.5}, "expected a whole number"),
        ({"seed": -1}, "from 0"),
        ({"seed": 10**400}, "from 0"),
        ({"guidance_scale": float("nan")}, "expected a number"),
        ({"guidance_method": 3}, "expected a short text"),
        ({"start": "nowhere"}, "expected one of noise, picture, region"),
        ({"num_images": None}, "expected a whole number"),
    ],
)
def test_what_is_no_setting_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_settings(given)


def test_every_method_has_its_sentence():
    from multisubject.guidance_methods import GUIDANCE_METHODS

    assert set(METHODS) == set(GUIDANCE_METHODS)


def test_the_command_goes_with_the_config(base):
    settings = read_settings({"num_images": 3, "num_inference_steps": 20, "guidance_scale": 5.0})
    command = as_command(read_document(document()), settings, base)
    assert command == (
        "multisubject-generate --generation_config page.json --num_images 3 --num_inference_steps 20 "
        "--guidance_scale 5.0"
    )


# --- files -----------------------------------------------------------------------------------------------------------


def config(entry, base, known=SOURCES):
    return read_file(json.dumps([entry]).encode(), list(known), base)


def test_a_copied_config_brings_everything_back(base):
    held = {"weight": 2.0, "prompt": "a hat", "lora": {"x": 0.5}, "ip_adapter_image": {"1": PICTURE}, "off": True}
    given = read_document(
        document(
            negative_prompt="snow",
            regions=[
                {"id": "r1", "subject": "petrucci", "shape": {"box": LEFT}, **held},
                {"id": "r2", "phrase": "beach", "shape": {"mask": data_url(Image.new("L", (128, 128), 255))}},
            ],
        )
    )
    settings = read_settings({"seed": 5, "guidance_method": "masked"})
    read, read_back, notes = read_file(as_config(given, settings, SOURCES).encode(), list(SOURCES), base)
    assert (read.plain(), read_back, notes) == (given.plain(), settings, [])


@pytest.mark.parametrize("name", ["single", "two", "four"])
def test_the_shipped_configs_open(name, base):
    data = (ROOT / "configs" / f"guidance_conf_{name}.json").read_bytes()
    known = [path.stem for path in (ROOT / "embeddings").glob("*.safetensors")]
    read, _, notes = read_file(data, known, base)
    assert not notes and read.names() and all(name in known for name in read.names())
    assert all(region["shape"] and region["subject"] in known for region in read.regions)
    assert len(read.regions) == {"single": 0, "two": 2, "four": 4}[name]


def test_plain_words_become_the_subjects_of_their_files(base):
    read, _, _ = config(
        {
            "prompt": "a person and a guitar",
            "residual_dict": {"person": "elsewhere/petrucci.pt", "guitar": "majesty.pt"},
            "layout": {"person": LEFT, "guitar": RIGHT},
        },
        base,
    )
    assert read.prompt == "a <petrucci> and a <majesty>"
    assert [region["subject"] for region in read.regions] == ["petrucci", "majesty"]


def test_unknown_subjects_are_said(base):
    _, _, notes = config({"prompt": "a <rex>", "residual_dict": {"rex": "/etc/passwd"}}, base)
    assert notes == ["Not among the subjects here: <rex>."]


@pytest.mark.parametrize(
    ("layout", "color_context"),
    [
        ("/etc/passwd", {}),
        ("x.json", {}),
        ([{"subject": "petrucci", "mask": "../../x.png"}], {}),
        *(([{"box": LEFT, "ip_adapter_image": held}], {}) for held in ("x.png", {"1": "x.png"}, [PICTURE, "x.png"])),
        ("layouts/two_people.png", {"255,0,0": {"ip_adapter_image": "x.png"}, "0,0,255": ["a", 2]}),
    ],
)
def test_nothing_that_a_config_names_is_opened(layout, color_context, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("x.png")
    entry = {"prompt": "a <petrucci>", "residual_dict": {"petrucci": "x"}, "layout": layout}
    with pytest.raises(ValueError, match=r"which the page does not open|no color_context"):
        config(entry | ({"color_context": color_context} if color_context else {}), base)


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ("faces/anna.png", {"0": PICTURE}),
        (["anna.png", PICTURE], {"0": PICTURE, "1": PICTURE}),
        ({"1": "anna.png"}, {"1": PICTURE}),
    ],
)
def test_a_zip_brings_reference_pictures(held, expected, base):
    entry = {"prompt": "a dog", "layout": [{"box": LEFT, "ip_adapter_image": held}]}
    face = png_bytes(Image.new("RGB", (8, 8), "red"))
    read, _, _ = read_file(zipped({"a.json": json.dumps([entry]), "faces/anna.png": face}), [], base)
    assert read.regions[0]["ip_adapter_image"] == expected


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_damaged_zip_is_read_or_refused_in_words(base):
    whole = zipped({"a.json": json.dumps([{"prompt": f"a dog of {list(range(300))}"}])})
    for place in range(40, len(whole) - 100):
        with suppress(ValueError):
            read_file(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :], [], base)


@pytest.mark.parametrize("depth", [400, 900, 980, 990, 1000, 100_000])
def test_deep_json_is_read_or_refused_in_words(depth, base):
    with suppress(ValueError):
        read_file(f'[{{"prompt": "a", "layout": {"[" * depth}{"]" * depth}}}]'.encode(), [], base)


def test_a_zip_brings_its_pictures(base):
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    entry = {"prompt": "a dog", "layout": [{"subject": "dog", "mask": "masks/left.png"}]}
    read, _, _ = read_file(zipped({"a.json": json.dumps([entry]), "masks/left.png": png_bytes(mask)}), [], base)
    (part,) = read.layout()
    assert parse_layout([part], height=16, width=16)[0].mask[:, :8].min() == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"hello", "neither a picture nor JSON"),
        (b"[1]", "expected a generation config"),
        (b"{}", "expected a `prompt`"),
        (b"[" * 100_000, "nested too deeply"),
        (b'[{"prompt": "a", "promt": 1}]', "unknown key"),
        (b"PK\x03\x04 not really", "the zip cannot be read"),
        (png_bytes(Image.new("RGB", (8, 8))), "has no settings in it"),
        (b"\x89PNG\r\n\x1a\n broken", "cannot be read"),
        (zipped({"bomb.png": b"\0" * (21 * 2**20), "a.json": "[]"}), "expected at most 32 and"),
        (zipped({}), "0 JSON files"),
        (b" " * (20 * 2**20 + 1), "bytes, expected at most"),
    ],
)
def test_what_is_no_file_of_ours_is_refused(data, message, base):
    with pytest.raises(ValueError) as error:
        read_file(data, [], base)
    assert message in str(error.value) and len(str(error.value)) < 400
