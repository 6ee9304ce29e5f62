"""On a CUDA GPU, where there is one: half precision, offloading, and training, held against the CPU or the judge.

What needs no judge runs with the embedded base and with one of Stable Diffusion XL's shape and of random weights.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EMBED_DIM, EMBED_DIM_2, make_components, make_pipeline
from PIL import Image
from test_region_ip_adapters import embeddings, load_adapters

from multisubject.generation.picture_files import read_settings
from multisubject.guidance_methods import GUIDANCE_METHODS
from multisubject.hub_utils import load_subject, save_subject
from multisubject.residual_embeddings import ResidualEmbedding
from multisubject.tiny_world.judge import Judge
from multisubject.tiny_world.scenes import World
from multisubject.tiny_world.subjects import SUBJECTS, save_training_pictures

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.slow,
]

ROOT = Path(__file__).parents[1]
PROMPT = "a photo of a <petrucci> and a <majesty> on the beach"
LAYOUT = {"petrucci": (0.0, 0.1, 0.45, 1.0), "majesty": (0.5, 0.2, 1.0, 0.95)}


@dataclass(frozen=True)
class Base:
    """A base model, on disk.

    Args:
        path: its folder.
        is_xl: whether it is of Stable Diffusion XL's shape.
        subjects: the names of `PROMPT` -> files of subjects for this base.
    """

    path: str
    is_xl: bool
    subjects: dict[str, str]

    def load(self, dtype: torch.dtype, subjects: dict[str, str] | None = None) -> Any:
        """The pipeline, with its own or other subjects, on the CPU."""
        from multisubject.pipeline_multisubject import MultiSubjectPipeline
        from multisubject.pipeline_multisubject_xl import MultiSubjectXLPipeline

        pipe = (MultiSubjectXLPipeline if self.is_xl else MultiSubjectPipeline).from_pretrained(self.path, dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        for name, file in (self.subjects if subjects is None else subjects).items():
            pipe.load_subject(file, name=name)
        return pipe


@pytest.fixture(scope="module")
def embedded_base(base_path: str) -> Base:
    return Base(base_path, False, {name: str(ROOT / "embeddings" / f"{name}.safetensors") for name in LAYOUT})


@pytest.fixture(scope="module")
def random_xl_base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Random weights hardly listen to the prompt: cross-attention is made as strong as it is in trained ones, so that
    what guidance changes is well above rounding."""
    folder = tmp_path_factory.mktemp("random_xl")
    components = make_components(tokenizer, "xl")
    for name, module in components["unet"].named_modules():
        if name.endswith("attn2"):
            for projection in (module.to_q, module.to_k, module.to_v):
                projection.weight *= 4
    make_pipeline(components).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    widths, subjects = {"text_encoder": EMBED_DIM, "text_encoder_2": EMBED_DIM_2}, {}
    for name, phrase in (("petrucci", "person"), ("majesty", "guitar")):
        deltas = {encoder: torch.randn(1, width, generator=generator) for encoder, width in widths.items()}
        subjects[name] = str(folder / f"{name}.safetensors")
        save_subject(ResidualEmbedding(phrase, deltas), subjects[name])
    return Base(str(folder), True, subjects)


@pytest.fixture(params=["embedded_base", "random_xl_base"])
def base(request: pytest.FixtureRequest) -> Any:
    """A base of each architecture."""
    return request.getfixturevalue(request.param)


