import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from multisubject.tiny_world import train_judge
from multisubject.tiny_world.judge import CHECKPOINT, Judge, JudgeNetwork, crop_boxes, label_names
from multisubject.tiny_world.scenes import SCALES, Look, Scene, SceneObject, World, iou, random_scene, render
from multisubject.tiny_world.subjects import SUBJECTS, subject_object, subject_pictures
from multisubject.tiny_world.train_judge import (
    IGNORE,
    JudgeRecipe,
    SceneMix,
    centre_targets,
    draw_scene,
    draw_scenes,
    measure,
    near_miss,
    occupant,
    region_classes,
    subject_name,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

WORLD = World()
LABELS = label_names(WORLD)
MIX = SceneMix(
    scenes=0, object_counts=(0.1, 0.3, 0.3, 0.15, 0.15), smaller_objects=0.2, known=0.25, near_misses=0.2, seed=0
)
# petrucci on the left, a plain green mug at the top right, nothing else.
BOXES = ((0.05, 0.30, 0.43, 0.88), (0.55, 0.08, 0.95, 0.46))
MEETING = Scene(
    "on the beach",
    (subject_object(SUBJECTS["petrucci"], BOXES[0]), SceneObject("mug", Look("green"), BOXES[1])),
    seed=5,
)


@pytest.fixture(scope="module")
def judge():
    return Judge.load()


@pytest.fixture(scope="module")
def meeting():
    return render(MEETING, 64).image


# --- the judge that ships ---


def test_shipped_judge_is_small_and_carries_its_own_accuracy(judge):
    assert CHECKPOINT.stat().st_size < 3 * 2**20
    held_out = judge.metadata["held_out"]
    tight = {name: entry["accuracy"] for name, entry in held_out["rendered, tight"].items()}
    assert tight["category"] >= 0.98
    assert tight["colour"] >= 0.97
    assert tight["pattern"] >= 0.95
    assert tight["subject"] >= 0.97
    assert held_out["rendered, setting"]["accuracy"] >= 0.98


def test_shipped_judge_measures_as_its_header_says(judge):
    """On scenes that neither training nor the header's table has seen."""
    table = measure(judge, draw_scenes(WORLD, MIX, judge.labels, scenes=80, seed=99), seed=99)
    for image in ("rendered", "as if decoded"):
        for name, least in (("category", 0.95), ("colour", 0.94), ("pattern", 0.92), ("subject", 0.94)):
            assert table[f"{image}, tight"][name]["accuracy"] >= least, (image, name)
        assert table[f"{image}, detection"]["precision"] >= 0.9
        assert table[f"{image}, detection"]["recall"] >= 0.9
        assert table[f"{image}, setting"]["accuracy"] >= 0.96


def test_regions_are_named_or_empty(judge, meeting):
    person, mug, nothing = judge.classify([meeting] * 3, [*BOXES, (0.55, 0.58, 0.95, 0.96)])
    assert (person.category, person.colour, person.pattern) == ("person", "blue", "striped")
    assert (person.subject, person.second_colour, person.accessory) == ("petrucci", "orange", "yellow")
    assert (mug.category, mug.colour, mug.pattern, mug.subject) == ("mug", "green", "plain", None)
    assert mug.second_colour is None and mug.scale is None
    assert nothing.category is None and nothing.colour is None and nothing.subject is None
    for verdict in (person, mug, nothing):
        assert all(0 < value <= 1 for value in verdict.probability.values())


def test_detector_lists_everything_and_only_that(judge, meeting):
    empty = render(Scene("at night", ()), 64).image
    found, none = judge.detect([meeting, empty])
    assert none == []
    assert sorted((d.category, d.subject) for d in found) == [("mug", None), ("person", "petrucci")]
    for detection in found:
        assert max(iou(detection.box, box) for box in BOXES) > 0.5
    assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)


def test_held_out_views_of_every_subject_are_recognised(judge):
    views = [
        (s.name, view) for s in SUBJECTS.values() for view in subject_pictures(s, WORLD, count=4, split="held_out")
    ]
    found = judge.detect([view for _, view in views])
    right = sum([d.subject for d in group] == [name] for (name, _), group in zip(views, found, strict=True))
    assert right >= len(views) - 2


def test_settings_are_told(judge):
    pictures = [render(Scene(setting, MEETING.objects, seed=3), 64).image for setting in WORLD.settings]
    assert [name for name, _ in judge.settings(pictures)] == list(WORLD.settings)


