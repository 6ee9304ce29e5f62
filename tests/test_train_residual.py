"""The trainer, run for a few steps on tiny models: what it learns, what it leaves, and how it stops and goes on."""

from __future__ import annotations

import copy
import csv
import errno
import functools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import assert_equal_up_to_rounding
from PIL import Image
from safetensors import SafetensorError

import multisubject.train_residual as trainer
from multisubject.hub_utils import load_subject, save_subject
from multisubject.pictures import picture_digests
from multisubject.tests.two_processes import run_in_two_processes
from multisubject.tiny_world import EMBEDDED_BASE, EMBEDDED_BASE_XL
from multisubject.tiny_world.subjects import SUBJECTS
from multisubject.train_residual import main, train
from multisubject.training import devices, loop, results, run_lock
from multisubject.training import models as loading
from multisubject.training.checkpoints import checkpoints, latest_checkpoint
from multisubject.training.concepts import (
    CLASS_STEPS,
    Concept,
    Prompts,
    TrainingPicture,
    View,
    build_prompts,
    encode_picture,
)
from multisubject.training.config import TrainConfig, parse_config, read_concepts
from multisubject.training.learners import ResidualLearner, TextEncoderLearner, make_learner
from multisubject.training.loop import learning_rate_factor, make_optimizer
from multisubject.training.loss import Sample, compute_loss, denoising_loss, draw_batch, draw_sample
from multisubject.training.models import base_model_name, load_encoders, load_unet
from multisubject.training.pictures import Picture
from multisubject.training.progress import ProgressBar
from multisubject.training.run_lock import LOCK_FILE, locked
from multisubject.training.stopping import ECHO_SECONDS, StopRequest

METHODS = ("residual", "text_encoder", "lora")


@pytest.fixture(scope="session")
def tiny_base(tiny_components: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`sd1`, `sd2` and `xl` -> folder with a tiny base of random weights."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    folders = {}
    for kind, components in tiny_components.items():
        folder = tmp_path_factory.mktemp(kind)
        # These runs need fewer layers of attention than the pipelines' tests.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = UNet2DConditionModel.from_config(
                components["unet"].config,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
            )
        parts = {**components, "unet": unet, "image_encoder": None}
        if kind == "xl":
            StableDiffusionXLPipeline(**parts, add_watermarker=False).save_pretrained(folder)
        else:
            StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
        folders[kind] = str(folder)
    return folders


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, one of them wide."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(((32, 32), (32, 64), (40, 40))):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(folder / f"{number}.png")
    return folder


def short_run(base: str, pictures: Path, output: Path) -> TrainConfig:
    """Four steps, with a checkpoint after every second one."""
    return TrainConfig(
        pretrained_model_name_or_path=base,
        instance_data_dir=str(pictures),
        instance_prompt="person",
        output_dir=str(output),
        max_train_steps=4,
        train_batch_size=2,
        checkpointing_steps=2,
        checkpoints_total_limit=0,
        validation_prompts=["a photo of a {}"],
        validation_inference_steps=1,
    )


@pytest.fixture
def kind() -> str:
    """The base's architecture; a test over both names it."""
    return "sd2"


both_architectures = pytest.mark.parametrize("kind", ["sd2", "xl"])


@pytest.fixture
def config(tiny_base: dict[str, str], kind: str, pictures: Path, tmp_path: Path) -> TrainConfig:
    return short_run(tiny_base[kind], pictures, tmp_path / "petrucci")


@pytest.fixture(scope="module", autouse=True)
def models_loaded_once() -> Iterator[None]:
    """Runs of this file that ask for the same models share them; a text encoder may be tuned, so each has its own."""
    bases: dict[Any, Any] = {}
    unets: dict[Any, Any] = {}

    def shared_encoders(flags: TrainConfig, accelerator: Any) -> Any:
        key = (
            flags.pretrained_model_name_or_path,
            flags.pretrained_vae_model_name_or_path,
            accelerator.mixed_precision,
        )
        if key not in bases:
            bases[key] = load_encoders(flags, accelerator)
        return replace(bases[key], text_encoders=copy.deepcopy(bases[key].text_encoders))

    def shared_unet(flags: TrainConfig, models: Any) -> Any:
        key = (flags.pretrained_model_name_or_path, flags.gradient_checkpointing, models.dtype)
        if key not in unets:
            unets[key] = load_unet(flags, models)
        return unets[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_encoders", shared_encoders)
        patch.setattr(loading, "load_unet", shared_unet)
        yield


@pytest.fixture(scope="module")
def finished_runs(
    tiny_base: dict[str, str], pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, torch.Tensor]]:
    """Method, architecture -> the folder of `config`'s run with them, and what it has learnt; trained once."""

    @functools.cache
    def run(method: str, kind: str = "sd2") -> tuple[Path, torch.Tensor]:
        output = tmp_path_factory.mktemp(f"finished-{method}-{kind}") / "petrucci"
        return output, learn(replace(short_run(tiny_base[kind], pictures, output), method=method))

    return run


@pytest.fixture
def whole(finished_runs: Callable[..., tuple[Path, torch.Tensor]]) -> torch.Tensor:
    """What `config` learns."""
    return finished_runs("residual")[1]


@pytest.fixture
def finished(config: TrainConfig, finished_runs: Callable[..., tuple[Path, torch.Tensor]]) -> TrainConfig:
    """`config`, whose output folder already holds its finished run."""
    shutil.copytree(finished_runs("residual")[0], config.output_dir)
    return config


@pytest.fixture(autouse=True)
def no_side_shows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting garbage after each run and drawing its curve take longer than these runs; one test draws."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    if request.node.name != "test_a_run_leaves_everything_that_was_promised[sd2]":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture(autouse=True)
def signals_restored() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def as_flags(config: TrainConfig) -> list[str]:
    default = TrainConfig()
    flags: list[str] = []
    for key, value in vars(config).items():
        if value != getattr(default, key):
            flags += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return flags


def learn(config: TrainConfig) -> torch.Tensor:
    """What a run learns, the deltas of two text encoders side by side."""
    (subject,) = train(config).values()
    return torch.cat([*subject.deltas.values()], dim=-1)


# --- configuration ---------------------------------------------------------------------------------------------------


def test_seed_command_line_is_understood() -> None:
    config = parse_config(
        [
            "--pretrained_model_name_or_path=stabilityai/stable-diffusion-2-1",
            "--instance_data_dir=./data/petrucci",
            "--instance_prompt=person",
            "--token_num=1",
            "--output_dir=./output/petrucci",
            "--resolution=768",
            "--train_batch_size=1",
            "--max_train_steps=4000",
        ]
    )
    assert (config.instance_prompt, config.token_num, config.resolution, config.train_batch_size) == (
        "person",
        1,
        768,
        1,
    )
    assert config.max_train_steps == 4000
    assert config.subject_name == "petrucci"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("learning_rate: 1e-3\nseed: 7\nrandom_flip: true\nuse_masks: false\ntemplates: ['my {}', '{}']\n")
    config = parse_config(["--config", str(file), "--seed", "8"])
    assert (config.learning_rate, config.seed, config.random_flip, config.use_masks) == (1e-3, 8, True, False)
    assert config.templates == ["my {}", "{}"]


def test_what_comments_suggest_for_smaller_gpus_are_flags(tmp_path: Path) -> None:
    shipped = Path(trainer.__file__).parent / "configs" / "train_sdxl.yaml"
    lines = shipped.read_text(encoding="utf-8").splitlines()
    suggested = [line[1:].strip() for line in lines if re.match(r"#   \w+: ", line)]
    assert len(suggested) == 4
    (tmp_path / "small.yaml").write_text("\n".join(suggested))
    small, large = (parse_config(["--config", str(path)]) for path in (tmp_path / "small.yaml", shipped))
    assert (small.mixed_precision, large.mixed_precision, large.method) == ("fp16", "bf16", "residual")
    batches = [config.train_batch_size * config.gradient_accumulation_steps for config in (small, large)]
    assert batches == [4, 4]


def test_shipped_configurations_are_valid() -> None:
    folder = Path(trainer.__file__).parent / "configs"
    for path in folder.glob("train_*.yaml"):
        parse_config(["--config", str(path)])
    concepts = read_concepts(TrainConfig(concepts_list=str(folder / "train_tiny_world_subjects.json")))
    assert {concept.name: concept.instance_prompt for concept in concepts} == {
        subject.name: subject.category for subject in SUBJECTS.values()
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1", "learning_rat"),
        ("seed: many", "seed"),
        ("method: magic", "magic"),
        ("- a", "list"),
        ("a: [", "YAML"),
    ],
)
def test_bad_config_files_are_refused(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        parse_config(["--config", str(file)])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--learning_rat=1"], ["--config=nowhere.yaml"], ["--max_train_steps=0"]])
def test_bad_command_lines_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(arguments)
    assert arguments[0].split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": float("nan")}, "--learning_rate: nan"),
        ({"train_batch_size": -1}, "--train_batch_size: -1"),
        ({"templates": ["a photo"]}, "--templates: 'a photo'"),
        ({"with_prior_preservation": True, "class_data_dir": "x"}, "--method residual leaves the base untouched"),
        ({"with_prior_preservation": True, "method": "lora"}, "--class_data_dir"),
        ({"concepts_list": "a.json", "resume_from_checkpoint": "x/checkpoint-2"}, "expected `latest`"),
        ({"adam_beta1": 1.5}, "--adam_beta1: 1.5"),
        ({"adam_beta2": -0.1}, "--adam_beta2: -0.1"),
        ({"adam_epsilon": 0.0}, "--adam_epsilon: 0.0"),
        ({"validation_guidance_scale": float("nan")}, "--validation_guidance_scale: nan"),
        ({"seed": 2**64}, f"--seed: {2**64}; expected at most"),
        ({"lr_warmup_steps": 5, "max_train_steps": 5}, r"--lr_warmup_steps: 5; expected fewer .* \(5\)"),
        ({"hub_model_id": "my user/my dog"}, "--hub_model_id: 'my user/my dog'"),
    ],
)
def test_contradictions_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(**values)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"name": "a"}, "expected a list"),
        ([{"nam": "a"}], "entry 1: unknown keys \\['nam'\\]"),
        ([{"name": "a"}, {"name": "a"}], "'a'"),
        ([{}], "neither name nor instance_data_dir"),
        ([{"name": "a"}, {"name": "b", "max_train_steps": "many"}], "entry 2: .*max_train_steps.*many"),
        ([{"name": "a", "max_train_steps": 0}], "entry 1: --max_train_steps: 0"),
        ([{"name": "../a"}], "--name .*'../a'"),
        ([{"name": "a", "instance_data_dir": "output/a"}], "--output_dir: .* is --instance_data_dir as well"),
    ],
)
def test_bad_lists_of_subjects_are_refused(tmp_path: Path, entries: Any, words: str) -> None:
    file = tmp_path / "concepts.json"
    file.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=words):
        read_concepts(TrainConfig(concepts_list=str(file)))


