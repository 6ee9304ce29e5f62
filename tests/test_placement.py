import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multisubject.benchmarks import placement
from multisubject.benchmarks.bases import ROOT, DrawnBase
from multisubject.benchmarks.placement import (
    METHODS,
    OURS,
    SD_ALONE,
    claims,
    main,
    overview,
    plot,
    run,
    table,
)
from multisubject.benchmarks.placement_scores import RENDERED, rendered, score_picture
from multisubject.benchmarks.placement_tasks import CELLS, LORAS, draw_tasks, ellipse
from multisubject.benchmarks.results import (
    as_columns,
    as_rows,
    digest_of_weights,
    load_results,
    read_results,
    side_by_side,
)
from multisubject.pipeline_multisubject import MultiSubjectPipeline
from multisubject.tiny_world import EMBEDDED_BASE
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
        assert len(categories) == (1 if "twins" in cell else min(len(task.targets), len(World().categories)))
        assert "loras" not in cell or {target.subject for target in task.targets} <= {*LORAS}


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
    assert right["success"] == 2 and all(iou > 0.7 for iou in right["ious"])
    exchanged = score_picture(Judge.load(), task, drawn(second.look, first.look))
    assert (exchanged["category"], exchanged["look"], exchanged["leaked"]) == (2, 0, 2)


def test_success_needs_the_right_look_in_the_right_box():
    """An object that its region shows, but that stands beside its box or is of another colour, is none."""
    task = next(task for task in draw_tasks("described 1", 50, 1, World()) if task.targets[0].look.pattern == "plain")
    (target,) = task.targets
    xmin, ymin, xmax, ymax = target.box
    beside = replace(target, box=(xmin, ymin, xmin + 0.6 * (xmax - xmin), ymin + 0.6 * (ymax - ymin)))
    other = next(colour for colour in ("red", "blue") if colour != target.look.colour)
    exact, small, wrong = (
        score_picture(Judge.load(), task, rendered([replace(task, targets=(drawn,))], 64)[0])
        for drawn in (target, beside, replace(target, look=Look(other, "plain")))
    )
    assert (exact["look"], exact["success"]) == (1, 1)
    assert exact["ious"][0] > 0.8
    assert (small["look"], small["success"]) == (1, 0)
    assert small["ious"][0] == pytest.approx(0.36, abs=0.1)
    assert (wrong["look"], wrong["success"]) == (0, 0)
    assert wrong["ious"][0] > 0.8


def test_the_judge_finds_rendered_objects_where_they_are():
    tasks = draw_tasks("subjects 2", 20, 1, World())
    scores = [score_picture(Judge.load(), *pair) for pair in zip(tasks, rendered(tasks, 128), strict=True)]
    assert np.mean([iou for score in scores for iou in score["ious"]]) > 0.9


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
        base=EMBEDDED_BASE,
        embeddings=None,
        cells=["described 2"],
        methods=[RENDERED, "none", "cones2, recurrence 2", "multisubject, first steps twice"],
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
    assert read_results(options.results) == results
    assert len(list(options.sheets.glob("*.png"))) == 4
    calls = [found["unet_calls"] for found in results["cells"]["described 2"].values()]
    assert calls == [0, 3, 6, 3]
    assert steps == [3, 3, 2]
    first = results["cells"]["described 2"]["none"]["pictures"]
    options.num_pictures, options.methods = 3, ["none"]
    more = run(options)["cells"]["described 2"]["none"]["pictures"]
    assert len(more) == 3
    assert more[:2] == first
    assert table(results).count("| described 2 |") == 4


def test_claims_and_plot_come_from_the_results(options, tmp_path):
    row = {"regions": 2, "category": 2, "look": 2, "identity": 0, "missing": 0, "leaked": 0, "extras": 0}
    row |= {"setting": True, "sharpness": 5.0, "ious": [0.9, 0.6]}
    right, wrong = ({**row, "look": look, "success": look} for look in (2, 1))

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