def test_answers_do_not_depend_on_batch_or_on_the_kind_of_input(judge, meeting):
    array = np.asarray(meeting)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255
    together = judge.classify([meeting] * 2, list(BOXES))
    alone = judge.classify([array], [BOXES[1]]) + judge.classify(tensor, [BOXES[1]])
    for verdict in alone:
        assert verdict.subject == together[1].subject and verdict.category == together[1].category
        assert verdict.probability == pytest.approx(together[1].probability, abs=1e-4)


def test_masks_and_larger_pictures_are_judged_alike(judge):
    large = render(MEETING, 192).image
    mask = np.zeros((192, 192), np.float32)
    mask[int(0.30 * 192) : int(0.88 * 192), int(0.05 * 192) : int(0.43 * 192)] = 1
    by_box, by_mask = judge.classify([large, large], [BOXES[0], mask])
    assert by_box.subject == by_mask.subject == "petrucci"


def test_a_larger_world_is_judged_as_well(judge):
    """Pictures are made smaller without aliasing, as pictures and as tensors."""
    rng = random.Random(11)
    scenes = [random_scene(rng, WORLD) for _ in range(60)]
    pictures = [render(scene, 128).image for scene in scenes]
    rows = [(index, item) for index, scene in enumerate(scenes) for item in scene.objects]
    boxes = [item.box for _, item in rows]
    tensor = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255
    by_picture = judge.classify([pictures[index] for index, _ in rows], boxes)
    by_tensor = judge.classify(tensor[[index for index, _ in rows]], boxes)
    for verdicts in (by_picture, by_tensor):
        for name, least in (("colour", 0.94), ("pattern", 0.97), ("scale", 0.97)):
            asked = [(getattr(v, name), getattr(i.look, name)) for v, (_, i) in zip(verdicts, rows, strict=True)]
            if name == "scale":
                asked = [pair for pair, (_, item) in zip(asked, rows, strict=True) if item.look.pattern != "plain"]
            assert sum(found == wanted for found, wanted in asked) >= least * len(asked), name
    assert [v.subject for v in by_picture] == [v.subject for v in by_tensor]


@pytest.mark.parametrize("size", [32, 128])
def test_scenes_of_any_size_train_the_judge_at_its_own(size):
    world = World(image_size=size)
    large, own = (draw_scenes(world, MIX, LABELS, scenes=4, seed=3) for world in (world, World(image_size=64)))
    assert large.pictures.shape == own.pictures.shape == (4, 3, 64, 64)
    assert (large.pictures.float() - own.pictures.float()).abs().mean() < 8  # of 255: the same scenes
    assert (large.boxes - own.boxes).abs().max() < 0.05
    assert all(large.classes[name].equal(own.classes[name]) for name in own.classes)


def test_scenes_of_the_judges_size_are_taken_as_they_are():
    world = World(image_size=64)
    scenes = draw_scenes(world, MIX, LABELS, scenes=4, seed=3)
    rng = random.Random(3)
    drawn = [np.asarray(render(draw_scene(rng, world, MIX)[0], 64).image) for _ in range(4)]
    assert np.array_equal(scenes.pictures.permute(0, 2, 3, 1).numpy(), np.stack(drawn))


def test_region_may_be_loose_or_off_the_object(judge, meeting):
    left, top, right, bottom = BOXES[0]
    loose, off = (0.0, 0.15, 0.52, 1.0), (left + 0.06, top - 0.09, right + 0.06, bottom - 0.09)
    corner = (left, top, left + 0.12, top + 0.12)
    assert [v.subject for v in judge.classify([meeting] * 2, [loose, off])] == ["petrucci"] * 2
    assert judge.classify([meeting], [corner])[0].category is None


def test_nothing_asked_nothing_answered(judge):
    assert judge.classify([], []) == []
    assert judge.detect([]) == []
    assert judge.settings([]) == []


# --- what it refuses ---


def test_pairs_must_match(judge, meeting):
    with pytest.raises(ValueError, match="1 pictures and 2 regions"):
        judge.classify([meeting], list(BOXES))


@pytest.mark.parametrize("region", [(0.5, 0.1, 0.5, 0.9), (0.1, 0.2, 0.3), (1.2, 0.1, 1.5, 0.9)])
def test_boxes_must_have_an_area_inside_the_picture(judge, meeting, region):
    with pytest.raises(ValueError, match="expected a box"):
        judge.classify([meeting], [region])


def test_empty_mask_is_refused(judge, meeting):
    with pytest.raises(ValueError, match="mask is empty"):
        judge.classify([meeting], [np.zeros((64, 64), np.float32)])


def test_pictures_must_be_pictures(judge):
    with pytest.raises(ValueError, match="uint8"):
        judge.settings([np.zeros((64, 64, 3), np.float32)])
    with pytest.raises(ValueError, match="float tensor"):
        judge.settings(torch.zeros(3, 64, 64))