def test_yaml_says_no_and_null_as_people_mean_it(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("mixed_precision: no\nname: null\n")
    assert parse_config(["--config", str(tmp_path / "train.yaml")]).mixed_precision == "no"
    entry = {"name": "a", "max_train_steps": None, "learning_rate": None}
    (tmp_path / "concepts.json").write_text(json.dumps([entry]))
    config = TrainConfig(concepts_list=str(tmp_path / "concepts.json"), max_train_steps=2, learning_rate=0.123)
    (concept,) = read_concepts(config)
    assert (concept.max_train_steps, concept.learning_rate) == (2, 0.123)


def test_files_that_are_not_utf8_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: café".encode("latin-1"))
    with pytest.raises(SystemExit):
        parse_config(["--config", str(tmp_path / "latin.yaml")])
    assert "--config" in (error := capsys.readouterr().err) and "latin.yaml" in error
    with pytest.raises(ValueError, match=r"--concepts_list: .*latin.yaml"):
        read_concepts(TrainConfig(concepts_list=str(tmp_path / "latin.yaml")))


PIPED_RUNS = """
import json, sys
from multisubject.train_residual import main

for name, *flags in json.loads(sys.argv[1]):
    try:
        end = main(flags)
    except SystemExit as stopped:
        end = stopped.code
    heavy = sorted({"torch", "diffusers", "accelerate", "peft"} & sys.modules.keys())
    print(json.dumps([name, end, heavy if name != "sound" else []]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def piped(tiny_base: dict[str, str], pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[bytes]]:
    """What a process writes whose output goes into pipes: lines of stderr of each of its runs, and how that ended."""
    folder = tmp_path_factory.mktemp("piped")
    for name, text in {"key": "learning_rat: 1", "yaml": "a: [", "value": "seed: x", "list": "[{nam: a}]"}.items():
        (folder / f"{name}.yaml").write_text(text)
    sound = as_flags(replace(short_run(tiny_base["sd2"], pictures, folder / "ada"), max_train_steps=20))
    runs = [
        ["help", "--help"],
        ["flag", "--learning_rat=1"],
        *([name, "--config", f"{name}.yaml"] for name in ("key", "yaml", "value")),
        ["range", "--max_train_steps=0"],
        ["list", "--concepts_list", "list.yaml"],
        ["name", "--output_dir", "my dog"],
        ["folder", "--instance_prompt=person", "--instance_data_dir=nowhere"],
        ["no folder", "--instance_prompt=person"],
        ["phrase", f"--instance_data_dir={pictures}", "--instance_prompt=a photo of a dog"],
        ["sound", *sound],
    ]
    result = subprocess.run([sys.executable, "-c", PIPED_RUNS, json.dumps(runs)], cwd=folder, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    assert not list(folder.glob("output*"))
    ended, lines = [], []
    for line in result.stderr.split(b"\n")[:-1]:
        if line.startswith(b'["'):
            ended.append([*json.loads(line), lines])
            lines = []
        else:
            lines.append(line)
    assert [name for name, *_ in ended] == [name for name, *_ in runs]
    return ended


def test_mistakes_in_the_configuration_are_named_before_anything_slow_is_imported(piped: list[list[Any]]) -> None:
    *refused, _ = piped
    for name, end, heavy, lines in refused:
        assert heavy == [], name
        assert end == {"help": 0, "list": 1, "name": 1, "folder": 1, "no folder": 1, "phrase": 1}.get(name, 2), name
        assert name == "help" or b"error: " in b" ".join(lines), lines


def test_a_run_into_a_pipe_writes_a_few_plain_lines(piped: list[list[Any]]) -> None:
    name, end, _, lines = piped[-1]
    assert (name, end) == ("sound", 0)
    steps = [line for line in lines if b" step " in line]
    assert [line.partition(b",")[0] for line in steps] == [b"ada: step %d/20" % step for step in range(2, 21, 2)]
    assert all(re.fullmatch(rb"ada: step \d+/20, loss \d+\.\d{4}", line) for line in steps)
    rest = [line for line in lines if line not in steps]
    assert [line for line in rest if not line.startswith(b"ada: ")] == [], "what helps nobody"
    assert not re.search(rb"[\r\x1b]", b"".join(lines))


@pytest.mark.parametrize(
    ("total", "done", "told"),
    [(300, 0, [*range(30, 301, 30)]), (300, 285, [300]), (4, 0, [1, 2, 3, 4]), (25, 19, [20, 23, 25])],
)
def test_progress_is_told_at_every_tenth_where_there_is_no_terminal(
    total: int, done: int, told: list[int], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "multisubject.training")
    for silent in (False, True):
        with ProgressBar("ada", total, "step", done=done, silent=silent) as bar:
            for _ in range(total - done):
                bar.advance(loss="0.5")
    assert caplog.messages == [f"ada: step {step}/{total}, loss 0.5" for step in told]
    assert "\r" not in capsys.readouterr().err


def test_progress_is_a_bar_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "multisubject.training")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressBar("ada", 2, "step", done=1) as bar:
        bar.advance(loss="0.5")
    assert re.search(r"\rada: 100%.* 2/2 .*loss=0\.5", capsys.readouterr().err)
    assert not caplog.messages


@pytest.mark.parametrize("is_terminal", [False, True])
def test_loading_shows_bars_in_a_terminal_alone(
    is_terminal: bool, tiny_base: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    load(tiny_base["sd2"])
    shown = capsys.readouterr().err
    assert ("Loading weights" in shown) == is_terminal
    assert "pipeline components" not in shown
    assert is_terminal or not shown


def test_help_of_switches_says_which_way_they_go(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Switch --use_masks off, which is on otherwise." in text
    assert text.count("Restrict the loss to the subject") == 1


# --- the loss --------------------------------------------------------------------------------------------------------


def test_loss_without_options_is_the_mean_squared_error() -> None:
    prediction, target = torch.randn(2, 3, 4, 4, 4).unbind()
    loss = compute_loss(prediction, target, torch.ones(3), prediction_type="epsilon")
    assert loss.shape == (3,)
    torch.testing.assert_close(loss.mean(), torch.nn.functional.mse_loss(prediction, target))


def test_masked_loss_sees_the_subject_alone_whatever_its_size() -> None:
    target = torch.zeros(2, 4, 8, 8)
    prediction = torch.full_like(target, 9.0)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :2, :2] = 1
    mask[1, :, :, :4] = 1
    prediction[mask.expand_as(prediction) == 1] = 2.0
    loss = compute_loss(prediction, target, torch.ones(2), prediction_type="epsilon", mask=mask)
    torch.testing.assert_close(loss, torch.tensor([4.0, 4.0]))


def test_min_snr_weights_are_those_of_the_clean_picture() -> None:
    snr = torch.tensor([0.0, 0.1, 1.0, 5.0, 100.0])
    target = torch.zeros(5, 1, 2, 2)
    losses = {
        kind: compute_loss(target + 1, target, snr, prediction_type=kind, snr_gamma=5.0)
        for kind in ("epsilon", "v_prediction")
    }
    capped = torch.tensor([0.1, 1.0, 5.0, 5.0])
    torch.testing.assert_close(losses["epsilon"][1:], capped / snr[1:])
    torch.testing.assert_close(losses["v_prediction"][1:], capped / (snr[1:] + 1))
    assert all(loss.isfinite().all() for loss in losses.values())


def test_loss_is_computed_in_float32() -> None:
    prediction = torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16)  # its square overflows half precision
    loss = compute_loss(prediction, torch.zeros_like(prediction), torch.ones(1), prediction_type="epsilon")
    torch.testing.assert_close(loss, torch.tensor([90_000.0]))


# --- randomness ------------------------------------------------------------------------------------------------------


def drawn(count: int, **options: Any) -> list[Sample]:
    pictures = [TrainingPicture([View(torch.full((1, 2, 2), float(n)), None)], [n]) for n in range(count)]
    settings = {"seed": 0, "step": 0, "batch": 8, "num_timesteps": 1000, **options}
    return [draw_sample(pictures, index=index, **settings) for index in range(settings["batch"])]


def test_a_sample_is_a_function_of_seed_step_and_index() -> None:
    first, again, other = drawn(3)[5], drawn(3)[5], drawn(3, seed=1)[5]
    assert torch.equal(first.noise, again.noise)
    assert first.timestep == again.timestep
    assert not torch.equal(first.noise, other.noise)


def test_pictures_come_equally_often() -> None:
    rows = [sample.row for step in range(3) for sample in drawn(4, step=step)]
    assert sorted(rows) == sorted([0, 1, 2, 3] * 6)


def test_timesteps_are_spread_over_the_batch() -> None:
    for step in range(5):
        assert [sample.timestep * 8 // 1000 for sample in drawn(3, step=step)] == list(range(8))


def test_noise_offset_shifts_whole_channels() -> None:
    plain, shifted = drawn(1)[0], drawn(1, noise_offset=0.1)[0]
    difference = shifted.noise - plain.noise
    assert difference.std() < 1e-6
    assert difference.abs().mean() > 0


def test_signal_that_the_launcher_repeats_is_one_wish_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGINT
        monkeypatch.setattr(time, "monotonic", lambda: start + ECHO_SECONDS + 10)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_rate_falls_to_zero_at_the_last_optimiser_step(accumulation: int) -> None:
    factor = learning_rate_factor(TrainConfig(max_train_steps=50, gradient_accumulation_steps=accumulation))
    assert factor(0) == 1
    assert factor(50) == pytest.approx(0, abs=1e-6)
    assert 0 < factor(49) < 0.01


# --- the three ways to learn -----------------------------------------------------------------------------------------


@pytest.fixture
def encoders(kind: str, tiny_components: dict[str, dict[str, Any]]) -> loading.TextEncoders:
    """The architecture's text encoders, to be tuned."""
    parts = {name: part for name, part in tiny_components[kind].items() if name.startswith("text_encoder")}
    return copy.deepcopy(loading.TextEncoders(parts))


@pytest.fixture
def prompts(encoders: loading.TextEncoders, tokenizer: Any) -> Prompts:
    """Two prompts with a class phrase of two tokens at different places."""
    texts = ["a red person", "a photo of a red person on the beach"]
    input_ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids[:, None]
    input_ids = input_ids.expand(-1, len(encoders.encoders), -1)
    with torch.no_grad():
        embeds, pooled = encoders(input_ids)
    return Prompts(texts, input_ids, torch.tensor([[2, 3], [5, 6]]), embeds, embeds[:1], pooled)


@both_architectures
def test_residual_is_added_at_the_phrase_alone(prompts: Prompts) -> None:
    learner = ResidualLearner(prompts)
    rows = torch.tensor([1, 0, 1])
    assert torch.equal(learner(rows)[0], prompts.base_embeds[rows])  # a no-op until trained
    with torch.no_grad():
        learner.delta[:] = torch.tensor([[1.0], [2.0]])
    change = (learner(rows)[0] - prompts.base_embeds[rows]).mean(-1)
    expected = torch.zeros_like(change)
    expected[0, [5, 6]] = expected[1, [2, 3]] = expected[2, [5, 6]] = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=0)