def test_tables_lead_with_success():
    row = {"regions": 2, "category": 2, "look": 2, "identity": 0, "missing": 0, "leaked": 0, "extras": 0}
    row |= {"setting": True, "sharpness": 5.0}
    rows = [row | {"success": 2, "ious": [0.9, 0.6]}, row | {"success": 1, "ious": [0.8, 0.1]}]

    def found(*pictures):
        return {"pictures": [*pictures], "seconds": 1.0, "unet_calls": 25, "peak_mib": 1.0}

    header, _, line = table({"cells": {"described 2": {OURS[0]: found(*rows)}}}).split("\n")
    assert header.startswith(
        "| cell | method | pictures | success | 95 % interval | regions: success | mIoU | IoU ≥ 0.5 |"
    )
    assert line.startswith("| described 2 | multisubject | 2 | 50% | 0% to 100% | 75% | 0.60 | 75% | 50% | 100% |")
    measured = {"cells": {"described 2": {OURS[0]: found(rows[0]), "cones2": found(*rows)}}}
    assert claims(measured).splitlines()[-1].startswith("| described 2 | multisubject | 100% | 50% | × 2.00 |")
    assert "| success |" in claims(measured)
    measured["cells"]["twins 2"] = {"cones2": found(rows[1])}
    assert overview(measured).splitlines() == [
        "| success | described 2 | twins 2 |",
        "|---|---|---|",
        "| cones2 | 50% | 0% |",
        "| multisubject | 100% | – |",
    ]


def test_results_of_other_settings_are_not_mixed(options):
    options.results.write_text(
        json.dumps({"base": "tiny_world/base", "settings": {"seed": 1, "models": "old"}, "cells": {}})
    )
    assert load_results(options.results, "tiny_world/base", {"seed": 1}, "--results")["cells"] == {}
    with pytest.raises(ValueError, match=r"other settings \(models\); choose another --results"):
        load_results(options.results, "tiny_world/base", {"seed": 1, "models": "new"}, "--results")
    with pytest.raises(ValueError, match=r"\(models, seed"):
        run(argparse.Namespace(**{**vars(options), "seed": 2}))


def test_columns_say_what_rows_say():
    rows = [{"look": 2, "ious": [0.5, 0.25], "setting": 1}, {"look": 1, "ious": [0.5, 0.25], "setting": 1}]
    columns = {"count": 2, "look": [2, 1], "ious": [[0.5, 0.25], [0.5, 0.25]], "setting": 1}
    assert as_columns(rows) == columns and as_rows(columns) == rows
    assert as_rows(as_columns([])) == []


def test_results_of_other_bases_are_not_mixed(options):
    base = DrawnBase.read(EMBEDDED_BASE).name
    options.results.write_text(json.dumps({"base": base, "settings": {"seed": 1}, "cells": {}}))
    with pytest.raises(ValueError, match=r"is of tiny_world/base, not of tiny_world/base_xl; choose another --results"):
        load_results(options.results, "tiny_world/base_xl", {"seed": 1}, "--results")


def test_every_method_of_ours_runs_on_a_base_of_xl(options, xl_base_path, xl_embeddings, monkeypatch):
    monkeypatch.setattr(placement, "measure", lambda draw, *_: (draw(), (1.0, 1.0))[1])  # collects no garbage
    options.base, options.embeddings, options.methods = Path(xl_base_path), xl_embeddings, None
    options.cells, options.num_pictures, options.num_inference_steps = ["described 2", "subject twins 2"], 1, 3
    results = run(options)
    assert results["base"] == Path(xl_base_path).name
    for cell in options.cells:
        shown = {RENDERED, *(name for name in METHODS if "loras" not in METHODS[name])}
        assert set(results["cells"][cell]) == shown - set(SD_ALONE)
    calls = {method: found["unet_calls"] for method, found in results["cells"]["described 2"].items()}
    assert calls["none"] == calls["multisubject, first steps twice"] == 3
    assert calls["cones2, recurrence 2"] == 6
    options.methods = [*SD_ALONE]
    with pytest.raises(ValueError, match=r"'layout guidance'.* are for Stable Diffusion 1.x and 2.x; .* Diffusion XL"):
        run(options)


def test_loras_act_everywhere_or_in_regions_and_subjects_beside_them_are_off(options, monkeypatch):
    calls, call = [], MultiSubjectPipeline.__call__

    def noted(self, prompt, *args, **kwargs):
        layer = next(module for module in self.unet.modules() if hasattr(module, "lora_A"))
        loras = [] if layer.disable_adapters else sorted(layer.active_adapters)
        calls.append((prompt, kwargs["layout"], loras))
        return call(self, prompt, *args, **kwargs)

    monkeypatch.setattr(MultiSubjectPipeline, "__call__", noted)
    options.cells, options.num_pictures, options.batch_size = ["loras 2"], 3, 3
    options.methods = ["multisubject", "LoRAs everywhere", "a LoRA per region"]
    tasks = draw_tasks("loras 2", 3, 1, World())
    casts = {tuple(sorted(target.subject for target in task.targets)) for task in tasks}
    assert len(casts) > 1
    results = run(options)
    assert all(len(found["pictures"]) == 3 for found in results["cells"]["loras 2"].values())
    (subjects, *with_loras) = calls
    assert all("<" in prompt for prompt in subjects[0]) and not subjects[2]
    everywhere, in_regions = with_loras[: len(casts)], with_loras[len(casts) :]
    assert {tuple(active) for _, _, active in everywhere} == casts
    for prompts, layouts, active in in_regions:
        assert not any("<" in prompt for prompt in prompts)
        assert all(sorted(region["lora"] for region in layout) == active for layout in layouts)
    assert not any("lora" in region for _, layouts, _ in everywhere for layout in layouts for region in layout)