def draw(pipe: Any, count: int = 1, **settings: Any) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    settings = {"layout": [LAYOUT] * count, "num_inference_steps": 25, "guidance_scale": 5.0, **settings}
    return pipe([PROMPT] * count, generator=generators, **settings).images


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two pictures, in grey levels of 255."""
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())


@pytest.mark.parametrize("method", sorted(GUIDANCE_METHODS))
def test_pictures_of_the_gpu_are_those_of_the_cpu(base: Base, method: str) -> None:
    """The noise is given: drawn in another precision, from one seed, it may be other noise (before torch 2.13)."""
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    (expected,) = draw(base.load(torch.float32), guidance_method=method, latents=latents)
    (plain,) = draw(base.load(torch.float32), guidance_steps=0, latents=latents)
    changed = difference(expected, plain)
    for dtype, most in ((torch.float32, 0.05), (torch.float16, 0.2), (torch.bfloat16, 0.6)):
        (found,) = draw(base.load(dtype).to("cuda"), guidance_method=method, latents=latents.to(dtype))
        assert difference(found, expected) < most * changed, dtype


def test_prompts_are_encoded_on_the_gpu(base: Base) -> None:
    expected = base.load(torch.float32).encode_prompt(PROMPT)
    found = base.load(torch.float32).to("cuda").encode_prompt(PROMPT)
    assert len(found) == len(expected) == (4 if base.is_xl else 2)  # XL: also the pooled ones
    assert {embeds.device.type for embeds in found} == {"cuda"}
    torch.testing.assert_close([embeds.cpu() for embeds in found], [*expected], atol=1e-3, rtol=1e-3)


def test_half_precision_keeps_every_subject_in_its_place(embedded_base: Base) -> None:
    pictures = draw(embedded_base.load(torch.float16).to("cuda"), count=24)
    judge = Judge.load()
    for name, box in LAYOUT.items():
        verdicts = judge.classify(pictures, [box] * len(pictures))
        right = [verdict.category == SUBJECTS[name].category for verdict in verdicts]
        assert sum(right) >= 20, (name, sum(right))


@pytest.mark.parametrize("way", ["model", "sequential"])
def test_offloaded_models_draw_the_same_picture(base: Base, way: str) -> None:
    (expected,) = draw(base.load(torch.float16).to("cuda"))
    pipe = base.load(torch.float16)
    {"model": pipe.enable_model_cpu_offload, "sequential": pipe.enable_sequential_cpu_offload}[way]()
    (found,) = draw(pipe)
    assert difference(found, expected) < 1.0


def test_compiled_unet_draws_the_same_picture(base: Base) -> None:
    torch._dynamo.reset()  # what the other architecture left
    (expected,) = draw(base.load(torch.float32).to("cuda"))
    pipe = base.load(torch.float32).to("cuda")
    pipe.unet.compile(fullgraph=True)
    (found,) = draw(pipe)
    assert difference(found, expected) < 3.0
    resets = torch._dynamo.utils.counters["frames"]["total"]
    draw(pipe)
    assert torch._dynamo.utils.counters["frames"]["total"] == resets  # nothing is compiled anew


# --- what regions hold -----------------------------------------------------------------------------------------------

HELD = [
    {"subject": "person", "box": LAYOUT["petrucci"], "lora": "petrucci", "negative_prompt": "a dog"},
    {"prompt": "a guitar", "box": LAYOUT["majesty"], "lora": {"majesty": 0.9}, "ip_adapter_image": embeddings(1)},
]


def draw_held(pipe: Any, latents: torch.Tensor, layout: Any = HELD) -> Image.Image:
    prompt = "a photo of a person and a guitar on the beach"
    settings = {"num_inference_steps": 25, "guidance_scale": 5.0}
    return pipe(prompt, layout=layout, latents=latents.to(pipe.dtype), **settings).images[0]


@pytest.fixture
def held_latents() -> torch.Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def load_held(embedded_base: Base) -> Any:
    """The embedded base with two of its LoRAs and an IP-Adapter of random weights, in a precision, on the CPU."""

    def load(dtype: torch.dtype) -> Any:
        pipe = embedded_base.load(dtype, {})
        for name in LAYOUT:
            pipe.load_lora_weights(
                str(ROOT / "embeddings" / "loras"), weight_name=f"{name}.safetensors", adapter_name=name
            )
        load_adapters(pipe)
        return pipe

    return load


def test_what_regions_hold_is_on_the_gpu_what_it_is_on_the_cpu(load_held: Any, held_latents: torch.Tensor) -> None:
    expected = draw_held(load_held(torch.float32), held_latents)
    nothing = [{"box": LAYOUT["majesty"], "ip_adapter_image": torch.zeros_like(embeddings(1))}]
    changed = difference(expected, draw_held(load_held(torch.float32), held_latents, nothing))
    for dtype, most in ((torch.float32, 0.05), (torch.float16, 0.2), (torch.bfloat16, 0.6)):
        found = draw_held(load_held(dtype).to("cuda"), held_latents)
        assert difference(found, expected) < most * changed, dtype


@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_what_regions_hold_is_offloaded(load_held: Any, held_latents: torch.Tensor, way: str) -> None:
    expected = draw_held(load_held(torch.float16).to("cuda"), held_latents)
    pipe = load_held(torch.float16)
    getattr(pipe, way)()
    assert difference(draw_held(pipe, held_latents), expected) < 1.0


def test_what_regions_hold_is_compiled(load_held: Any, held_latents: torch.Tensor) -> None:
    torch._dynamo.reset()
    expected = draw_held(load_held(torch.float32).to("cuda"), held_latents)
    pipe = load_held(torch.float32).to("cuda")
    pipe.unet.compile(fullgraph=True)
    assert difference(draw_held(pipe, held_latents), expected) < 3.0


# --- training --------------------------------------------------------------------------------------------------------


def train(folder: Path, *flags: str) -> dict[str, Any]:
    """Learn comet in a process of its own, with the shipped configuration; its losses and its adapter."""
    save_training_pictures(folder / "data", World())
    command = [
        *(sys.executable, "-m", "multisubject.train_residual"),
        f"--config={ROOT / 'configs' / 'train_tiny_world.yaml'}",
        f"--instance_data_dir={folder / 'data' / 'comet'}",
        *("--instance_prompt=ball", "--name=comet", f"--output_dir={folder / 'comet'}"),
        *("--validation_inference_steps=1", "--validation_prompts=a photo of a {}", *flags),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = (folder / "comet" / "loss.csv").read_text().split()[1:]
    return {"losses": [float(row.split(",")[1]) for row in rows], "adapter": folder / "comet" / "comet.safetensors"}


def recognised(base: Base, adapter: Path) -> int:
    """In how many of 24 pictures the judge sees comet."""
    pipe = base.load(torch.float16, {"comet": str(adapter)}).to("cuda")
    generators = [torch.Generator().manual_seed(seed) for seed in range(24)]
    pictures = pipe(
        ["a picture of my <comet> in the snow"] * 24, generator=generators, num_inference_steps=20, guidance_scale=3.0
    ).images
    return sum(any(item.subject == "comet" for item in found) for found in Judge.load().detect(pictures))


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_a_subject_is_learnt_in_every_precision(embedded_base: Base, tmp_path: Path, precision: str) -> None:
    run = train(tmp_path, f"--mixed_precision={precision}", "--max_train_steps=150")
    assert recognised(embedded_base, run["adapter"]) >= 18


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_a_subject_of_xl_is_learnt_in_every_precision(random_xl_base: Base, tmp_path: Path, precision: str) -> None:
    """By a base of random weights there is nothing to recognise: the losses are numbers, and the pipeline draws it."""
    flags = (f"--mixed_precision={precision}", f"--pretrained_model_name_or_path={random_xl_base.path}")
    run = train(tmp_path, *flags, "--max_train_steps=4")
    assert len(run["losses"]) == 4 and np.isfinite(run["losses"]).all()
    learnt = load_subject(run["adapter"])["comet"].deltas
    assert [delta.shape for delta in learnt.values()] == [(1, EMBED_DIM), (1, EMBED_DIM_2)]
    assert all(delta.isfinite().all() and delta.any() for delta in learnt.values())
    pipe = random_xl_base.load(torch.float16, {"comet": str(run["adapter"])}).to("cuda")
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).half()
    pictures = []
    for active in ([], ["comet"]):
        pipe.set_subjects(active)
        pictures += pipe("a photo of a ball", latents=latents).images
    assert difference(*pictures) > 1.0


@pytest.mark.parametrize(
    "flags",
    [
        ("--method=text_encoder", "--learning_rate=1e-3", "--mixed_precision=fp16"),
        ("--method=text_encoder", "--learning_rate=1e-3", "--mixed_precision=bf16", "--gradient_checkpointing"),
        ("--method=lora", "--learning_rate=3e-3", "--mixed_precision=fp16"),
        ("--method=text_encoder", "--learning_rate=1e-3", "--optimizer=adamw8bit"),
    ],
    ids=" ".join,
)
def test_loss_falls_with_every_method(tmp_path: Path, flags: tuple[str, ...]) -> None:
    if "--optimizer=adamw8bit" in flags:
        pytest.importorskip("bitsandbytes")
    losses = train(tmp_path, *flags, "--max_train_steps=60")["losses"]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-20:]) < np.mean(losses[:20])


def test_prodigy_finds_its_rate(embedded_base: Base, tmp_path: Path) -> None:
    pytest.importorskip("prodigyopt")
    flags = ("--optimizer=prodigy", "--learning_rate=1", "--lr_scheduler=constant", "--mixed_precision=bf16")
    assert recognised(embedded_base, train(tmp_path, *flags, "--max_train_steps=300")["adapter"]) >= 18


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    flags = (
        "--max_train_steps=20",
        "--checkpointing_steps=10",
        "--mixed_precision=fp16",
    )
    whole = train(tmp_path, *flags, "--overwrite_output_dir")
    expected = load_subject(whole["adapter"])["comet"].delta
    shutil.rmtree(tmp_path / "comet" / "checkpoint-20")
    whole["adapter"].unlink()
    resumed = train(tmp_path, *flags, "--resume_from_checkpoint=latest")
    assert resumed["losses"][:10] == whole["losses"][:10]
    # Convolutions of a GPU do not add up in a fixed order.
    found = load_subject(resumed["adapter"])["comet"].delta
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.std()))


def test_commands_use_the_gpu(base: Base, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps([{"prompt": PROMPT, "residual_dict": base.subjects, "layout": LAYOUT}]))
    command = [sys.executable, "-m", "multisubject.generate_images", "--output_dir", str(tmp_path)]
    command += ["--generation_config", str(config), "--pretrained_model_name", base.path, "--num_images", "2"]
    done = subprocess.run([*command, "--num_inference_steps", "10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    pictures = sorted(tmp_path.rglob("[0-9]*.png"))
    assert len(pictures) == 2
    assert all(read_settings(picture)["dtype"] == "float16" for picture in pictures)