@both_architectures
def test_key_preservation_is_how_far_the_keys_move(
    prompts: Prompts, kind: str, tiny_components: dict[str, dict[str, Any]]
) -> None:
    unet = tiny_components[kind]["unet"]
    scale = torch.linspace(1.0, 3.0, prompts.base_embeds.shape[2]) if kind == "xl" else None
    learner = ResidualLearner(prompts, unet, key_preservation=0.5, scale=scale)
    assert learner(torch.tensor([0]))[1] == 0
    with torch.no_grad():
        learner.delta[:] = torch.randn(learner.delta.shape, generator=torch.Generator().manual_seed(0))
    penalty = learner(torch.tensor([0]))[1]
    moved = []
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    words = torch.stack([prompts.base_embeds[row, position] for row, position in enumerate(prompts.positions)])
    with torch.no_grad():
        for layer in layers:
            for token, delta in enumerate(learner.residual()):
                lengths = [layer.to_k(word).square().sum() for word in words[:, token]]
                moved.append(layer.to_k(delta).square().sum() / torch.stack(lengths).mean())
    assert len(layers) > 1
    torch.testing.assert_close(penalty, 0.5 * torch.stack(moved).mean(), rtol=1e-4, atol=0)
    penalty.backward()
    assert learner.delta.grad is not None and learner.delta.grad.any()
    assert set(learner.state_dict()) == {"delta"}


@both_architectures
def test_encoder_learner_starts_as_a_no_op_and_holds_other_tokens(
    prompts: Prompts, encoders: loading.TextEncoders
) -> None:
    encoders.requires_grad_(True)
    flags = TrainConfig(method="text_encoder")
    learner = TextEncoderLearner(prompts, [0, 1], encoders, flags)
    embeds, penalty = learner(torch.tensor([0, 1]))
    torch.testing.assert_close(embeds, prompts.base_embeds)
    assert float(penalty) < 1e-4
    assert learner.residual().abs().max() < 1e-4
    (embeds.square().mean() + penalty).backward()
    assert all(parameter.grad.isfinite().all() for parameter in learner.tuned().values() if parameter.grad is not None)
    with torch.no_grad():
        for encoder in encoders.encoders.values():
            weight = encoder.get_input_embeddings().weight
            weight.add_(torch.randn_like(weight))
    assert float(learner(torch.tensor([0, 1]))[1]) > 1e-2
    assert learner.residual().shape == (2, embeds.shape[-1])
    in_lengths = TextEncoderLearner(prompts, [0, 1], encoders, flags, scale=torch.full(embeds.shape[-1:], 4.0))
    penalties = [one(torch.tensor([0, 1]))[1] for one in (in_lengths, learner)]
    torch.testing.assert_close(4 * penalties[0], penalties[1])
    assert torch.equal(in_lengths.residual(), learner.residual())


def test_missing_optimisers_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for optimizer, module in (("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=f"pip install {module}"):
            make_optimizer(TrainConfig(optimizer=optimizer, learning_rate=1.0), [])


def test_installed_optimisers_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    parameters = [torch.nn.Parameter(torch.zeros(1))]
    fakes = {
        "bitsandbytes.optim": SimpleNamespace(AdamW8bit=torch.optim.AdamW),
        "prodigyopt": SimpleNamespace(
            Prodigy=lambda parameters, lr, use_bias_correction, safeguard_warmup, **kwargs: torch.optim.AdamW(
                parameters, lr, **kwargs
            )
        ),
    }
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    for optimizer in ("adamw8bit", "prodigy"):
        flags = TrainConfig(optimizer=optimizer, learning_rate=0.5, adam_beta1=0.8, adam_beta2=0.95, weight_decay=0.1)
        (group,) = make_optimizer(flags, parameters).param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.95), 0.1)


# --- what the two architectures share, and what is special about Stable Diffusion XL ---------------------------------


def load(base: str, **flags: Any) -> loading.Models:
    """A base's encoders on the processor, in a precision that it may only imitate."""
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), mixed_precision=flags.pop("mixed_precision", "no"))
    return load_encoders(TrainConfig(pretrained_model_name_or_path=base, **flags), accelerator)


@both_architectures
def test_prompts_are_embedded_as_the_pipeline_does(kind: str, tiny_base: dict[str, str], request: Any) -> None:
    pipe = request.getfixturevalue(f"{kind}_pipe")
    said = {"--templates": ["a red person", "a photo of a red person on the beach"]}
    models = load(tiny_base[kind])
    found = build_prompts(said, "red person", models)
    for row, text in enumerate(found.texts):
        expected = pipe.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
        embeds = (found.base_embeds[row, None], found.negative_embeds)
        if kind == "xl":
            assert found.pooled is not None and found.negative_pooled is not None
            embeds += (found.pooled[row, None], found.negative_pooled)
        assert len(embeds) == len(expected)
        for ours, theirs in zip(embeds, expected, strict=True):
            assert_equal_up_to_rounding(ours, theirs)
    assert found.positions.tolist() == [[2, 3], [5, 6]]
    assert not (kind == "xl" and found.negative_embeds.any())  # so says that base
    models.zero_negative = False
    assert build_prompts(said, "red person", models).negative_embeds.any()


def test_a_sentence_that_the_text_encoders_cut_differently_is_refused(tiny_base: dict[str, str]) -> None:
    """As those of XL may do with signs in a row: one of them pads with `!`."""
    models = load(tiny_base["xl"])
    models.tokenizers["text_encoder_2"].add_tokens("wow")
    said = {"caption of 0.png": ["wow a red person"]}
    with pytest.raises(ValueError, match=r"caption of 0\.png: in 'wow a red person' .* at different tokens"):
        build_prompts(said, "red person", models)


@both_architectures
@pytest.mark.parametrize("method", METHODS)
def test_every_tuned_parameter_gets_a_gradient(
    config: TrainConfig, method: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or several processes would wait for one another's for ever."""
    learners = []

    def remember(*arguments: Any) -> Any:
        learners.append(make_learner(*arguments))
        return learners[-1]

    monkeypatch.setattr(loop, "make_learner", remember)
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda *_, **__: None)
    learn(replace(config, method=method, max_train_steps=1))
    tuned = learners[0].tuned()
    assert [name for name, parameter in tuned.items() if parameter.grad is None] == []
    assert len({name.split("layers.")[-1] for name in tuned}) > 3 or method == "residual"


@both_architectures
@pytest.mark.parametrize("method", METHODS)
def test_the_base_hears_of_each_picture_what_is_true(
    config: TrainConfig, method: str, kind: str, monkeypatch: pytest.MonkeyPatch, xl_pipe: Any
) -> None:
    """XL's UNet: sizes and crops of the pictures, and the plain words' pooled embedding, whatever is tuned."""
    heard: list[dict[str, torch.Tensor] | None] = []

    def loss(samples: Any, embeds: torch.Tensor, models: Any, *rest: Any) -> torch.Tensor:
        unet = models.unet

        def listen(*arguments: Any, added_cond_kwargs: Any = None, **options: Any) -> Any:
            heard.append(added_cond_kwargs)
            return unet(*arguments, added_cond_kwargs=added_cond_kwargs, **options)

        return denoising_loss(samples, embeds, replace(models, unet=listen), *rest)

    monkeypatch.setattr(loop, "denoising_loss", loss)
    learn(replace(config, method=method, templates=["a photo of a {}"], max_train_steps=3, learning_rate=0.1))
    assert heard
    if kind != "xl":
        assert heard == [None] * len(heard)
        return
    pooled = xl_pipe.encode_prompt("a photo of a person", device="cpu", do_classifier_free_guidance=False)[2]
    sizes = set()
    for conditions in heard:
        assert conditions is not None
        assert_equal_up_to_rounding(conditions["text_embeds"], pooled.expand(len(conditions["text_embeds"]), -1))
        sizes |= set(map(tuple, conditions["time_ids"].tolist()))
    # The wide picture's bucket is 48 x 24, of a size that a crop of 2 : 1 fills.
    assert sizes == {(32, 32, 0, 0, 32, 32), (32, 64, 0, 0, 24, 48), (40, 40, 0, 0, 32, 32)}


