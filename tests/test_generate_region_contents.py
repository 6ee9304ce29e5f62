"""Regions with words, negatives and pictures of their own in generation configurations, and what is made of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from PIL import Image

from multisubject.generate_images import main
from multisubject.generation.adapters import IPAdapters, Location, Weights
from multisubject.generation.base_model import BaseModel
from multisubject.generation.config_file import ConfigError, read_config
from multisubject.generation.picture_files import CONTACT_SHEET, read_settings
from multisubject.generation.tasks import load_tasks
from multisubject.hub_utils import save_subject
from multisubject.residual_embeddings import ResidualEmbedding
from multisubject.tiny_world import EMBEDDED_BASE
from multisubject.visualization import draw_regions

LEFT, RIGHT = [0, 0, 0.5, 1], [0.5, 0, 1, 1]


@pytest.fixture
def base():
    return BaseModel.read(str(EMBEDDED_BASE))


@pytest.fixture
def check(base, tmp_path, monkeypatch):
    """Write an entry as a config, in a folder with a subject and a picture, and check it."""
    monkeypatch.chdir(tmp_path)
    delta = 0.1 * torch.ones(1, next(iter(base.embed_dims.values())))
    save_subject(ResidualEmbedding("dog", {"text_encoder": delta}), tmp_path / "biscuit.safetensors", name="biscuit")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "face.png")

    def run(layout: Any, ip_adapters: Any = None, **changes: Any) -> Any:
        entry = {"prompt": "a photo on the beach", "residual_dict": {"my dog": "biscuit.safetensors"}, "layout": layout}
        (tmp_path / "config.json").write_text(json.dumps([entry | changes]), encoding="utf-8")
        (task,), _ = load_tasks(read_config(tmp_path / "config.json"), base, None, ip_adapters)
        return task

    return run


def test_a_subject_in_a_regions_own_words_is_loaded(check):
    task = check([{"prompt": "a red <my dog>", "negative_prompt": "<my dog>, hat", "box": LEFT}])
    (region,) = task.regions()
    assert [*task.subjects] == ["my-dog"]
    assert (region.prompt, region.negative_prompt) == ("a red <my-dog>", "<my-dog>, hat")


def test_plain_words_of_a_region_are_no_subject(check):
    assert not check([{"prompt": "a red dog", "box": LEFT}], residual_dict={"dog": "biscuit.safetensors"}).subjects


def test_paths_of_reference_pictures_are_found(check, tmp_path, monkeypatch):
    adapters = IPAdapters((Weights("a.safetensors", tmp_path, ""),), (1.0,), Location("", "", "", None), "")
    task = check([{"ip_adapter_image": {"0": "face.png"}, "box": LEFT}], ip_adapters=adapters)
    monkeypatch.chdir("/")
    assert task.layout[0]["ip_adapter_image"] == {"0": str(tmp_path / "face.png")}
    assert task.regions()[0].ip_adapter_image["0"].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("region", "changes", "message"),
    [
        ({"prompt": "a <cat>"}, {}, "the `prompt` of layout[0] ('a <cat>'): prompt names the subject '<cat>'"),
        ({"prompt": "hat " * 80}, {}, "has 80 tokens, expected at most 75"),
        ({"prompt": "a ball", "negative_prompt": "<cat>"}, {}, "the `negative_prompt` of layout[0] ('a ball')"),
        ({"subject": "cat", "prompt": "a ball"}, {}, "'cat' is not in the prompt"),
        ({"prompt": "a ball", "strength": 2}, {"guidance_method": "masked"}, "has `strength`, which guidance_method"),
        ({"ip_adapter_image": "no.png"}, {}, "'no.png' does not exist"),
        ({"prompt": "a ball", "end": 2}, {}, "end is 2, expected a finite number from 0 to 1"),
    ],
)
def test_what_a_region_cannot_hold_is_reported_with_its_place(check, region, changes, message):
    with pytest.raises(ConfigError, match=r"config.json:1: entry 1, layout: ") as caught:
        check([{**region, "box": LEFT}], **changes)
    assert message in str(caught.value)


def test_pictures_know_what_their_regions_held(check, tmp_path, capsys):
    layout = [
        {"prompt": "a photo of <my dog>", "box": LEFT, "end": 0.5},
        {"subject": "background", "prompt": "a photo on the beach", "negative_prompt": "ball"},
    ]
    arguments = ["--generation_config", str(tmp_path / "config.json"), "--output_dir", str(tmp_path / "out")]
    arguments += ["--num_images", "1", "--num_inference_steps", "2", "--device", "cpu", "--resume"]
    check(layout)
    main(arguments)
    (picture,) = (tmp_path / "out").rglob("0000.png")
    assert read_settings(picture)["layout"] == layout and (picture.parent / CONTACT_SHEET).is_file()
    main(arguments)
    assert "1 of 1 pictures are there already" in capsys.readouterr().out
    layout[1]["negative_prompt"] = "hat"
    check(layout)
    main(arguments)
    assert "0 of 1 pictures are there already" in capsys.readouterr().out


def test_a_drawn_region_says_what_it_holds():
    picture = Image.new("RGB", (256, 256))
    plain = draw_regions(picture, [{"subject": "dog", "box": LEFT}])
    held = draw_regions(picture, [{"subject": "dog", "box": LEFT, "negative_prompt": "hat", "begin": 0.5}])
    difference = (torch.tensor(list(held.tobytes())) != torch.tensor(list(plain.tobytes()))).view(256, 256, 3).any(-1)
    rows = difference.any(1).nonzero().flatten()
    assert rows.min() > 5 and rows.max() < 80, "two lines below the name"
