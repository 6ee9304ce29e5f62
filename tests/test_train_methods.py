"""The comparison of training methods: fair prompts, whole results, and a verdict that says what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import EMBED_DIM, EMBED_DIM_2
from PIL import Image

import multisubject.benchmarks.train_methods as benchmark
from multisubject.benchmarks.train_methods import (
    Asked,
    Run,
    Summary,
    draw_prompts,
    main,
    parse_rate,
    report_sd21,
    score_pictures,
    summarise,
    tables,
    verdict,
)
from multisubject.tiny_world import picture_size
from multisubject.tiny_world.judge import Judge
from multisubject.tiny_world.scenes import Look, Scene, SceneObject, World, is_visible, render
from multisubject.tiny_world.subjects import SUBJECTS, subject_object
from multisubject.training.concepts import TEMPLATES
from multisubject.training.config import LEARNING_RATES


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=lambda subject: subject.name)
def test_prompts_are_none_of_training_and_do_not_depend_on_their_number(subject: Any) -> None:
    asked = draw_prompts(subject, World(), 40, 0)
    assert draw_prompts(subject, World(), 12, 0) == asked[:12]
    assert not {item.prompt for item in asked} & set(TEMPLATES)
    assert sum(item.category is not None for item in asked) == 20
    for item in asked:
        assert item.prompt.count("{}") == 1
        assert item.prompt.endswith(item.setting)
        assert is_visible(subject.look.colour, item.setting)
        assert item.category != subject.category
        assert item.category is None or f"{item.colour} {item.category}" in item.prompt
    settings = {item.setting for item in asked if item.category} & {item.setting for item in asked if not item.category}
    assert settings == {item.setting for item in asked}


def test_judge_counts_subject_setting_and_the_other_object() -> None:
    subject = SUBJECTS["comet"]
    other = SceneObject("dog", Look("red"), (0.55, 0.4, 0.95, 0.8))
    ours = subject_object(subject, (0.05, 0.4, 0.45, 0.8))
    both = render(Scene("on the grass", (ours, other)), 64).image
    alone = render(Scene("on the grass", (ours,)), 64).image
    asked = [
        Asked("a {} and a red dog", "on the grass", "dog", "red"),
        Asked("a {} and a blue dog", "at night", "dog", "blue"),
        Asked("a {} and a red dog", "on the grass", "dog", "red"),
        Asked("a {}", "on the grass", None, None),
    ]
    assert score_pictures(Judge.load(), subject, asked, [both, both, alone, alone]) == [
        {"identity": True, "setting": True, "object": True, "colour": True},
        {"identity": True, "setting": False, "object": True, "colour": False},
        {"identity": True, "setting": True, "object": False, "colour": False},
        {"identity": True, "setting": True},
    ]


def summary(identity: float = 1.0, setting: float = 0.9, seconds: float = 10.0, peak: float = 1e9) -> Summary:
    by_subject = dict.fromkeys(SUBJECTS, identity)
    return Summary(identity, identity, by_subject, setting, 0.8, 0.7, seconds, seconds, peak)


RUNS = [Run("residual", 150), Run("text_encoder", 150), Run("text_encoder", 750)]


@pytest.mark.parametrize(
    ("long_run", "holds", "words"),
    [
        (summary(1.0, seconds=60), True, "identity of 100.0%: residual in 10 s .*text_encoder in 60 s .*6.0 times"),
        (summary(1.0, seconds=40), False, "4.0 times"),
        # It never gets there: its own best is the mark.
        (summary(0.7, seconds=60), True, "identity of 70.0%: .*text_encoder in 60 s"),
        # Its short run is as good as its long one.
        (summary(0.5, seconds=60), False, "identity of 50.0%: .*text_encoder in 12 s"),
    ],
)
def test_time_is_compared_at_the_identity_that_both_reach(long_run: Summary, holds: bool, words: str) -> None:
    summaries = {"base": summary(0.0), "residual:150": summary(), "text_encoder:750": long_run}
    summaries["text_encoder:150"] = summary(0.5, seconds=12)
    (*_, (answer, sentence)) = verdict(summaries, RUNS)
    assert answer is holds
    assert re.search(words, sentence)


def test_what_was_not_kept_is_said() -> None:
    summaries = {"base": summary(0.0), "residual:150": summary(0.8, setting=0.8)}
    answers = verdict(summaries, RUNS[:1])
    assert [holds for holds, _ in answers] == [False, False, True, True]
    assert answers[0][1].startswith("0 of 8 subjects")
    assert "settings come 10.0 points less often" in answers[1][1]


def test_tables_hold_every_run_and_subject() -> None:
    pictures = [
        {"identity": True, "setting": True},
        {"identity": False, "setting": True, "object": True, "colour": False},
    ]
    cost = {"seconds": 3.0, "cpu_seconds": 2.0, "peak_bytes": 1.5e9}
    cells = {"comet": {"pictures": pictures, "cost": cost}}
    plain = {"comet": {"pictures": pictures}}
    text = tables("tiny_world/base", {"base": summarise(plain, ["comet"]), "lora:9": summarise(cells, ["comet"])})
    assert text.startswith("| method, tiny_world/base | recognised alone |")
    assert "| base | 100.0% | 1 of 1 | 0.0% | 100.0% | 100.0% | 0.0% | – | – | – |" in text
    assert "| lora:9 | 100.0% | 1 of 1 | 0.0% | 100.0% | 100.0% | 0.0% | 3 | 2 | 1.50 GB |" in text
    assert "| comet | 100% | 100% |" in text


def test_memory_and_steps_are_reported_with_what_is_saved() -> None:
    cpu = {"gpu_peak_bytes": None, "step_seconds": None}
    costs = {"residual": {"peak_bytes": 6e9, **cpu}, "text_encoder": {"peak_bytes": 11e9, **cpu}}
    text, ((holds, sentence),) = report_sd21(costs, ["residual", "text_encoder"])
    assert "| residual | 6.00 GB | – | – |" in text
    assert holds
    assert "5.00 GB less" in sentence
    for cost, peak in zip(costs.values(), (3e9, 4e9), strict=True):
        cost.update(gpu_peak_bytes=peak, step_seconds=0.25)
    text, ((holds, sentence),) = report_sd21(costs, ["residual", "text_encoder"])
    assert "| residual | 6.00 GB | 3.00 GB | 0.250 |" in text
    assert not holds  # of the GPU's memory
    assert "1.00 GB less" in sentence


def test_rates_are_the_trainers_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(benchmark, "run", lambda options: seen.append(options) or 0)
    assert main(["--learning_rates", "text_encoder=3e-4", "--output_dir", str(tmp_path)]) == 0
    assert seen[0].learning_rates == {**LEARNING_RATES, "text_encoder": 3e-4}
    for wrong in ("text_encoder", "magic=1", "lora=-1"):
        with pytest.raises(Exception, match="expected method=rate"):
            parse_rate(wrong)


@pytest.mark.parametrize(
    ("base", "size", "widths"),
    [
        ("base_path", None, {"text_encoder": None}),
        ("base_128_path", 128, {"text_encoder": None}),
        ("xl_base_path", 32, {"text_encoder": EMBED_DIM, "text_encoder_2": EMBED_DIM_2}),
    ],
)
def test_run_goes_on_where_it_stopped(
    base: str,
    size: int | None,
    widths: dict[str, int | None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Any,
    request: pytest.FixtureRequest,
) -> None:
    """On bases of both architectures: an untrained subject, of as many deltas as the base has encoders."""
    folder = Path(request.getfixturevalue(base))
    size = size or picture_size(folder)
    trainings, fail = [], [True]

    def pretend(script: str, flags: list[str], log: Path) -> dict[str, float]:
        from multisubject.hub_utils import save_subject
        from multisubject.residual_embeddings import ResidualEmbedding

        values = dict(flag[2:].split("=", 1) for flag in flags if "=" in flag)
        if values["method"] == "text_encoder" and fail:
            raise RuntimeError("out of memory")
        assert values["pretrained_model_name_or_path"] == str(folder)
        assert Image.open(Path(values["instance_data_dir"]) / "0.png").size == (size, size)
        trainings.append((values["method"], values["learning_rate"]))
        deltas = {encoder: benchmark.torch.zeros(1, width or own_width) for encoder, width in widths.items()}
        save_subject(ResidualEmbedding("ball", deltas), Path(values["output_dir"]) / f"{values['name']}.safetensors")
        return {"seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 1e9}

    own_width = json.loads((folder / "text_encoder" / "config.json").read_text())["hidden_size"]
    monkeypatch.setattr(benchmark, "in_process_of_its_own", pretend)
    arguments = ["--parts", "embedded", "--subjects", "comet", "--num_pictures", "2", "--num_inference_steps", "1"]
    arguments += ["--encoder_steps", "--output_dir", str(tmp_path), "--base", str(folder)]
    assert main(arguments) == 1
    assert "out of memory" in capsys.readouterr().err
    fail.clear()
    main(arguments)
    assert trainings == [("residual", "0.05"), ("lora", "0.001"), ("text_encoder", "0.0001")]
    assert "| text_encoder:150 |" in capsys.readouterr().out
    assert (tmp_path / "sheets" / "comet.png").exists()
    results = json.loads((tmp_path / "results.json").read_text())
    assert {len(cells["comet"]["pictures"]) for cells in results["cells"].values()} == {2}
    # An untrained subject is the plain class.
    assert results["cells"]["residual:150"]["comet"]["pictures"] == results["cells"]["base"]["comet"]["pictures"]
    assert Image.open(tmp_path / "pictures" / "base" / "comet" / "0.png").size == (size, size)


def test_results_of_another_base_are_not_gone_on_with(tmp_path: Path, base_128_path: str, capsys: Any) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"base": "tiny_world/base", "settings": {}, "cells": {}}))
    assert main(["--base", base_128_path, "--output_dir", str(tmp_path)]) == 1
    assert "is of tiny_world/base, not of base; choose another --output_dir." in capsys.readouterr().err