def test_each_encoder_of_xl_is_learnt_at_its_own_scale(
    tiny_base: dict[str, str], config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's first step is the rate for every number, so that the deltas are the rate times the words' size."""
    models = load(tiny_base["xl"])
    with torch.no_grad():  # as different as they are in the released models
        models.text_encoders.encoders["text_encoder"].get_input_embeddings().weight.mul_(50)
    monkeypatch.setattr(loading, "load_encoders", lambda *_: models)
    flags = replace(config, pretrained_model_name_or_path=tiny_base["xl"], max_train_steps=1, weight_decay=0.0)
    prompts = build_prompts({"": ["a {}".replace("{}", "person")]}, "person", models)
    delta = learn(replace(flags, templates=["a {}"], learning_rate=0.1, validation_prompts=["the {}"]))
    words = prompts.base_embeds[0, prompts.positions[0]]
    scales = [part.square().mean().sqrt() for part in words.split([32, 48], dim=-1)]
    assert scales[0] > 2 * scales[1]
    for part, scale in zip(delta.split([32, 48], dim=-1), scales, strict=True):
        torch.testing.assert_close(part.abs().median(), 0.1 * scale, rtol=0.05, atol=0)


@both_architectures
def test_what_is_learnt_shows_in_the_pipeline_as_in_the_trainer(
    config: TrainConfig, kind: str, tiny_base: dict[str, str]
) -> None:
    from multisubject.pipeline_multisubject import MultiSubjectPipeline
    from multisubject.pipeline_multisubject_xl import MultiSubjectXLPipeline

    flags = replace(config, learning_rate=0.5, validation_inference_steps=2, validation_guidance_scale=4.0)
    delta = learn(flags)
    pipe = (MultiSubjectXLPipeline if kind == "xl" else MultiSubjectPipeline).from_pretrained(tiny_base[kind])
    pipe.set_progress_bar_config(disable=True)
    pipe.load_subject(Path(flags.output_dir) / "petrucci.safetensors")
    pipe.set_subjects([])
    plain = pipe.encode_prompt("a photo of a person")[0]
    pipe.set_subjects(["petrucci"])
    change = pipe.encode_prompt("a photo of a <petrucci>")[0] - plain
    expected = torch.zeros_like(change)
    expected[0, 5] = delta[0]
    torch.testing.assert_close(change, expected, atol=1e-5 * float(plain.abs().max()), rtol=1e-4)
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 32, "width": 32}
    (found,) = pipe("a photo of a <petrucci>", generator=torch.Generator().manual_seed(0), **options).images
    (other,) = pipe("a photo of a person", generator=torch.Generator().manual_seed(1), **options).images
    sample = np.asarray(Image.open(Path(flags.output_dir) / "samples" / "petrucci-0.png")).astype(int)
    assert np.abs(sample - np.asarray(found)).max() <= 1
    assert np.abs(sample - np.asarray(other)).max() > 10


@both_architectures
def test_learning_lowers_the_loss(config: TrainConfig, kind: str) -> None:
    """With every option of the residual on the way, held against the plain class by the same noise."""
    flags = replace(
        config,
        validation=True,
        key_preservation=1e-4,
        random_flip=True,
        lr_scheduler="constant",
        checkpointing_steps=50,
    )
    scores = []
    for rate, steps in ((0.0, 1), (0.3, 12)):
        learn(replace(flags, learning_rate=rate, max_train_steps=steps, overwrite_output_dir=True))
        file = Path(flags.output_dir) / f"checkpoint-{steps}" / "progress.json"
        scores += json.loads(file.read_text())["scores"].values()
    plain, learnt = scores
    assert learnt < plain


@pytest.fixture
def other_vae(tiny_components: dict[str, dict[str, Any]], tmp_path: Path) -> Callable[..., str]:
    """Options of its configuration -> folder of another VAE of random weights."""
    from diffusers import AutoencoderKL

    def save(**options: Any) -> str:
        values = {key: value for key, value in tiny_components["xl"]["vae"].config.items() if key[0] != "_"}
        with torch.random.fork_rng():
            torch.manual_seed(7)
            vae = AutoencoderKL(**{**values, **options})
        vae.save_pretrained(folder := tmp_path / "vae")
        return str(folder)

    return save


@pytest.mark.parametrize(
    ("kind", "precision", "vae", "expected"),
    [
        ("xl", "fp16", None, torch.float32),
        ("xl", "fp16", {"force_upcast": False}, torch.float16),
        ("xl", "fp16", {"force_upcast": True}, torch.float32),
        ("xl", "bf16", None, torch.bfloat16),
        ("xl", "no", None, torch.float32),
        ("sd2", "fp16", None, torch.float16),
        ("sd2", "fp16", {"force_upcast": True}, torch.float16),
    ],
)
def test_a_vae_that_overflows_in_float16_computes_in_float32(
    kind: str, precision: str, vae: Any, expected: torch.dtype, tiny_base: dict[str, str], other_vae: Any, config: Any
) -> None:
    flags = {} if vae is None else {"pretrained_vae_model_name_or_path": other_vae(**vae)}
    models = load(tiny_base[kind], mixed_precision=precision, **flags)
    assert models.vae.dtype == expected
    half = models.dtype
    models.unet = load_unet(replace(config, pretrained_model_name_or_path=tiny_base[kind]), models)
    assert models.unet.dtype == half
    prompts = build_prompts({"": ["a person"]}, "person", models)
    pictures = loading.generate(
        models, prompts.base_embeds, prompts.negative_embeds, replace(config, resolution=32), seed=0,
        pooled=prompts.pooled, negative_pooled=prompts.negative_pooled,
    )  # fmt: skip
    assert np.asarray(pictures[0]).std() > 0
    assert models.vae.dtype == expected  # pictures that are drawn on the way leave it as it is
    picture = Picture(Path("a.png"), pictures[0], None, None)
    (view,) = encode_picture(picture, replace(config, resolution=32), models)
    assert view.latents.dtype == torch.float32 and view.latents.isfinite().all()


def test_another_vae_makes_other_latents(
    config: TrainConfig, tiny_base: dict[str, str], other_vae: Any, finished_runs: Any
) -> None:
    folder = other_vae()
    flags = replace(config, pretrained_model_name_or_path=tiny_base["xl"], pretrained_vae_model_name_or_path=folder)
    assert not torch.equal(learn(flags), finished_runs("residual", "xl")[1])
    resumed = replace(flags, resume_from_checkpoint="latest", pretrained_vae_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"pretrained_vae_model_name_or_path was .*, is None"):
        train(resumed)


def test_a_checkpoint_is_of_all_its_text_encoders(
    config: TrainConfig, tiny_base: dict[str, str], finished_runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished_runs("residual", "xl")[0], config.output_dir)
    models = load(tiny_base["xl"])
    models.fingerprints["text_encoder_2"] = models.fingerprints["text_encoder"]
    monkeypatch.setattr(loading, "load_encoders", lambda *_: models)
    flags = replace(config, pretrained_model_name_or_path=tiny_base["xl"], resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"belongs to another run .base was"):
        train(flags)
    models.fingerprints["text_encoder_2"] = None  # quantised, say
    assert models.fingerprint is None


def test_a_vae_that_cannot_be_used_is_named(tiny_base: dict[str, str], other_vae: Any) -> None:
    with pytest.raises(ValueError, match=r"--pretrained_vae_model_name_or_path: .* latents of 8 channels, .* reads 4"):
        load(tiny_base["xl"], pretrained_vae_model_name_or_path=other_vae(latent_channels=8))
    with pytest.raises(OSError, match=r"--pretrained_vae_model_name_or_path: .*nowhere' cannot be loaded"):
        load(tiny_base["xl"], pretrained_vae_model_name_or_path="./nowhere")


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("model_index.json", {"text_encoder": [None, None]}, "has no first text encoder, as refiners"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLInpaintPipeline"},
            "is for StableDiffusionXLInpaintPipeline; .*one of StableDiffusionXLPipeline, .*MultiSubjectXLPipeline",
        ),
        ("model_index.json", {"_class_name": "StableDiffusionXLPAGPipeline"}, "is for StableDiffusionXLPAGPipeline"),
        ("model_index.json", {"_class_name": ["mine", "PipelineOfMine"]}, "is for PipelineOfMine"),
        ("unet/config.json", {"in_channels": 9}, "UNet that reads 9 channels, .* of 4. Expected a text-to-image"),
        ("unet/config.json", {"cross_attention_dim": 48}, r"embeddings of width 48, but text encoders of 32 \+ 48"),
        ("tokenizer_2/added_tokens.json", {"<cat>": 4000}, "two tokenizers of different words"),
        ("scheduler/scheduler_config.json", {"sigma_data": 0.5}, "EDMEulerScheduler, which adds noise in another way"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_only_looks_like_a_base_of_xl_is_refused(
    file: str, values: dict[str, Any], words: str, tiny_base: dict[str, str], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base["xl"], base)
    if file.startswith("tokenizer"):
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer_2")
        tokenizer.add_tokens(list(values))
        tokenizer.save_pretrained(base / "tokenizer_2")
    elif file.startswith("scheduler"):
        from diffusers import EDMEulerScheduler

        EDMEulerScheduler(**values).save_pretrained(base / "scheduler")
        file, values = "model_index.json", {"scheduler": ["diffusers", "EDMEulerScheduler"]}
    if (base / file).suffix == ".json" and (base / file).exists():
        before = json.loads((base / file).read_text())
        (base / file).write_text(json.dumps({**before, **values}))
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path: .*{words}"):
        load(str(base))


def test_a_base_without_a_unet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": ["diffusers", "X"]}')
    with pytest.raises(ValueError, match=r"is for FluxPipeline, which has no UNet; expected .* 1\.x, 2\.x or XL"):
        load(str(tmp_path))


@both_architectures
def test_a_saved_pipeline_of_ours_is_a_base(kind: str, tiny_base: dict[str, str], tmp_path: Path, request: Any) -> None:
    request.getfixturevalue(f"{kind}_pipe").save_pretrained(tmp_path)
    assert load(str(tmp_path)).fingerprints == load(tiny_base[kind]).fingerprints
    assert load(str(tmp_path)).is_xl == (kind == "xl")


def test_a_base_of_xl_that_was_saved_for_image_to_image_is_a_base(tiny_base: dict[str, str], tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    StableDiffusionXLImg2ImgPipeline.from_pretrained(tiny_base["xl"]).save_pretrained(tmp_path / "base")
    models = load(str(tmp_path / "base"))
    assert models.is_xl and models.fingerprints == load(tiny_base["xl"]).fingerprints


# --- whole runs ------------------------------------------------------------------------------------------------------


@both_architectures
def test_a_run_leaves_everything_that_was_promised(
    config: TrainConfig, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, validation_steps=2)
    with caplog.at_level(logging.INFO):
        assert main(as_flags(config)) == 0
    output = Path(config.output_dir)
    subject = load_subject(output / "petrucci.safetensors")["petrucci"]
    if kind == "xl":
        assert {name: delta.shape for name, delta in subject.deltas.items()} == {
            "text_encoder": (1, 32),
            "text_encoder_2": (1, 48),
        }
        assert all(delta.abs().max() > 0 for delta in subject.deltas.values())
        assert not (output / "residual.pt").exists()
        with pytest.raises(ValueError, match=r"\.pt file holds the residual of `text_encoder` alone, .*_encoder_2'"):
            save_subject(subject, output / "residual.pt")
    else:
        bare = torch.load(output / "residual.pt", weights_only=True)
        assert torch.equal(bare, subject.delta)
        assert bare.shape == (1, 32)
        assert bare.abs().max() > 0
    assert [key for key in sorted(subject.metadata) if "fingerprint" in key] == sorted(
        f"{encoder}_fingerprint" for encoder in subject.deltas
    )
    assert subject.class_phrase == "person"
    assert subject.metadata["method"] == "residual"
    assert subject.metadata["steps"] == 4
    assert subject.metadata["resolution"] == 32
    seen = [Image.open(path) for path in Path(config.instance_data_dir).glob("*.png")]
    assert subject.metadata["training_pictures"] == picture_digests(seen)  # a later run is known by them
    assert config.pretrained_model_name_or_path not in str(subject.metadata)  # no path of this machine
    sheets = ("validation/step-000002.png", "validation/step-000004.png")
    curve = ["loss.png"] if kind == "sd2" else []  # it is drawn once
    for name in ("README.md", *curve, "samples/petrucci-0.png", *sheets):
        assert (output / name).stat().st_size > 0
    assert len(list(csv.DictReader((output / "loss.csv").open()))) == 4
    saved = yaml.safe_load((output / "config.yaml").read_text())
    resolved = ("resolution", "learning_rate", "token_num", "mixed_precision", "name")
    assert [saved[key] for key in resolved] == [32, 0.05, 1, "no", "petrucci"]
    assert parse_config(["--config", str(output / "config.yaml")]) == TrainConfig(**saved)
    assert "3 pictures, 0 masks in use" in caplog.text
    for copied in ("checkpoint-4-keep", "checkpoint-04", "checkpoint-\u00b2"):  # the user's own
        (output / copied).mkdir()
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2", "checkpoint-4"]
    assert not list(output.glob(".*"))  # nothing half-written


@both_architectures
@pytest.mark.parametrize("method", METHODS)
def test_resume_equals_uninterrupted_run(config: TrainConfig, method: str, kind: str, finished_runs: Any) -> None:
    config = replace(config, method=method)
    whole = finished_runs(method, kind)[1]
    assert whole.abs().max() > 0
    stopped = train_until_signal(config, signal.SIGTERM, step=3)
    assert stopped == 128 + signal.SIGTERM
    assert [path.name for path in checkpoints(Path(config.output_dir))] == ["checkpoint-2", "checkpoint-3"]
    resumed = learn(replace(config, resume_from_checkpoint="latest"))
    assert torch.equal(resumed, whole)


def train_until_signal(config: TrainConfig, number: int, step: int) -> int:
    """Run the command, and send this process a signal while it is in that step (1-based)."""

    def draw_and_send(concept: Any, at: int, *rest: Any) -> Any:
        if at == step - 1:
            os.kill(os.getpid(), number)
        return draw_batch(concept, at, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_batch", draw_and_send)
        return main(as_flags(config))


def test_signal_at_a_scored_step_changes_nothing(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, validation=True, learning_rate=0.5)
    whole = train(config)["petrucci"]
    for step in (2, 4):
        other = replace(config, output_dir=str(tmp_path / f"stopped-{step}"), name="petrucci")
        assert train_until_signal(other, signal.SIGTERM, step=step) == (128 + signal.SIGTERM if step < 4 else 0)
        resumed = train(replace(other, resume_from_checkpoint="latest"))["petrucci"]
        assert torch.equal(resumed.delta, whole.delta)
        progress = json.loads((Path(other.output_dir) / "checkpoint-4" / "progress.json").read_text())
        assert sorted(progress["scores"]) == ["2", "4"]


def test_interrupt_before_the_first_step_ends_with_one_line(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "load_encoders", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert main(as_flags(config)) == 128 + signal.SIGINT
    assert "stopped by SIGINT" in caplog.text


def test_interrupt_from_the_keyboard_saves_and_says_how_to_go_on(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert train_until_signal(config, signal.SIGINT, step=1) == 128 + signal.SIGINT
    assert latest_checkpoint(Path(config.output_dir)) == Path(config.output_dir) / "checkpoint-1"
    assert "SIGINT" in caplog.text
    assert "--resume_from_checkpoint latest" in caplog.text


KILLED_RUNS = """
import json, os, signal, sys, time
from pathlib import Path
from multisubject.train_residual import main
from multisubject.training import loop

def draw_and_stop(concept, step, *rest, draw_batch=loop.draw_batch):
    if step == 5:
        time.sleep(1800)
    return draw_batch(concept, step, *rest)

loop.draw_batch = draw_and_stop
for flags, awaited in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        os._exit(main(flags))
    while not Path(awaited).exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended too early"
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_residual(config: TrainConfig, tmp_path: Path) -> None:
    long = replace(config, max_train_steps=8, checkpointing_steps=2)
    runs = {method: replace(long, method=method, output_dir=str(tmp_path / method)) for method in METHODS}
    orders = [(as_flags(run), f"{run.output_dir}/checkpoint-4/progress.json") for run in runs.values()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-c", KILLED_RUNS, json.dumps(orders)], env=environment, check=True, timeout=300)
    for method, run in runs.items():
        last = latest_checkpoint(Path(run.output_dir))
        assert last is not None
        assert last.name == "checkpoint-4"
        assert (Path(run.output_dir) / LOCK_FILE).exists()  # which holds nobody up
        resumed = learn(replace(run, resume_from_checkpoint="latest"))
        whole = learn(replace(run, output_dir=str(tmp_path / f"{method}-whole")))
        assert torch.equal(resumed, whole), method


def test_finished_run_resumes_to_the_same_files(finished: TrainConfig, whole: torch.Tensor) -> None:
    assert torch.equal(learn(replace(finished, resume_from_checkpoint="latest")), whole)


@pytest.fixture
def nothing_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that is encoded fails the test."""

    def fail(*_: Any) -> None:
        pytest.fail("encoded before it was refused")

    monkeypatch.setattr("multisubject.training.concepts.encode_picture", fail)


@pytest.mark.usefixtures("nothing_encoded")
def test_resume_refuses_another_run_and_names_the_difference(finished: TrainConfig) -> None:
    with pytest.raises(ValueError, match=r"learning_rate was 0\.05, is 0\.1"):
        train(replace(finished, learning_rate=0.1, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="not a checkpoint"):
        train(replace(finished, resume_from_checkpoint=str(Path(finished.output_dir) / "nothing")))


@pytest.mark.parametrize("choice", ["nowhere", "{output}/samples"])
def test_what_is_no_checkpoint_is_refused_before_models_load(finished: TrainConfig, choice: str) -> None:
    choice = choice.format(output=finished.output_dir)
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint: {choice!r} is not a checkpoint of this program"):
        train(replace(finished, resume_from_checkpoint=choice, pretrained_model_name_or_path="nowhere"))


def test_scored_steps_are_part_of_the_run(config: TrainConfig) -> None:
    config = replace(config, validation=True)
    learn(config)
    with pytest.raises(ValueError, match=r"checkpointing_steps was 2, is 1"):
        train(replace(config, checkpointing_steps=1, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("name", ["learner.safetensors", "optimizer.bin"])
def test_damaged_checkpoint_is_named(finished: TrainConfig, name: str) -> None:
    file = Path(finished.output_dir) / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint-4' is damaged .*remove it"):
        train(replace(finished, resume_from_checkpoint="latest"))


def test_dropped_checkpoint_is_never_seen_half(finished: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        assert main([*as_flags(finished), "--overwrite_output_dir"]) == 128 + signal.SIGINT
    assert [path.name for path in checkpoints(Path(finished.output_dir))] == ["checkpoint-4"]
    assert learn(replace(finished, resume_from_checkpoint="latest")).abs().max() > 0
    assert not list(Path(finished.output_dir).glob(".*"))


@pytest.mark.parametrize(
    "flags", [{}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}], ids=lambda flags: str([*flags])
)
def test_a_run_that_is_going_on_keeps_its_folder_to_itself(
    finished: TrainConfig, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    output = Path(finished.output_dir)

    def start_another(*_: Any) -> None:
        kept = sorted(output.rglob("*"))
        (output / ".unfinished-checkpoint-2").mkdir()
        with pytest.raises(ValueError, match=rf"another run is writing here \(process {os.getpid()}\); wait"):
            train(replace(finished, **flags))
        (output / ".unfinished-checkpoint-2").rmdir()
        assert sorted(output.rglob("*")) == kept
        raise InterruptedError

    monkeypatch.setattr(loop, "draw_batch", start_another)
    with pytest.raises(InterruptedError):
        train(replace(finished, overwrite_output_dir=True))
    assert not (output / LOCK_FILE).exists()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from multisubject.training.run_lock import locked
with locked(Path({str(tmp_path)!r})):
    print("in", flush=True)
    time.sleep(1800)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        with pytest.raises(BlockingIOError, match=f"process {process.pid}"), locked(tmp_path):
            pass
        process.kill()
    assert (tmp_path / LOCK_FILE).exists()
    with locked(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == str(os.getpid())
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_removed_while_it_was_asked_for_locks_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that held it ends between the opening of the file and the asking."""
    asked = []

    def ask(file: Any, ask: Any = run_lock._try_lock) -> None:
        asked.append(file)
        if len(asked) == 1:
            (tmp_path / LOCK_FILE).unlink()
        ask(file)

    monkeypatch.setattr(run_lock, "_try_lock", ask)
    with locked(tmp_path), pytest.raises(BlockingIOError), locked(tmp_path):
        pass
    assert len(asked) == 3


def test_a_file_system_without_locks_is_named(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_lock, "_try_lock", refuse)
    learn(replace(config, max_train_steps=1))
    assert f"{config.output_dir}: cannot be locked" in caplog.text


def test_latest_without_checkpoints_starts_from_the_beginning(config: TrainConfig) -> None:
    assert learn(replace(config, resume_from_checkpoint="latest")).abs().max() > 0


def test_output_folder_of_another_run_is_refused_or_replaced(finished: TrainConfig) -> None:
    with pytest.raises(ValueError, match=r"holds another run.*--overwrite_output_dir"):
        train(finished)
    learn(replace(finished, overwrite_output_dir=True, max_train_steps=2))
    assert [path.name for path in checkpoints(Path(finished.output_dir))] == ["checkpoint-2"]


def test_overwriting_removes_nothing_before_the_inputs_are_read_and_no_other_subject(finished: TrainConfig) -> None:
    output = Path(finished.output_dir)
    (output / "other.safetensors").write_bytes(b"somebody else's")
    before = sorted(path.name for path in output.iterdir())
    with pytest.raises(FileNotFoundError):
        train(replace(finished, overwrite_output_dir=True, instance_data_dir="nowhere"))
    assert sorted(path.name for path in output.iterdir()) == before
    learn(replace(finished, overwrite_output_dir=True, max_train_steps=2))
    assert (output / "other.safetensors").read_bytes() == b"somebody else's"


@pytest.mark.parametrize("step", [1, 2])
def test_another_split_of_the_batch_goes_on_from_any_step(config: TrainConfig, tmp_path: Path, step: int) -> None:
    config = replace(config, checkpointing_steps=1)
    whole = learn(config)
    split = replace(
        config,
        name=config.subject_name,
        output_dir=str(tmp_path / "split"),
        train_batch_size=1,
        gradient_accumulation_steps=2,
        resume_from_checkpoint=str(Path(config.output_dir) / f"checkpoint-{step}"),
    )
    torch.testing.assert_close(learn(split), whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_a_run_that_cannot_start_leaves_the_one_before(finished: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in Path(finished.output_dir).rglob("*") if path.is_file()}
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        train(replace(finished, overwrite_output_dir=True, optimizer="adamw8bit"))
    with pytest.raises(ValueError, match=r"belongs to another run \(learning_rate was 0.05, is 0.5\)"):
        train(replace(finished, resume_from_checkpoint="latest", learning_rate=0.5))
    assert {path: path.read_bytes() for path in before} == before


def test_a_finished_subject_without_checkpoints_is_not_replaced_unasked(finished: TrainConfig) -> None:
    for checkpoint in checkpoints(Path(finished.output_dir)):
        shutil.rmtree(checkpoint)
    latest = replace(finished, resume_from_checkpoint="latest", seed=5)
    with pytest.raises(ValueError, match=r"no checkpoint, only the finished petrucci.safetensors; --overwrite_output"):
        train(latest)
    train(replace(latest, overwrite_output_dir=True))


def test_nothing_of_a_replaced_run_stays(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    learn(replace(config, validation_steps=1, validation_prompts=["a {}", "the {}"]))
    (Path(config.output_dir) / "notes.txt").write_text("mine")

    def fail(*_: Any) -> Any:
        raise InterruptedError

    monkeypatch.setattr(loop, "draw_batch", fail)
    with pytest.raises(InterruptedError):
        train(replace(config, overwrite_output_dir=True, learning_rate=0.5))
    left = {path.name for path in Path(config.output_dir).rglob("*") if path.is_file()}
    assert left == {"config.yaml", "notes.txt"}
    kept = yaml.safe_load((Path(config.output_dir) / "config.yaml").read_text())
    assert (kept["learning_rate"], kept["overwrite_output_dir"]) == (0.5, False)


def test_a_damaged_checkpoint_does_not_outlive_a_run_from_the_one_before(finished: TrainConfig) -> None:
    output = Path(finished.output_dir)
    (output / "checkpoint-4" / "learner.safetensors").write_bytes(b"x")
    again = learn(replace(finished, resume_from_checkpoint=str(output / "checkpoint-2")))
    assert torch.equal(learn(replace(finished, resume_from_checkpoint="latest")), again)
    assert not list(output.glob(".unfinished*"))


def test_fewer_steps_than_the_checkpoint_has_are_refused(config: TrainConfig) -> None:
    config = replace(config, lr_scheduler="constant")
    learn(config)
    with pytest.raises(ValueError, match=r"--max_train_steps: 2, but .*checkpoint-4 is of step 4"):
        train(replace(config, max_train_steps=2, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("flag", ["output_dir", "class_data_dir"])
def test_what_a_run_writes_is_no_picture_of_the_subject(config: TrainConfig, flag: str) -> None:
    folder = str(config.instance_data_dir)
    values: dict[str, Any] = {"name": "petrucci", "method": "lora", "with_prior_preservation": True}
    with pytest.raises(ValueError, match=f"--{flag}: .* is --instance_data_dir as well"):
        train(replace(config, **{**values, "class_data_dir": "classes", flag: folder}))


def test_errors_of_one_of_several_subjects_name_it(config: TrainConfig, tmp_path: Path) -> None:
    entries = [{"name": "rex", "instance_prompt": "person"}, {"name": "ada", "instance_prompt": "a dog"}]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="--concepts_list: 'ada': --instance_prompt: 'a dog'"):
        train(replace(config, concepts_list=str(tmp_path / "list.json"), name=None))


@both_architectures
def test_class_pictures_are_not_as_rough_as_validation_pictures(
    config: TrainConfig, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, scales, seeds = [], [], []

    def generate(
        models: Any, embeds: torch.Tensor, negative: Any, flags: TrainConfig, *, seed: int, **_: Any
    ) -> list[Image.Image]:
        steps.append(flags.validation_inference_steps)
        scales.append(flags.validation_guidance_scale)
        seeds.append(seed)
        return [Image.new("RGB", (32, 32))] * len(embeds)

    for room in ("concepts", "results"):
        monkeypatch.setattr(f"multisubject.training.{room}.generate", generate)
    prior = replace(
        config,
        method="lora",
        with_prior_preservation=True,
        class_data_dir=str(tmp_path / "classes"),
        num_class_images=2,
        max_train_steps=1,
        validation_guidance_scale=2.0,
    )
    learn(prior)
    assert steps == [CLASS_STEPS, CLASS_STEPS, 1]
    own = {"sd2": 7.5, "xl": 5.0}[kind]
    assert scales == [own, own, 2.0]
    assert len(set(seeds)) == 3  # two equal class pictures would be one
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"--class_data_dir: .* cannot be made"):
        learn(replace(prior, class_data_dir=str(tmp_path / "file"), overwrite_output_dir=True))


def test_flags_without_effect_are_named(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    odd = replace(config, lora_rank=4, class_prompt="a {}", key_preservation=0.1, preservation_after=0.5)
    assert odd.without_effect() == {
        "lora_rank": "--method lora",
        "preservation_after": "--method text_encoder or lora",
        "class_prompt": "--with_prior_preservation",
    }
    assert list(replace(odd, method="lora").without_effect()) == ["key_preservation", "class_prompt"]
    assert not config.without_effect()
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="--token_num: 9"):
        train(replace(odd, token_num=9))
    assert "--lora_rank has no effect: it needs --method lora" in caplog.text


@pytest.mark.parametrize("phrase", ["a photo of sks person", "a person", "The person", "my person", "photo of person"])
def test_a_sentence_is_no_class_phrase(phrase: str, config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=r"--instance_prompt: .*expected the class phrase alone"):
        train(replace(config, instance_prompt=phrase))


def test_class_prompt_without_the_phrase_is_named(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, method="lora", with_prior_preservation=True, class_data_dir=str(tmp_path / "class"))
    with pytest.raises(ValueError, match=r"--class_prompt: 'a photo of an animal' does not say 'person'"):
        train(replace(config, class_prompt="a photo of an animal"))


def test_class_pictures_of_two_classes_in_one_folder_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    entries = [{"name": name, "instance_data_dir": "x", "instance_prompt": name} for name in ("person", "guitar")]
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    config = replace(config, method="lora", with_prior_preservation=True, class_data_dir=str(tmp_path / "class"))
    config = replace(config, concepts_list=str(tmp_path / "concepts.json"))
    with pytest.raises(ValueError, match=r"'guitar' has the class pictures of another class in class_data_dir"):
        read_concepts(config)


def test_accumulation_from_elsewhere_is_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"--gradient_accumulation_steps: 1, but .* says 4"):
        train(config)


def test_unwritable_output_folder_is_named_before_models_load(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = replace(config, output_dir=str(tmp_path / "file" / "x"), pretrained_model_name_or_path="nowhere")
    with pytest.raises(OSError, match=r"--output_dir: .*cannot be written"):
        train(config)


def test_old_checkpoints_are_dropped(config: TrainConfig) -> None:
    learn(replace(config, checkpointing_steps=1, checkpoints_total_limit=2))
    assert [path.name for path in checkpoints(Path(config.output_dir))] == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 2810176 vs 2810064"),  # torch.save
    ],
    ids=lambda error: type(error).__name__,
)
def test_full_disk_leaves_the_last_checkpoint(
    config: TrainConfig, whole: torch.Tensor, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from accelerate import Accelerator

    save_state = Accelerator.save_state

    def fill_disk(self: Accelerator, folder: str, **options: Any) -> Any:
        if folder.endswith("checkpoint-4"):
            Path(folder).mkdir()
            (Path(folder) / "part").write_text("half")
            raise error
        return save_state(self, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", fill_disk)
        with pytest.raises(OSError, match=r"checkpoint-4 could not be written.*checkpoint-2 is intact"):
            train(config)
    assert not list(Path(config.output_dir).glob(".unfinished*"))
    assert torch.equal(learn(replace(config, resume_from_checkpoint="latest")), whole)


def test_result_that_cannot_be_written_can_be_had_later(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_disk(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(results, "save_subject", fill_disk)
        with pytest.raises(OSError, match=r"could not be written.*--resume_from_checkpoint latest"):
            train(config)
    assert learn(replace(config, resume_from_checkpoint="latest")).abs().max() > 0


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def nan_in_the_third_step(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        loss = compute_loss(*arguments, **options)
        return loss * float("nan") if (Path(config.output_dir) / "checkpoint-2").exists() else loss

    monkeypatch.setattr("multisubject.training.loss.compute_loss", nan_in_the_third_step)
    assert main(as_flags(config)) == 1
    assert "step 3 has a loss of nan" in caplog.text
    assert "checkpoint-2" in caplog.text
    assert latest_checkpoint(Path(config.output_dir)) == Path(config.output_dir) / "checkpoint-2"
    assert not list(Path(config.output_dir).glob("*.safetensors"))


def test_several_subjects_share_one_loading_of_the_models(
    config: TrainConfig, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = loading.load_unet

    def counted(*arguments: Any) -> Any:
        loaded.append(1)
        return load(*arguments)

    monkeypatch.setattr(loading, "load_unet", counted)
    concepts = tmp_path / "concepts.yaml"
    entries = [
        {"name": "one", "instance_data_dir": str(pictures), "instance_prompt": "person"},
        {"name": "two", "instance_data_dir": str(pictures), "instance_prompt": "red guitar", "token_num": 2},
    ]
    concepts.write_text(yaml.safe_dump(entries))
    config = replace(config, method="text_encoder", max_train_steps=2)
    both = train(replace(config, concepts_list=str(concepts), output_dir=str(tmp_path / "both")))
    assert len(loaded) == 1
    assert both["two"].delta.shape == (2, 32)
    assert (tmp_path / "both" / "two" / "two.safetensors").exists()
    alone = learn(replace(config, name="two", instance_prompt="red guitar"))
    assert torch.equal(both["two"].delta, alone)  # the first subject left no trace


@both_architectures
def test_accumulated_batches_equal_one_large_batch(config: TrainConfig) -> None:
    large = learn(replace(config, train_batch_size=4))
    small = learn(
        replace(config, gradient_accumulation_steps=4, train_batch_size=1, output_dir=config.output_dir + "-2")
    )
    torch.testing.assert_close(small, large, atol=1e-4, rtol=1e-3)


@both_architectures
def test_gradient_checkpointing_changes_nothing(config: TrainConfig, kind: str, finished_runs: Any) -> None:
    plain = finished_runs("text_encoder", kind)[1]
    frugal = learn(replace(config, method="text_encoder", gradient_checkpointing=True))
    torch.testing.assert_close(frugal, plain, atol=1e-5, rtol=1e-3)


@both_architectures
@pytest.mark.parametrize("method", ["text_encoder", "lora"])
def test_gradient_checkpointing_recomputes_the_encoder(
    config: TrainConfig, method: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.clip.modeling_clip import CLIPMLP

    calls = {True: 0, False: 0}
    for frugal in calls:
        forward = CLIPMLP.forward

        def counted(self: Any, *arguments: Any, forward: Any = forward, frugal: bool = frugal) -> Any:
            calls[frugal] += torch.is_grad_enabled()
            return forward(self, *arguments)

        run = replace(config, method=method, gradient_checkpointing=frugal, output_dir=f"{config.output_dir}{frugal}")
        with monkeypatch.context() as patch:
            patch.setattr(CLIPMLP, "forward", counted)
            learn(replace(run, max_train_steps=1))
    if kind == "xl":  # of two encoders of two layers, the last ones are not read and so not recomputed
        assert calls == {True: 4 + 2, False: 4}
    else:
        assert calls[True] == 2 * calls[False] > 0


def test_no_limit_on_gradients_is_not_a_limit_of_zero(config: TrainConfig) -> None:
    unlimited = learn(replace(config, max_grad_norm=0, weight_decay=0))
    assert unlimited.abs().max() > 0
    high = learn(replace(config, max_grad_norm=1e9, weight_decay=0, output_dir=config.output_dir + "-2"))
    assert torch.equal(unlimited, high)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its devices and its precision for the life of a process."""
    reset_accelerate()
    yield
    reset_accelerate()


def reset_accelerate() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(("method", "kind"), [("residual", "sd2"), ("text_encoder", "sd2"), ("residual", "xl")])
def test_bfloat16_learns_nearly_the_same(
    config: TrainConfig, method: str, kind: str, finished_runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: True)  # or it would be replaced
    exact = finished_runs(method, kind)[1]
    reset_accelerate()
    rough = learn(replace(config, method=method, mixed_precision="bf16"))
    assert torch.cosine_similarity(exact, rough).min() > 0.8
    assert not torch.equal(exact, rough)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(("precision", "said_by"), [("bf16", "flag"), ("fp16", "flag"), ("bf16", "accelerate")])
def test_precision_that_the_processor_imitates_is_replaced_and_named(
    config: TrainConfig,
    precision: str,
    said_by: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: False)
    config = replace(config, max_train_steps=1)
    if said_by == "flag":
        config = replace(config, mixed_precision=precision)
    else:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    learn(config)
    assert f"{precision}, which this processor only imitates" in caplog.text
    assert yaml.safe_load((Path(config.output_dir) / "config.yaml").read_text())["mixed_precision"] == "no"


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("before", "after", "remedy"),
    [
        (
            "bf16",
            "no",
            "only imitates bf16, many times slower .* with a GPU or a processor that has bfloat16, or start",
        ),
        ("no", "bf16", "Use --mixed_precision no, "),
    ],
)
def test_a_run_does_not_change_its_precision_with_the_machine(
    config: TrainConfig, before: str, after: str, remedy: str, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = replace(config, mixed_precision="bf16", max_train_steps=2, lr_scheduler="constant")
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: before == "bf16")
    learn(config)
    learn(replace(config, resume_from_checkpoint="latest", max_train_steps=3))
    reset_accelerate()
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: after == "bf16")
    request.getfixturevalue("nothing_encoded")
    with pytest.raises(ValueError, match=rf"\(mixed_precision was '{before}', is '{after}'\). .*{remedy}") as refusal:
        train(replace(config, resume_from_checkpoint="latest", max_train_steps=3))
    assert "same values" not in str(refusal.value)  # the flag was the same
    with pytest.raises(ValueError, match=rf"seed was 0, is 1\).*{remedy.rpartition(', ')[0]}.* the same values"):
        train(replace(config, resume_from_checkpoint="latest", max_train_steps=3, seed=1))


@pytest.mark.parametrize(
    ("onednn", "processor", "held_to", "machine", "quick"),
    [
        (True, "_is_avx512_bf16_supported", None, "x86_64", True),
        (True, "_is_amx_tile_supported", "AVX512_CORE_AMX", "AMD64", True),
        (True, None, None, "x86_64", False),  # AVX-512 alone
        (True, None, None, "aarch64", True),
        (False, "_is_avx512_bf16_supported", "AVX2", "x86_64", False),
        (None, "_is_avx512_bf16_supported", None, "x86_64", False),  # torch was built without oneDNN
        (True, "_is_avx512_bf16_supported", "avx512_core_vnni", "x86_64", False),
    ],
)
def test_processors_with_and_without_bfloat16(
    onednn: bool | None,
    processor: str | None,
    held_to: str | None,
    machine: str,
    quick: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn is not None)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn is not False, raising=False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == processor, raising=False)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if held_to:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held_to)
    assert devices.cpu_has_bfloat16() is quick
    assert devices.quick_dtype("cpu") == (torch.bfloat16 if quick else torch.float32)
    assert devices.quick_dtype("cuda:0") == torch.float16


def test_epsilon_base_with_crops_flips_and_constant_rate(config: TrainConfig, tiny_base: dict[str, str]) -> None:
    config = replace(
        config,
        pretrained_model_name_or_path=tiny_base["sd1"],
        num_crops=2,
        random_flip=True,
        aspect_ratio_buckets=False,
        lr_scheduler="constant",
        max_train_steps=2,
    )
    assert learn(config).abs().max() > 0
    learn(replace(config, max_train_steps=3, resume_from_checkpoint="latest"))  # a constant rate can go on for longer


def test_masks_restrict_what_is_learnt(config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "masked"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 4), np.uint8)
    pixels[..., 3] = 0
    pixels[8:24, 8:24, 3] = 255
    Image.fromarray(pixels).save(folder / "a.png")
    config = replace(config, instance_data_dir=str(folder))
    with caplog.at_level(logging.INFO):
        masked = learn(config)
    assert "1 pictures, 1 masks in use" in caplog.text
    assert "one picture only" in caplog.text
    unmasked = learn(replace(config, use_masks=False, output_dir=config.output_dir + "-2"))
    assert not torch.equal(masked, unmasked)


def test_captions_are_learnt_with_their_pictures(
    config: TrainConfig, whole: torch.Tensor, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "captioned"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "0.txt").write_text("a {} in the snow")
    captioned = learn(replace(config, instance_data_dir=str(folder)))
    assert not torch.equal(captioned, whole)
    (folder / "0.txt").write_text("a dog")
    with pytest.raises(ValueError, match=r"caption of .*0\.png: 'a dog' does not say 'person'"):
        train(replace(config, instance_data_dir=str(folder), overwrite_output_dir=True))


def test_pictures_with_next_to_nothing_in_them_are_skipped_or_refused(
    config: TrainConfig, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(pictures, folder)
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("RGB", (3000, 4)).save(folder / "line.png")
    config = replace(config, instance_data_dir=str(folder), max_train_steps=1)
    with caplog.at_level(logging.INFO):
        learn(config)
    assert "3 pictures" in caplog.text
    for name, size in (("pixel", "1 x 1"), ("line", "3000 x 4")):
        assert f"{folder / name}.png: cannot be used: it is {size}, too small" in caplog.text
    with pytest.raises(ValueError, match=r"line\.png: .*3000 x 4.*--strict"):
        train(replace(config, strict=True, overwrite_output_dir=True))
    for name in ("0.png", "1.png", "2.png", "line.png"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"none of the 1 picture\(s\) in .*odd' can be used"):
        train(replace(config, overwrite_output_dir=True))


@both_architectures
def test_prior_preservation_draws_missing_class_pictures(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, method="text_encoder", max_train_steps=2)
    with_prior = replace(
        config,
        with_prior_preservation=True,
        class_data_dir=str(tmp_path / "class"),
        num_class_images=2,
        output_dir=config.output_dir + "-2",
    )
    preserved = learn(with_prior)
    drawn = list((tmp_path / "class").glob("*.png"))
    assert len(drawn) == 2
    assert all(np.asarray(Image.open(path)).std() > 0 for path in drawn)
    assert not torch.equal(preserved, learn(config))
    assert torch.equal(preserved, learn(replace(with_prior, resume_from_checkpoint="latest")))
    (tmp_path / "class" / "class-0000.png").rename(tmp_path / "class" / "mine.png")
    with pytest.raises(ValueError, match=r"belongs to another run .pictures was"):
        train(replace(with_prior, resume_from_checkpoint="latest"))
    # A picture that the user brought counts.
    assert sorted(path.name for path in (tmp_path / "class").iterdir()) == ["class-0001.png", "mine.png"]


def test_validation_keeps_the_best_checkpoint(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, validation=True, checkpointing_steps=1, learning_rate=0.5, lr_scheduler="constant")
    best = train(config)["petrucci"]
    progress = json.loads((Path(config.output_dir) / "checkpoint-4" / "progress.json").read_text())
    scores = {int(step): score for step, score in progress["scores"].items()}
    assert sorted(scores) == [1, 2, 3, 4]
    assert best.metadata["steps"] == min(scores, key=lambda step: scores[step])
    at_best = replace(config, output_dir=config.output_dir + "-2", max_train_steps=best.metadata["steps"])
    assert torch.equal(learn(at_best), best.delta)


def test_a_picture_that_scores_is_not_learnt(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def draw(concept: Concept, *rest: Any) -> Any:
        seen.append(concept)
        raise InterruptedError

    monkeypatch.setattr(loop, "draw_batch", draw)
    with pytest.raises(InterruptedError):
        train(replace(config, validation=True))
    (concept,) = seen
    assert (len(concept.pictures), len(concept.held_out)) == (2, 1)
    assert not {id(picture) for picture in concept.pictures} & {id(picture) for picture in concept.held_out}


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("residual", {"snr_gamma": 0.5}),
        ("residual", {"noise_offset": 0.5}),
        ("residual", {"key_preservation": 1.0}),
        ("residual", {"weight_decay": 0.9}),
        ("residual", {"max_grad_norm": 1e-9}),
        ("residual", {"adam_beta1": 0.1}),
        ("residual", {"adam_beta2": 0.1}),
        ("residual", {"adam_epsilon": 1.0}),
        ("residual", {"lr_scheduler": "linear"}),
        ("residual", {"lr_warmup_steps": 2}),
        ("residual", {"learning_rate": 0.01}),
        ("residual", {"random_flip": True}),
        ("residual", {"num_crops": 3}),
        ("residual", {"aspect_ratio_buckets": False}),
        ("residual", {"templates": ["the {}"]}),
        ("residual", {"seed": 1}),
        ("text_encoder", {"preservation_before": 10.0}),
        ("text_encoder", {"preservation_after": 10.0}),
        ("lora", {"lora_rank": 1}),
    ],
    ids=str,
)
def test_every_flag_has_a_say_in_what_is_learnt(
    config: TrainConfig, method: str, flags: dict[str, Any], finished_runs: Any
) -> None:
    assert not torch.equal(learn(replace(config, method=method, **flags)), finished_runs(method)[1])


def test_the_rate_follows_its_schedule(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    learn(replace(config, lr_scheduler="linear", learning_rate=0.4))
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])


@both_architectures
def test_validation_pictures_show_the_subject(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    embeds, settings = [], []

    def generate(models: Any, prompt_embeds: torch.Tensor, *rest: Any, **_: Any) -> list[Image.Image]:
        embeds.append(prompt_embeds)
        settings.append((rest[-1].validation_inference_steps, rest[-1].validation_guidance_scale))
        return [Image.new("RGB", (8, 8))] * len(prompt_embeds)

    monkeypatch.setattr(results, "generate", generate)
    config = replace(config, validation_guidance_scale=3.0, validation_inference_steps=7)
    delta = learn(replace(config, learning_rate=1.0))
    learn(replace(config, overwrite_output_dir=True, learning_rate=0.0))
    with_subject, plain = embeds
    moved = (with_subject - plain)[0].abs().sum(dim=-1).nonzero()
    assert len(moved) == len(delta) == 1
    torch.testing.assert_close((with_subject - plain)[0, moved[0, 0]], delta[0], atol=1e-5, rtol=1e-4)
    assert settings == [(7, 3.0)] * 2


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_denoising_loss_is_of_what_the_base_predicts(prediction_type: str) -> None:
    """A UNet that knows the answer has no loss, one that gives the other kind of answer has."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type=prediction_type)
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    samples = [Sample(*pair, None, timestep, 0) for *pair, timestep in zip(latents, noise, (100, 700), strict=True)]
    timesteps = torch.tensor([100, 700])
    answers = {"epsilon": noise, "v_prediction": scheduler.get_velocity(latents, noise, timesteps)}
    noisy = scheduler.add_noise(latents, noise, timesteps)

    def loss_of(answer: torch.Tensor) -> float:
        def unet(sample: torch.Tensor, at: torch.Tensor, embeds: torch.Tensor, return_dict: bool) -> list[torch.Tensor]:
            assert torch.equal(sample, noisy) and torch.equal(at, timesteps)
            return [answer]

        models: Any = SimpleNamespace(noise_scheduler=scheduler, unet=unet, dtype=torch.float32)
        return float(denoising_loss(samples, torch.zeros(2, 3, 5), models, None))

    assert loss_of(answers.pop(prediction_type)) == 0
    assert loss_of(*answers.values()) > 0.1


def test_views_are_the_pictures_latents_and_their_mirror_images(config: TrainConfig) -> None:
    """The stand-in for a VAE takes the mean of each channel's blocks of 4 x 4 pixels."""

    def encode(pixels: torch.Tensor) -> Any:
        latents = torch.nn.functional.avg_pool2d(pixels, 4)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    vae = SimpleNamespace(encode=encode, config=SimpleNamespace(scaling_factor=0.5), dtype=torch.float32)
    models: Any = SimpleNamespace(vae=vae, device="cpu", dtype=torch.float32, size_multiple=8)
    values = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    mask = np.zeros((16, 32), np.uint8)
    mask[:, :6] = 255
    picture = Picture(Path("a.png"), Image.fromarray(values), Image.fromarray(mask), None)
    flags = replace(config, resolution=23, random_flip=True)
    view, mirrored = encode_picture(picture, flags, models)
    assert (view.time_ids, mirrored.time_ids) == ((16, 32, 0, 0, 16, 32),) * 2
    expected = torch.from_numpy(values).permute(2, 0, 1).float().unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4))
    torch.testing.assert_close(view.latents, (expected / 127.5 - 1) * 0.5)
    torch.testing.assert_close(mirrored.latents, view.latents.flip(-1))
    assert view.mask is not None and mirrored.mask is not None
    assert view.mask[0, 0].tolist() == [1, 0.5, 0, 0, 0, 0, 0, 0]
    assert torch.equal(mirrored.mask, view.mask.flip(-1))
    assert len(encode_picture(picture, replace(flags, num_crops=3), models)) == 6
    in_the_middle = replace(picture, mask=None)
    (square,) = encode_picture(in_the_middle, replace(config, resolution=16, aspect_ratio_buckets=False), models)
    assert square.latents.shape == (3, 4, 4)
    assert square.time_ids == (16, 32, 0, 8, 16, 16)
    shrunk = replace(flags, resolution=8, aspect_ratio_buckets=False, num_crops=9)
    views = encode_picture(in_the_middle, shrunk, models)
    for one, mirror in zip(views[::2], views[1::2], strict=True):  # of a picture of 16 x 8, or somewhat larger
        assert (one.time_ids[:2], one.time_ids[4:]) == (mirror.time_ids[:2], mirror.time_ids[4:]) == ((16, 32), (8, 8))
        assert one.time_ids[2] == mirror.time_ids[2]
        assert 16 - 1 <= one.time_ids[3] + 8 + mirror.time_ids[3] <= 16 / 0.8 + 1
    assert any(one.time_ids[3] != mirror.time_ids[3] for one, mirror in zip(views[::2], views[1::2], strict=True))


def test_the_class_counts_by_its_weight_and_leaves_the_subject_its_own(config: TrainConfig) -> None:
    latents = torch.zeros(4, 4, 4)
    subject, of_class = (TrainingPicture([View(latents, None)], [row]) for row in (0, 1))
    flags = replace(config, method="lora", prior_loss_weight=0.25, train_batch_size=2)
    concept: Any = SimpleNamespace(config=flags, pictures=[subject], class_pictures=[of_class])
    accelerator: Any = SimpleNamespace(num_processes=1, process_index=0)
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
    samples = draw_batch(concept, 0, 0, accelerator, SimpleNamespace(noise_scheduler=scheduler))  # type: ignore[arg-type]
    assert [(sample.row, sample.weight) for sample in samples] == [(0, 2.0), (0, 2.0), (1, 0.5), (1, 0.5)]
    assert not torch.equal(samples[0].noise, samples[2].noise)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"instance_prompt": None}, "--instance_prompt: is empty"),
        ({"instance_prompt": "a photo of a {}"}, "class phrase alone"),
        ({"instance_prompt": "<person>"}, "--instance_prompt: .*without '<' and '>'"),
        ({"instance_prompt": "red guitar", "token_num": 1}, r"is 2 tokens, \['red</w>', 'guitar</w>'\]"),
        ({"instance_data_dir": None}, "--instance_data_dir: missing"),
        ({"resolution": 33}, "--resolution: 33; this base needs a multiple of 8"),
        ({"templates": ["a " * 80 + "{}"]}, "--templates: 'a a .* does not say 'person' as words of their own"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing_behind(config: TrainConfig, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train(replace(config, **values))
    assert not Path(config.output_dir).exists()


def test_a_refused_run_removes_the_folders_that_it_made_and_no_others(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for output in ("there", "new/runs/ada", "there/ada"):
        with pytest.raises(ValueError, match="--token_num"):
            train(replace(config, output_dir=str(tmp_path / output), token_num=9))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert not list((tmp_path / "there").iterdir())


def test_name_that_no_prompt_can_say_is_refused_before_anything_else(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, output_dir=str(tmp_path / "my dog"), pretrained_model_name_or_path="nowhere")
    with pytest.raises(ValueError, match=r"--name .*output folder.*'my dog'"):
        train(config)
    assert not (tmp_path / "my dog").exists()


def test_memory_that_runs_out_says_what_takes_less(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loading, "load_unet", run_out)
    assert main(as_flags(config)) == 1
    assert "--train_batch_size" in caplog.text


def test_errors_end_the_command_with_one_line(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    assert main(as_flags(replace(config, instance_data_dir="nowhere"))) == 1
    assert "error: --instance_data_dir: 'nowhere' is not a folder" in caplog.text


def test_push_to_hub_sends_the_adapter_with_its_pictures(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled

    pushed = []

    def push(source: Path, repo_id: str, **options: Any) -> Any:
        assert are_progress_bars_disabled() != sys.stderr.isatty()
        pushed.append((Path(source).name, repo_id, options["private"], [prompt for prompt, _ in options["samples"]]))
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(results, "push_subject_to_hub", push)
    monkeypatch.setattr(results, "whoami", lambda: {"name": "me"})
    config = replace(config, push_to_hub=True, hub_private=True, max_train_steps=1)
    learn(config)
    learn(replace(config, hub_model_id="dog", overwrite_output_dir=True))
    learn(replace(config, hub_model_id="band/dog", overwrite_output_dir=True))
    assert pushed == [
        ("petrucci.safetensors", repo_id, True, ["a photo of a person"])
        for repo_id in ("me/petrucci", "me/dog", "band/dog")
    ]


def test_push_without_login_is_refused_before_models_load(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError

    def refuse() -> None:
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(results, "whoami", refuse)
    with pytest.raises(OSError, match="hf auth login"):
        train(replace(config, push_to_hub=True, pretrained_model_name_or_path="nowhere"))


def test_failed_push_leaves_the_adapter_and_says_how_to_push_it(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(results, "push_subject_to_hub", fail)
    monkeypatch.setattr(results, "whoami", lambda: {"name": "me"})
    with pytest.raises(OSError, match=r"no network; .*multisubject push .*petrucci\.safetensors me/petrucci"):
        train(replace(config, push_to_hub=True))
    assert (Path(config.output_dir) / "petrucci.safetensors").exists()


def test_tracker_gets_every_loss_and_is_closed(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.tracking as tracking

    class Notebook(tracking.GeneralTracker):
        name = "notebook"
        requires_logging_directory = False
        entries: list[Any] = []  # noqa: RUF012

        def __init__(self, run_name: str, **_: Any) -> None:
            super().__init__()

        @property
        def tracker(self) -> Any:
            return self

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.entries.append(values["seed"])

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            self.entries.append((step, *values))

        def finish(self) -> None:
            self.entries.append("closed")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    learn(replace(config, report_to="notebook", max_train_steps=2))
    logged = ("petrucci/loss", "petrucci/learning_rate")
    assert Notebook.entries == [0, (1, *logged), (2, *logged), "closed"]


def test_missing_tracker_says_what_to_install(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.tracking as tracking

    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match="pip install wandb"):
        train(replace(config, report_to="wandb"))


@pytest.mark.slow
def test_seed_command_runs_as_written(config: TrainConfig, tmp_path: Path) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    script = Path(trainer.__file__)
    command = [
        str(script),
        f"--pretrained_model_name_or_path={config.pretrained_model_name_or_path}",
        f"--instance_data_dir={config.instance_data_dir}",
        "--instance_prompt=person",
        "--token_num=1",
        f"--output_dir={tmp_path / 'slash'}",
        "--resolution=64",
        "--train_batch_size=1",
        "--max_train_steps=2",
        "--validation_inference_steps=1",
    ]
    launch_command(launch_command_parser().parse_args(command))  # the command `accelerate launch`
    assert torch.load(tmp_path / "slash" / "residual.pt", weights_only=True).shape == (1, 32)
    assert (tmp_path / "slash" / "slash.safetensors").exists()


TRAIN_EACH = """
import json, sys
from multisubject.train_residual import parse_config, train
for flags in json.loads(sys.argv[1]):
    train(parse_config(flags))
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_twice_the_batch(
    config: TrainConfig, tiny_base: dict[str, str], tmp_path: Path
) -> None:
    halves = {
        f"{method}-{kind}": replace(
            config,
            method=method,
            train_batch_size=1,
            pretrained_model_name_or_path=tiny_base[kind],
            output_dir=str(tmp_path / f"{method}-{kind}"),
        )
        for kind in ("sd2", "xl")
        for method in METHODS
    }
    ranks = run_in_two_processes("-c", TRAIN_EACH, json.dumps([as_flags(half) for half in halves.values()]))
    assert [rank.code for rank in ranks] == [0, 0], ranks
    for name, half in halves.items():
        output = Path(half.output_dir)
        assert (output / "checkpoint-4" / "random_states_1.pkl").exists()  # there was a second process
        (subject,) = load_subject(output / f"{name}.safetensors").values()
        two = torch.cat([*subject.deltas.values()], dim=-1)
        one = learn(replace(half, train_batch_size=2, output_dir=str(tmp_path / f"{name}-one")))
        torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-3)
        # A checkpoint of two processes goes on in one that sees the same batch.
        resumed = learn(replace(half, train_batch_size=2, resume_from_checkpoint=str(output / "checkpoint-2")))
        torch.testing.assert_close(resumed, one, atol=1e-4, rtol=1e-3)


def test_a_subject_names_its_base_without_the_way_to_it(tmp_path):
    given = [None, str(EMBEDDED_BASE), str(EMBEDDED_BASE_XL), str(tmp_path), "user/base"]
    names = [base_model_name(SimpleNamespace(pretrained_model_name_or_path=base)) for base in given]
    assert names == ["tiny_world", "tiny_world", "tiny_world_xl", tmp_path.name, "user/base"]