def test_missing_or_foreign_file_names_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_judge"):
        Judge.load(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="labels"):
        Judge.load(tmp_path / "other.safetensors")


# --- its parts ---


def test_saved_judge_answers_the_same(tmp_path, meeting):
    torch.manual_seed(0)
    judge = Judge(JudgeNetwork(LABELS), LABELS, {"note": 1})
    judge.network.half().float()
    judge.save(tmp_path / "judge.safetensors")
    again = Judge.load(tmp_path / "judge.safetensors")
    assert again.labels == judge.labels and again.metadata == {"note": 1}
    assert again.detect([meeting], threshold=0.01) == judge.detect([meeting], threshold=0.01)


def test_crop_shows_the_box_and_a_narrow_rim():
    picture = torch.full((1, 3, 64, 64), -1.0)
    picture[..., 16:32, 40:60] = 1.0
    crop = crop_boxes(picture, torch.tensor([[40 / 64, 16 / 64, 60 / 64, 32 / 64]]))
    assert crop.shape == (1, 3, 32, 32)
    assert crop[..., 3:29, 3:29].min() > 0.99
    assert crop[..., 0, :].max() < 0 and crop[..., :, 0].max() < 0


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=lambda subject: subject.name)
def test_near_misses_are_nobody_and_can_be_seen(subject):
    rng = random.Random(0)
    for _ in range(60):
        look = near_miss(rng, subject, WORLD, rng.choice(WORLD.settings))
        assert subject_name(subject.category, look) is None
        changed = {
            f
            for f in ("colour", "pattern", "second_colour", "scale", "accessory")
            if getattr(look, f) != getattr(subject.look, f)
        }
        assert len(changed) == 1 or "pattern" in changed
        assert look.scale in SCALES


def test_occupant_is_the_object_that_fills_the_region():
    boxes = torch.tensor([[[0.1, 0.1, 0.5, 0.5], [0.6, 0.1, 1.0, 0.5], [0, 0, 0, 0], [0, 0, 0, 0]]]).expand(5, -1, -1)
    regions = torch.tensor(
        [
            [0.05, 0.05, 0.58, 0.55],  # loosely around the first
            [0.58, 0.08, 1.0, 0.52],  # around the second
            [0.1, 0.6, 0.9, 0.95],  # empty
            [0.1, 0.1, 1.0, 0.5],  # both
            [0.4, 0.1, 0.55, 0.5],  # a strip of the first
        ]
    )
    index, state = occupant(regions, boxes)
    assert state.tolist() == [1, 1, 0, -1, -1]
    assert index[:2].tolist() == [0, 1]


def test_region_classes_follow_the_scene():
    scenes = draw_scenes(WORLD, MIX, LABELS, scenes=30, seed=1)
    rows, columns = (scenes.kinds >= 0).nonzero(as_tuple=True)
    classes = region_classes(scenes, rows, scenes.boxes[rows, columns], nothing=len(WORLD.categories))
    told = classes["category"] != IGNORE
    assert told.float().mean() > 0.9
    assert torch.equal(classes["category"][told], scenes.classes["category"][rows, columns][told])
    known = scenes.kinds[rows, columns] == 0
    nobody = LABELS["subject"].index(None)
    assert (scenes.classes["subject"][rows, columns][known] != nobody).all()


def test_same_seed_draws_the_same_scenes():
    first, again = (draw_scenes(WORLD, MIX, LABELS, scenes=5, seed=3) for _ in range(2))
    assert torch.equal(first.pictures, again.pictures) and torch.equal(first.boxes, again.boxes)


def test_centre_targets_mark_each_object():
    boxes = torch.zeros(1, 4, 4)
    boxes[0, 0], boxes[0, 1] = torch.tensor([0.0, 0.0, 0.5, 0.5]), torch.tensor([0.5, 0.25, 1.0, 1.0])
    heat, distances, weight = centre_targets(boxes)
    assert (heat == 1).sum() == 2 and heat[0, 4, 4] == 1 and heat[0, 10, 12] == 1
    middle = 4.5 / 16
    assert distances[0, :, 4, 4].tolist() == pytest.approx([middle, middle, 0.5 - middle, 0.5 - middle])
    assert weight[0, 4, 4] == 1 and weight[0, 15, 0] == 0


# --- training ---


def tiny_recipe(steps: int) -> JudgeRecipe:
    return JudgeRecipe(
        WORLD,
        SceneMix(**{**vars(MIX), "scenes": 12}),
        train_judge.Schedule(steps, 6, 1e-3, 2, 0.9, seed=1, checkpoint_every=2),
        {"scenes": 4, "seed": 2},
    )


