import json
import math
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from multisubject.base_models import native_size
from multisubject.generation.base_model import BaseModel
from multisubject.tiny_world import picture_size
from multisubject.tiny_world.scenes import (
    CATEGORIES,
    COLOURS,
    PATTERNS,
    SETTINGS,
    Look,
    Scene,
    SceneObject,
    World,
    contrasts,
    describe,
    full_phrase,
    iou,
    is_visible,
    random_scene,
    render,
)
from multisubject.training.models import Models

RICH = World(image_size=128, categories=CATEGORIES, colours=tuple(COLOURS), patterns=PATTERNS, settings=SETTINGS)


@pytest.mark.parametrize("world", [World(), RICH], ids=["shipped", "rich"])
def test_same_seed_gives_same_bytes_and_words(world):
    def draw(seed):
        rng = random.Random(seed)
        scene = random_scene(rng, world)
        return render(scene, world.image_size).image.tobytes(), describe(scene, rng)

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_scene_has_the_asked_number_of_visible_objects(count):
    rng = random.Random(count)
    for _ in range(10):
        scene = random_scene(rng, World(), count)
        rendered = render(scene, 64)
        assert len(scene.objects) == count == len(rendered.boxes) == len(rendered.masks)
        for item, box in zip(scene.objects, rendered.boxes, strict=True):
            assert is_visible(item.look.colour, scene.setting)
            assert box is not None
            assert iou(item.box, box) > 0.7


def test_masks_do_not_overlap_and_cover_what_was_drawn():
    rng = random.Random(0)
    scene = random_scene(rng, World(), 3)
    empty = render(Scene(scene.setting, (), scene.seed), 64).image
    rendered = render(scene, 64)
    assert (rendered.masks.sum(0) <= 1).all()
    changed = (np.asarray(rendered.image).astype(int) - np.asarray(empty)).any(axis=-1)
    # Pixels well outside every mask are background.
    assert changed[~rendered.masks.any(0)].mean() < 0.05


@pytest.mark.parametrize("category", CATEGORIES)
def test_body_colour_dominates_and_stripes_show(category):
    def body(look):
        scene = Scene("on the grass", (SceneObject(category, look, (0.1, 0.1, 0.9, 0.9)),), seed=3)
        rendered = render(scene, 128)
        return np.asarray(rendered.image)[rendered.masks[0]].astype(int)

    plain = body(Look("blue"))
    blueish = (plain[:, 2] > plain[:, 0] + 60).mean()
    assert blueish > 0.25
    striped = body(Look("blue", "striped", "yellow"))
    yellowish = (striped[:, 0] > striped[:, 2] + 60).mean() - (plain[:, 0] > plain[:, 2] + 60).mean()
    assert yellowish > 0.1


def test_second_colours_are_readable():
    rng = random.Random(1)
    for _ in range(200):
        for item in random_scene(rng, World()).objects:
            if item.look.second_colour:
                assert contrasts(item.look.colour, item.look.second_colour)


def test_captions_name_every_category_and_leave_attributes_unsaid_now_and_then():
    rng = random.Random(2)
    captions, objects = [], 0
    for _ in range(300):
        scene = random_scene(rng, World())
        caption = describe(scene, rng)
        captions.append(caption)
        for item in scene.objects:
            objects += 1
            assert item.category in caption
    patterns = sum(word in World().patterns for caption in captions for word in caption.split())
    assert 0.85 < patterns / objects < 0.95  # in full 0.65 of the time, else with a pattern 0.7 of the time: 0.895
    assert any("trimmed" in caption for caption in captions)
    assert any(caption.endswith(SETTINGS[0]) for caption in captions)
    assert any(not caption.endswith(SETTINGS) for caption in captions)


def test_articles_fit_the_next_word():
    rng = random.Random(3)
    captions = [describe(random_scene(rng, World()), rng) for _ in range(300)]
    assert not any(" a orange" in caption or " an red" in caption for caption in captions)
    assert any("an orange" in caption for caption in captions)


def test_full_phrase_says_everything_there_is_to_see():
    assert full_phrase("person", Look("blue", "striped", "orange", "fine", "yellow")) == (
        "yellow trimmed blue fine orange striped person"
    )
    assert full_phrase("mug", Look("red")) == "red plain mug"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"categories": ("person", "unicorn")}, "unicorn"),
        ({"colours": ()}, "empty"),
        ({"object_counts": (0.1,) * 7}, "1 to 6"),
        ({"smaller_objects": 1.5}, "from 0 to 1"),
        ({"image_size": 60}, "multiple of 8"),
    ],
)
def test_impossible_worlds_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        World(**settings)


def test_a_share_of_scenes_has_smaller_objects_and_up_to_six_find_room():
    def sides(share):
        rng = random.Random(4)
        scenes = [random_scene(rng, World(smaller_objects=share), count) for count in range(1, 7) for _ in range(20)]
        assert [len(scene.objects) for scene in scenes] == [count for count in range(1, 7) for _ in range(20)]
        boxes = [item.box for scene in scenes for item in scene.objects]
        return np.array([math.sqrt((xmax - xmin) * (ymax - ymin)) for xmin, ymin, xmax, ymax in boxes])

    usual, smaller = sides(0), sides(1)
    assert usual.min() > 0.26 and 0.2 < smaller.min() < 0.24
    assert 0.02 < (sides(0.3) < usual.min()).mean() < (smaller < usual.min()).mean()


def test_pictures_are_as_large_as_the_base_draws_them(base_path, base_128_path, xl_base_path):
    assert [picture_size(base) for base in (base_128_path, xl_base_path)] == [128, 32]
    assert World().image_size == picture_size(base_path)


def test_a_base_that_is_not_square_has_one_size_wherever_it_is_asked_for(base_path, tmp_path):
    """In the check of a config, in a training and in the drawn world; the latter two draw squares."""
    folder = shutil.copytree(base_path, tmp_path / "base")
    path = folder / "unet" / "config.json"
    unet = json.loads(path.read_text()) | {"sample_size": [16, 24]}
    path.write_text(json.dumps(unet))
    vae = json.loads((folder / "vae" / "config.json").read_text())
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    assert native_size(unet, vae) == BaseModel.read(str(folder)).size == (16 * scale, 24 * scale)
    models = SimpleNamespace(unet_config=unet, vae=SimpleNamespace(config=vae))
    assert Models.native_resolution.fget(models) == picture_size(folder) == 16 * scale


def test_a_folder_of_no_base_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"has no unet/config.json; expected the folder of a base"):
        picture_size(tmp_path)
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"unet/config.json has no sample_size"):
        picture_size(tmp_path)
