"""The figures of a base: what is counted, on which pictures, and that they name their base."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from multisubject.benchmarks import base_quality
from multisubject.benchmarks.base_quality import Options, main, residual_of, score_reconstructions, score_subjects
from multisubject.benchmarks.bases import DrawnBase
from multisubject.tiny_world.judge import Judge
from multisubject.tiny_world.scenes import World, random_scene, render
from multisubject.tiny_world.subjects import SUBJECTS, subject_pictures

ENCODERS = ["text_encoder", "text_encoder_2"]
ALONE = [f"… with the residual of `{encoder}` alone" for encoder in ENCODERS]
OPTIONS = Options(
    num_prompts=1, steps=1, guidance_scale=5.0, scheduler=None, batch_size=3, seed=0, subjects=("comet", "pepper"),
    num_pictures=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


@pytest.fixture
def xl(xl_base_path: str, xl_embeddings: Path) -> Any:
    return DrawnBase.read(Path(xl_base_path), xl_embeddings).load(OPTIONS.subjects)


def run(arguments: list[str], path: Path) -> dict[str, Any]:
    """What `main` writes of a short run."""
    short = ["--num_prompts", "3", "--steps", "1", "--no_timing", "--json", str(path)]
    assert main([*short, *arguments]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("base", ["base_128_path", "xl_base_path"])
def test_figures_name_their_base_and_do_not_depend_on_the_batch(
    base: str, request: pytest.FixtureRequest, xl_embeddings: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = Path(request.getfixturevalue(base))
    is_xl = base == "xl_base_path"
    arguments = ["--base", str(folder), "--subjects", "comet", "pepper", "--num_pictures", "2"]
    arguments += ["--embeddings", str(xl_embeddings)] if is_xl else []
    first = run([*arguments, "--sheets", str(tmp_path / "sheets")], tmp_path / "first.json")
    assert f"| measure, {folder.name} | result |" in capsys.readouterr().out
    assert first["base"] == folder.name
    again = run([*arguments, "--batch_size", "2"], tmp_path / "again.json")
    assert again["scores"] == first["scores"]
    rows = {name: score["total"] for name, score in first["scores"].items()}
    for kind in ("rendered", "reconstructed"):
        assert {f"{kind} scenes: {what}" for what in ("category", "colour", "pattern", "second colour")} < set(rows)
    assert rows["one object: category"] == rows["two described: both categories present"] == 3
    assert rows["subjects recognised alone"] == 4
    assert rows["subject comet recognised alone"] == rows["subject pepper recognised alone"] == 2
    assert [name for name in rows if name.startswith("…")] == (ALONE if is_xl else [])
    assert len(list((tmp_path / "sheets").glob("*.png"))) == 4


def test_subjects_are_drawn_only_where_they_are_asked_for(
    base_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loaded subject answers to its class phrase, and the base's own rows are the plain words'."""
    drawn: dict[str, list[bytes]] = {}

    def noted(
        pipe: Any, prompts: Any, options: Any, label: str, seeds: Any = None, draw: Any = base_quality.sample
    ) -> Any:
        images = draw(pipe, prompts, options, label, seeds)
        drawn[label] = [image.tobytes() for image in images]
        return images

    monkeypatch.setattr(base_quality, "sample", noted)
    alone = run([], tmp_path / "alone.json")
    plain = dict(drawn)
    run(["--subjects", "--num_pictures", "1"], tmp_path / "with.json")
    assert {label: drawn[label] for label in plain} == plain
    assert len(drawn["subjects"]) == 8
    assert not [name for name in alone["scores"] if "subject" in name]


def test_recognised_means_named_by_the_judge(judge: Judge, xl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures as they would be if the first encoder's residual alone made no difference, and the second's did."""
    residuals: dict[str, list[bool]] = {}

    def drawn(pipe: Any, prompts: Any, options: Any, label: str, seeds: Any = None) -> Any:
        assert list(seeds) == [0, 1, 0, 1]
        assert prompts == ["a photo of a <comet>"] * 2 + ["a photo of a <pepper>"] * 2
        residuals[label] = [bool(pipe.subjects["comet"].deltas[encoder].any()) for encoder in ENCODERS]
        right = {name: subject_pictures(SUBJECTS[name], World(), count=2) for name in OPTIONS.subjects}
        if label == "text_encoder":
            right = {name: subject_pictures(SUBJECTS["slash"], World(), count=2) for name in OPTIONS.subjects}
        if label == "subjects":
            right["pepper"][1] = right["comet"][1]
        return [*right["comet"], *right["pepper"]]

    monkeypatch.setattr(base_quality, "sample", drawn)
    scores, pictures = score_subjects(judge, xl, OPTIONS)
    assert {score.name: (score.successes, score.total) for score in scores} == {
        "subjects recognised alone": (3, 4),
        ALONE[0]: (0, 4),
        ALONE[1]: (4, 4),
        "subject comet recognised alone": (2, 2),
        "subject pepper recognised alone": (1, 2),
    }
    assert len(pictures) == 4
    assert residuals == {"subjects": [True, True], ENCODERS[0]: [True, False], ENCODERS[1]: [False, True]}


def test_residual_of_one_encoder_changes_its_own_columns_and_is_taken_back(xl: Any) -> None:
    def columns() -> list[torch.Tensor]:
        embeds = xl.encode_prompt("a photo of a <comet>")[0]
        return list(embeds.split([slot.width for slot in xl.encoder_slots], dim=-1))

    xl.set_subjects([])
    plain = columns()

    def moved() -> list[bool]:
        return [not part.equal(other) for part, other in zip(columns(), plain, strict=True)]

    xl.set_subjects(["comet"])
    assert moved() == [True, True]
    before = dict(xl.subjects)
    with residual_of(xl, ENCODERS[1]):
        assert moved() == [False, True]
    with pytest.raises(KeyboardInterrupt), residual_of(xl, ENCODERS[0]):
        raise KeyboardInterrupt
    assert all(xl.subjects[name] is subject for name, subject in before.items())


def test_scenes_are_scored_by_every_attribute(judge: Judge) -> None:
    """Of a world of larger pictures: what was rendered, and the same with every object painted anew."""
    rng = random.Random(2)
    scenes = [random_scene(rng, World()) for _ in range(30)]
    painted = [
        replace(scene, objects=tuple(replace(o, look=replace(o.look, colour="purple")) for o in scene.objects))
        for scene in scenes
    ]
    originals, decoded = ([render(scene, 128).image for scene in some] for some in (scenes, painted))
    scores = {score.name: score for score in score_reconstructions(judge, scenes, originals, decoded)}
    objects = [o for scene in scenes for o in scene.objects]
    assert scores["rendered scenes: category"].total == scores["rendered scenes: colour"].total == len(objects)
    assert scores["rendered scenes: second colour"].total == sum(o.look.pattern != "plain" for o in objects)
    assert all(score.share > 0.9 for name, score in scores.items() if name.startswith("rendered"))
    assert scores["reconstructed scenes: category"].share > 0.9
    assert scores["reconstructed scenes: colour"].share < 0.3


def test_what_cannot_be_measured_is_one_line(tmp_path: Path, xl_base_path: str, capsys: Any) -> None:
    for arguments, words in (
        (["--base", str(tmp_path / "none")], "--base: "),
        (["--base", xl_base_path, "--subjects", "--embeddings", str(tmp_path)], "has no petrucci.safetensors"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["--num_pictures", "0"])
    assert "--num_prompts, --num_pictures and --batch_size: expected at least 1" in capsys.readouterr().err