def test_resumed_training_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    whole = train_judge.train_judge(tiny_recipe(4), tmp_path / "whole")
    original = train_judge.train

    def stop_after_two(model, draw_batch, schedule, checkpoint, *, description):
        calls = itertools.count()

        def draw(generator, count):
            if next(calls) == 2:
                raise KeyboardInterrupt
            return draw_batch(generator, count)

        return original(model, draw, schedule, checkpoint, description=description)

    monkeypatch.setattr(train_judge, "train", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        train_judge.train_judge(tiny_recipe(4), tmp_path / "parts")
    monkeypatch.setattr(train_judge, "train", original)
    resumed = train_judge.train_judge(tiny_recipe(4), tmp_path / "parts")
    assert whole is not None and resumed is not None
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value, rtol=0, atol=0)


def test_command_trains_measures_and_saves(tmp_path, capsys):
    recipe = tmp_path / "judge.yaml"
    mix = {**vars(MIX), "object_counts": list(MIX.object_counts), "scenes": 8}
    schedule = {"steps": 2, "batch_size": 4, "learning_rate": 1.0e-3, "warmup_steps": 1, "ema_decay": 0.9}
    recipe.write_text(yaml.safe_dump({"data": mix, "training": schedule, "held_out": {"scenes": 6, "seed": 1}}))
    output = tmp_path / "judge.safetensors"
    arguments = ["--recipe", str(recipe), "--runs", str(tmp_path / "runs"), "--output", str(output)]
    assert train_judge.main(arguments) == 0
    judge = Judge.load(output)
    assert judge.metadata["recipe"]["training"]["steps"] == 2
    assert set(judge.metadata["held_out"]) >= {"rendered, tight", "rendered, detection", "as if decoded, setting"}
    assert "rendered, tight" in capsys.readouterr().out

    before = output.read_bytes()
    recipe.write_text(
        yaml.safe_dump({"data": mix, "training": {**schedule, "steps": 9}, "held_out": {"scenes": 5, "seed": 2}})
    )
    assert train_judge.main([*arguments, "--measure_only"]) == 0
    assert output.read_bytes() == before  # what it was trained with is not what it was measured with
    assert "rendered, tight" in capsys.readouterr().out


def test_unknown_setting_in_the_recipe_is_refused(tmp_path):
    world = CHECKPOINT.with_name("recipe.yaml")
    recipe = tmp_path / "judge.yaml"
    sections = yaml.safe_load(CHECKPOINT.with_name("judge.yaml").read_text())
    recipe.write_text(yaml.safe_dump({**sections, "training": {**sections["training"], "speed": 9}}))
    with pytest.raises(ValueError, match="speed"):
        JudgeRecipe.load(recipe, world)
    recipe.write_text(yaml.safe_dump({**sections, "held_out": {"scene": 3}}))
    with pytest.raises(ValueError, match="held_out"):
        JudgeRecipe.load(recipe, world)
    recipe.write_text(yaml.safe_dump({**sections, "extra": {}}))
    with pytest.raises(ValueError, match="extra"):
        JudgeRecipe.load(recipe, world)


# --- the benchmark that uses it ---


def test_wilson_interval_of_the_textbook():
    from base_quality import wilson_interval

    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson_interval(0, 20)[0] == 0 and wilson_interval(20, 20)[1] == pytest.approx(1)


def test_benchmark_asks_only_for_what_can_be_seen():
    from base_quality import draw_prompts

    asked = draw_prompts(WORLD, 300, 0, objects=2, described=True)
    assert all(len({category for category, _ in item.objects}) == 2 for item in asked)
    assert not any(
        look.colour == "white" and item.setting == "in the snow" for item in asked for _, look in item.objects
    )
    assert asked[0].prompt.startswith("a photo of a ") and asked[0].prompt.endswith(asked[0].setting)


@pytest.mark.slow
def test_benchmark_prints_its_table_and_writes_its_files(tmp_path, capsys):
    from base_quality import main

    files = {"json": tmp_path / "figures.json", "contact_sheet": tmp_path / "sheet.png", "sheets": tmp_path / "images"}
    flags = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    assert main(["--num_prompts", "2", "--steps", "2", "--batch_size", "2", "--no_timing", *flags]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(files["json"].read_text())
    for name in ("rendered scenes: pattern", "one object: category", "two named: both categories present"):
        assert name in printed and figures["scores"][name]["total"] >= 2
    assert files["contact_sheet"].exists()
    assert sorted(path.name for path in files["sheets"].iterdir()) == [
        "prompts.png",
        "reconstructions.png",
        "scenes.png",
        "subjects.png",
    ]
