import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from multisubject.benchmarks.placement import (
    CELLS,
    METHODS,
    OURS,
    claims,
    draw_tasks,
    ellipse,
    plot,
    run,
    score_picture,
    table,
)
from multisubject.benchmarks.results import digest_of_weights, load_results
from multisubject.pipeline_multisubject import MultiSubjectPipeline
from multisubject.tiny_world.judge import Judge
from multisubject.tiny_world.scenes import Look, Scene, SceneObject, World, is_visible, render


@pytest.mark.parametrize("cell", CELLS)
def test_tasks_are_what_their_cell_says_and_do_not_depend_on_their_number(cell):
    tasks = draw_tasks(cell, 12, 1, World())
    assert tasks[:5] == draw_tasks(cell, 5, 1, World())
    assert tasks[:1] != draw_tasks(cell, 1, 0, World())
    for task in tasks:
        assert str(len(task.targets)) in cell
        assert len(task.layout) == len(task.targets)
        assert len({target.look for target in task.targets}) == len(task.targets)
        assert all(target.words in task.prompt for target in task.targets)
        assert all(is_visible(target.look.colour, task.setting) for target in task.targets)
        categories = {target.category for target in task.targets}
        assert len(categories) == (1 if "twins" in cell else len(task.targets))


def test_ellipse_fills_its_box():
    mask = ellipse((0.25, 0.0, 0.75, 1.0))
    assert mask[:, :16].max() == mask[:, 48:].max() == 0
    assert mask[32, 16:48].min() == 1
    assert mask.mean() == pytest.approx(np.pi / 8, rel=0.02)


def test_scores_see_right_and_exchanged_pictures():
    task = next(
        task
        for task in draw_tasks("described 2", 50, 1, World())
        if all(t.look.second_colour is None for t in task.targets)
    )
    first, second = task.targets

    def drawn(a, b):
        items = (SceneObject(first.category, a, first.box), SceneObject(second.category, b, second.box))
        return render(Scene(task.setting, items, 0), 64).image

    right = score_picture(Judge.load(), task, drawn(first.look, second.look))
    assert (right["regions"], right["category"], right["look"], right["leaked"], right["extras"]) == (2, 2, 2, 0, 0)
    assert right["setting"]
    exchanged = score_picture(Judge.load(), task, drawn(second.look, first.look))
    assert (exchanged["category"], exchanged["look"], exchanged["leaked"]) == (2, 0, 2)


def test_scores_see_a_wrong_second_colour_and_an_object_nobody_asked_for():
    task = next(
        task
        for task in draw_tasks("subjects 1", 50, 1, World())
        if task.targets[0].look.second_colour is not None and task.targets[0].box[0] > 0.4
    )
    (target,) = task.targets
    other = next(c for c in World().colours if c not in (target.look.colour, target.look.second_colour, "black"))

    def scores(look, *more):
        items = (SceneObject(target.category, look, target.box), *more)
        return score_picture(Judge.load(), task, render(Scene(task.setting, items, 0), 64).image)

    assert scores(target.look)["look"] == scores(target.look)["identity"] == 1
    wrong = scores(replace(target.look, second_colour=other))
    assert (wrong["category"], wrong["look"], wrong["identity"]) == (1, 0, 0)
    extra = scores(target.look, SceneObject("mug", Look("green", "plain"), (0.05, 0.4, 0.4, 0.9)))
    assert (extra["look"], extra["extras"]) == (1, 1)


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(
        cells=["described 2"],
        methods=["none", "cones2, recurrence 2", "multisubject, first steps twice"],
        num_pictures=2,
        num_inference_steps=3,
        guidance_scale=5.0,
        dtype="float32",
        batch_size=2,
        device="cpu",
        seed=1,
        results=tmp_path / "results.json",
        sheets=tmp_path / "sheets",
    )


def test_run_writes_results_sheets_and_table_and_goes_on_where_it_stopped(options, monkeypatch):
    steps, call = [], MultiSubjectPipeline.__call__

    def noted(self, *args, **kwargs):
        steps.append(kwargs["num_inference_steps"])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(MultiSubjectPipeline, "__call__", noted)
    results = run(options)
    assert json.loads(options.results.read_text()) == results
    assert len(list(options.sheets.glob("*.png"))) == 3
    calls = [found["unet_calls"] for found in results["cells"]["described 2"].values()]
    assert calls == [3, 6, 3]
    assert steps == [3, 3, 2]
    first = results["cells"]["described 2"]["none"]["pictures"]
    options.num_pictures, options.methods = 3, ["none"]
    more = run(options)["cells"]["described 2"]["none"]["pictures"]
    assert len(more) == 3
    assert more[:2] == first
    assert table(results).count("| described 2 |") == 3


def test_claims_and_plot_come_from_the_results(options, tmp_path):
    row = {"regions": 2, "category": 2, "look": 2, "identity": 0, "missing": 0, "leaked": 0, "extras": 0}
    right, wrong = ({**row, "look": look, "setting": True, "sharpness": 5.0} for look in (2, 1))

    def found(shown, of):
        return {"pictures": [right] * shown + [wrong] * (of - shown), "seconds": 1.0, "unet_calls": 25, "peak_mib": 1.0}

    cell = {OURS[0]: found(6, 10), "cones2": found(3, 10), "none": found(1, 10), "masked": found(4, 10)}
    cell |= {OURS[1]: found(9, 10), "cones2, first steps twice": found(5, 10)}
    first, second = claims({"cells": {"described 2": cell}}).splitlines()[-2:]
    assert first.startswith(
        "| described 2 | multisubject | 60% | 30% | × 2.00 | – | – | 40% (masked) | × 1.50 | +0.00 ("
    )
    assert second.startswith("| described 2 | multisubject, first steps twice | 90% | 30% | × 3.00 | – | – | 40% (")
    plot({"cells": {"described 2": cell, "twins 2": {OURS[0]: found(1, 2)}}}, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 500


def test_results_of_other_settings_are_not_mixed(options):
    options.results.write_text(json.dumps({"settings": {"seed": 1, "models": "old"}, "cells": {}}))
    assert load_results(options.results, {"seed": 1}, "--results")["cells"] == {}
    with pytest.raises(ValueError, match=r"other settings \(models\); choose another --results"):
        load_results(options.results, {"seed": 1, "models": "new"}, "--results")
    with pytest.raises(ValueError, match=r"\(models, seed"):
        run(argparse.Namespace(**{**vars(options), "seed": 2}))


def test_weights_have_a_digest(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "a.safetensors").write_bytes(b"1")
    (tmp_path / "judge.safetensors").write_bytes(b"2")
    before = digest_of_weights(tmp_path / "base", tmp_path / "judge.safetensors")
    (tmp_path / "base" / "README.md").write_text("says nothing about weights")
    assert digest_of_weights(tmp_path / "base", tmp_path / "judge.safetensors") == before
    (tmp_path / "judge.safetensors").write_bytes(b"3")
    assert digest_of_weights(tmp_path / "base", tmp_path / "judge.safetensors") != before


def test_every_named_method_is_measured():
    from multisubject.guidance_methods import GUIDANCE_METHODS

    assert {settings.get("guidance_method") for settings in METHODS.values()} >= set(GUIDANCE_METHODS)
