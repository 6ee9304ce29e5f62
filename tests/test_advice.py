"""What a config's check says of entries that can be run, and pictures that are written into a layout as text."""

import json

import numpy as np
import pytest
from PIL import Image

from multisubject.generation.base_model import BaseModel
from multisubject.generation.config_file import ConfigError, read_config
from multisubject.generation.tasks import load_tasks
from multisubject.layout import parse_layout
from multisubject.pictures import data_url

ENTRY = {
    "prompt": "a photo of <petrucci> and <majesty> on the beach",
    "residual_dict": {name: f"embeddings/{name}.safetensors" for name in ("petrucci", "majesty")},
}
LEFT, RIGHT = [0.05, 0.2, 0.45, 0.9], [0.55, 0.2, 0.95, 0.9]


@pytest.fixture(scope="module")
def base(base_path):
    return BaseModel.read(base_path)


@pytest.fixture
def check(base, tmp_path):
    def check(**changes):
        (tmp_path / "config.json").write_text(json.dumps([ENTRY | changes]))
        return load_tasks(read_config(tmp_path / "config.json"), base)

    return check


def test_a_sound_entry_needs_no_advice(check):
    assert check(layout={"petrucci": LEFT, "majesty": RIGHT})[1] == []


def test_a_small_region_is_pointed_out(check):
    (warning,) = check(layout={"petrucci": LEFT, "majesty": [0.6, 0.5, 0.8, 0.7]})[1]
    assert "region 'majesty' covers 655 pixels" in warning and "less than 1024" in warning


def test_a_subject_without_a_region_is_pointed_out_where_others_have_one(check):
    (warning,) = check(layout={"petrucci": LEFT})[1]
    assert "subject '<majesty>' has no region" in warning
    assert check()[1] == []


def test_words_that_are_cut_off_are_pointed_out(check):
    (warning,) = check(prompt=ENTRY["prompt"] + " and sand" * 50)[1]
    assert "the text encoder reads the first 75" in warning


def test_problems_come_one_by_one(check):
    with pytest.raises(ConfigError) as error:
        check(layout={"petrucci": [0, 0, 2, 1]}, guidance_method="none such")
    assert len(error.value.problems) == 2 and all(problem in str(error.value) for problem in error.value.problems)


def test_a_mask_may_be_written_as_text(check):
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, :8] = 255
    image = Image.fromarray(mask)
    (task,), _ = check(layout=[{"subject": "petrucci", "mask": data_url(image)}, {"subject": "majesty", "box": RIGHT}])
    (drawn,) = parse_layout([{"subject": "petrucci", "mask": image}], height=128, width=128)
    assert np.array_equal(task.regions()[0].mask, drawn.mask)


def test_a_reference_picture_may_be_written_as_text():
    picture = Image.new("RGB", (8, 8), "red")
    (region,) = parse_layout(
        [{"box": LEFT, "ip_adapter_image": data_url(picture), "phrase": "cat"}], height=64, width=64
    )
    assert region.ip_adapter_image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("text", ["data:image/png;base64,%%", "data:image/png;base64,aGVsbG8="])
def test_text_that_is_no_picture_is_refused_in_short(text):
    with pytest.raises(ValueError, match=r"data:image/png;base64,…' is not a readable image"):
        parse_layout({"cat": text}, height=64, width=64)