def test_loras_are_of_the_embedded_base(options, xl_base_path, xl_embeddings):
    options.base, options.embeddings, options.cells = Path(xl_base_path), xl_embeddings, ["loras 1"]
    with pytest.raises(ValueError, match=r"--cells: the LoRAs of .*loras are of .*base, not of "):
        run(options)


def test_pictures_are_of_the_base_that_is_named(options, base_128_path, monkeypatch):
    sizes = []

    def noted(judge, task, picture):
        sizes.append(picture.size)
        return score_picture(judge, task, picture)

    monkeypatch.setattr(placement, "score_picture", noted)
    options.base, options.methods, options.cells = Path(base_128_path), ["multisubject"], ["subjects 1"]
    run(options)
    assert sizes == [(128, 128)] * 2
    options.base = EMBEDDED_BASE
    with pytest.raises(ValueError, match=r"is of base, not of tiny_world/base; choose another --results"):
        run(options)


def test_subjects_are_those_of_the_architecture(xl_base_path, tmp_path, options):
    assert [DrawnBase.read(Path(base)).embeddings for base in (EMBEDDED_BASE, xl_base_path)] == [
        ROOT / "embeddings",
        ROOT / "embeddings" / "xl",
    ]
    assert DrawnBase.read(EMBEDDED_BASE, tmp_path).embeddings == tmp_path
    options.embeddings, options.cells = tmp_path, ["subjects 1"]
    with pytest.raises(ValueError, match=r"--embeddings: .* has no petrucci.safetensors, slash.safetensors, "):
        run(options)
    options.base, options.embeddings = Path(xl_base_path), ROOT / "embeddings"
    with pytest.raises(ValueError, match=r"has deltas for \['text_encoder'\]"):
        run(options)


def test_a_base_that_is_none_is_one_line(tmp_path, capsys):
    for folder, words in ((tmp_path / "none", "is no folder; expected one of a base"), (tmp_path, "unet/config.json")):
        assert main(["--base", str(folder), "--results", str(tmp_path / "results.json")]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.startswith("error: ") and error.count("\n") == 1


def test_results_of_two_bases_stand_in_one_table(tmp_path, capsys):
    picture = {"regions": 1, "category": 1, "look": 1, "identity": 0, "missing": 0, "leaked": 0, "extras": 0}
    picture |= {"setting": True, "sharpness": 5.0, "success": 1, "ious": [0.9]}
    found = {"pictures": [picture], "seconds": 1.0, "unet_calls": 25, "peak_mib": 1.0}
    cells = {"described 1": {"none": found, OURS[0]: found}, "twins 2": {"none": found}}
    results = {"base": "tiny_world/base", "settings": {}, "cells": cells}
    files = [tmp_path / "sd.json", tmp_path / "xl.json"]
    files[0].write_text(json.dumps(results))
    files[1].write_text(json.dumps(results | {"base": "tiny_world/base_xl"}))
    assert main(["--table", "--results", *map(str, files)]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    lines = [line for line in tables[0].splitlines() if not line.startswith("|---")]
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| base", "cell", "method"],
        ["| tiny_world/base", "described 1", "none"],
        ["| tiny_world/base_xl", "described 1", "none"],
        ["| tiny_world/base", "described 1", OURS[0]],
        ["| tiny_world/base_xl", "described 1", OURS[0]],
        ["| tiny_world/base", "twins 2", "none"],
        ["| tiny_world/base_xl", "twins 2", "none"],
    ]
    assert len({line.count("|") for line in tables[0].splitlines()}) == 1
    assert tables[1].startswith("| base | cell | ours |")
    assert main(["--table", "--results", str(files[0])]) == 0
    assert capsys.readouterr().out.startswith("| success | described 1 | twins 2 |")
    with pytest.raises(SystemExit):
        main(["--table", "--results", str(files[0]), str(files[0])])
    assert "2 files of tiny_world/base; expected one of each base" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--results", *map(str, files)])
    assert "--results: 2 files; expected one" in capsys.readouterr().err


def test_one_table_stays_as_it_is():
    assert side_by_side({"tiny_world/base": "| a |\n|---|\n| 1 |"}) == "| a |\n|---|\n| 1 |"


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
