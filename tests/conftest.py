"""Shared fixtures: pipelines like Stable Diffusion 1.x, 2.x and XL, of random weights, small enough for any machine.

Their UNets have cross-attention at three resolutions, their tokenizer is the embedded base's real `CLIPTokenizer`.
diffusers is imported inside the fixtures, so that tests of plain data do not wait for it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# One thread, here and in child processes, and before torch reads it: runs that are compared with one another must sum
# in the same order.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from multisubject.tiny_world import EMBEDDED_BASE

EMBED_DIM, EMBED_DIM_2 = 32, 48
FAST_TRAINING = ["--train_batch_size=1", "--validation_inference_steps=1", "--validation_prompts", "a photo of a {}"]


def assert_equal_up_to_rounding(actual: torch.Tensor, expected: torch.Tensor, roundings: float = 100) -> None:
    """The same numbers by two ways: they differ by rounding, a share of the values' own size in their dtype.

    Processors sum in different orders, so that a tolerance which one of them needs says nothing about the next one.

    Args:
        actual, expected: of one shape and dtype.
        roundings: how many of the dtype's roundings may add up: 100 for one call of a tiny UNet, 500 for a short run of
            it. That is some ten times what was seen on processors with AVX-512, with AVX2 and with SSE alone.
    """
    size = float(expected.abs().max())
    tolerance = roundings * torch.finfo(expected.dtype).eps * size
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def pytest_configure() -> None:
    """A shell starts background jobs with SIGINT ignored; the tests of interrupts need Python's own handling of it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test's own random weights and noise are the same whatever ran before it. (Wider fixtures come before.)"""
    torch.manual_seed(4711)  # not the 0 that tests give to generators of their own


@pytest.fixture(scope="session")
def base_path() -> str:
    """Folder of the embedded base, in diffusers' format."""
    return str(EMBEDDED_BASE)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(EMBEDDED_BASE / "tokenizer")


def make_components(tokenizer: Any, kind: str) -> dict[str, Any]:
    """Components of a tiny pipeline: `sd1` predicts epsilon with convolutional projections, `sd2` v with linear ones,
    `xl` has two text encoders, a pooled embedding, and cross-attention at two of three resolutions.

    Pictures are 32 x 32 by default, latents 16 x 16.
    """
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    is_xl, projection = kind == "xl", 24
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    blocks = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
    special: dict[str, Any] = {}
    if is_xl:
        blocks = ("DownBlock2D", *blocks[0][1:]), (*blocks[1][1:], "UpBlock2D")
        special = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": projection + 6 * 8,
            "transformer_layers_per_block": (1, 1, 2),
        }
    with torch.random.fork_rng():
        torch.manual_seed({"sd1": 1, "sd2": 2, "xl": 3}[kind])
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            down_block_types=blocks[0],
            up_block_types=blocks[1],
            cross_attention_dim=EMBED_DIM + EMBED_DIM_2 if is_xl else EMBED_DIM,
            attention_head_dim=2 if kind == "sd1" else (2, 4, 4),  # diffusers' misnomer: the number of heads
            use_linear_projection=kind != "sd1",
            norm_num_groups=8,
            **special,
        )
        vae = make_vae(levels=2)
        text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=EMBED_DIM, **text))
        models = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
        if is_xl:
            config = CLIPTextConfig(hidden_size=EMBED_DIM_2, projection_dim=projection, **text)
            models["text_encoder_2"] = CLIPTextModelWithProjection(config)
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    for model in models.values():
        model.eval().requires_grad_(False)
    if is_xl:
        return models | {
            "tokenizer": tokenizer,
            "tokenizer_2": type(tokenizer).from_pretrained(tokenizer.name_or_path, pad_token="!"),  # as XL's own
            "scheduler": EulerDiscreteScheduler(**noise),
        }
    return models | {
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(
            **noise,
            clip_sample=False,
            set_alpha_to_one=False,
            prediction_type="epsilon" if kind == "sd1" else "v_prediction",
        ),
        "safety_checker": None,
        "feature_extractor": None,
    }


def make_vae(levels: int) -> Any:
    """A VAE of random weights, for latents of 16 x 16; each level but one halves the picture."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16 * 2 ** (levels - 1),
    )


@pytest.fixture(scope="session")
def base_128_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the embedded base with a random VAE of four levels: latents of 16 x 16, pictures of 128 x 128."""
    folder = shutil.copytree(EMBEDDED_BASE, tmp_path_factory.mktemp("base_128") / "base")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        make_vae(levels=4).save_pretrained(folder / "vae")
    return str(folder)


@pytest.fixture(scope="session")
def tiny_components(tokenizer: Any) -> dict[str, dict[str, Any]]:
    """`sd1`, `sd2` and `xl` -> components, made once: leave the models as they are, replace schedulers instead."""
    return {kind: make_components(tokenizer, kind) for kind in ("sd1", "sd2", "xl")}


def make_pipeline(components: dict[str, Any], kind: Any = None) -> Any:
    """A pipeline around shared models, with a scheduler of its own.

    Args:
        components: of `make_components`, or of another pipeline.
        kind: its class; None: the project's own for these components.
    """
    from multisubject.pipeline_multisubject import MultiSubjectPipeline
    from multisubject.pipeline_multisubject_xl import MultiSubjectXLPipeline

    is_xl = "text_encoder_2" in components
    kind = kind or (MultiSubjectXLPipeline if is_xl else MultiSubjectPipeline)
    scheduler = type(components["scheduler"]).from_config(components["scheduler"].config)
    options = {"add_watermarker": False} if is_xl else {"requires_safety_checker": False}
    pipe = kind(**{**components, "scheduler": scheduler}, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def sd1_pipe(tiny_components: dict[str, dict[str, Any]]) -> Any:
    return make_pipeline(tiny_components["sd1"])


@pytest.fixture
def sd2_pipe(tiny_components: dict[str, dict[str, Any]]) -> Any:
    return make_pipeline(tiny_components["sd2"])


@pytest.fixture
def xl_pipe(tiny_components: dict[str, dict[str, Any]]) -> Any:
    return make_pipeline(tiny_components["xl"])


@pytest.fixture(scope="session")
def xl_base_path(tiny_components: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the tiny `xl` base, in diffusers' format."""
    from diffusers import StableDiffusionXLPipeline

    folder = tmp_path_factory.mktemp("xl")
    make_pipeline(tiny_components["xl"], StableDiffusionXLPipeline).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def xl_embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the drawn world's subjects with random deltas that fit the tiny `xl` base."""
    from multisubject.hub_utils import save_subject
    from multisubject.residual_embeddings import ResidualEmbedding
    from multisubject.tiny_world.subjects import SUBJECTS

    folder, generator = tmp_path_factory.mktemp("xl_embeddings"), torch.Generator().manual_seed(0)
    for name, subject in SUBJECTS.items():
        widths = {"text_encoder": EMBED_DIM, "text_encoder_2": EMBED_DIM_2}
        deltas = {encoder: torch.randn(1, width, generator=generator) for encoder, width in widths.items()}
        save_subject(ResidualEmbedding(subject.category, deltas), folder / f"{name}.safetensors", name=name)
    return folder


def write_ip_adapter(base: str | Path, folder: Path, name: str = "ip-adapter", seed: int = 0) -> str:
    """A random IP-Adapter of a base, and the folder `image_encoder` beside it, in the form of the released ones: its
    file."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    layers = [unet.get_submodule(key.removesuffix(".processor")) for key in unet.attn_processors if "attn2" in key]
    generator, dim, width = torch.Generator().manual_seed(seed), unet.config.cross_attention_dim, 16
    weights = {
        "image_proj.proj.weight": torch.randn(4 * dim, width, generator=generator),
        "image_proj.proj.bias": torch.zeros(4 * dim),
        "image_proj.norm.weight": torch.ones(dim),
        "image_proj.norm.bias": torch.zeros(dim),
    }
    for index, layer in enumerate(layers):
        for part in "kv":
            shape = layer.inner_dim, dim
            weights[f"ip_adapter.{2 * index + 1}.to_{part}_ip.weight"] = torch.randn(*shape, generator=generator)
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / f"{name}.safetensors")
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=width,
    )  # fmt: skip
    if not (folder / "image_encoder").exists():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    return f"{folder.as_posix()}/{name}.safetensors"


def find_port() -> int:
    """A port that nobody listened at a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    return find_port()


@pytest.fixture(scope="session")
def page_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page on the embedded base, as `serve_page` serves it."""
    with serve_page(tmp_path_factory) as served:
        yield served


@contextmanager
def serve_page(tmp_path_factory: pytest.TempPathFactory, *flags: str) -> Iterator[Any]:
    """The page on a free port, with these options: `url`, `service` and the folders `output` and `work`."""
    from types import SimpleNamespace

    from multisubject.generation.arguments import DataclassParser, IPAdapterArguments, parse_arguments
    from multisubject.page import server

    port = find_port()
    work, output = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("output")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(work / "gradio"))
        argv = ["--port", str(port), "--output_dir", str(output), "--device", "cpu", "--no_open_browser", *flags]
        parser = DataclassParser([server.PageArguments, IPAdapterArguments])
        options, adapters = parse_arguments(parser, argv)
        page, service = server.make_page(options, work, adapters)
        server.launch(page, options)
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", service=service, output=output, work=work)
        page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, see `browser.py`."""
    from browser import started

    with started() as made:
        yield made


@pytest.fixture(scope="module")
def base(base_path: str) -> Any:
    """The embedded base's small files."""
    from multisubject.generation.base_model import BaseModel

    return BaseModel.read(base_path)


@pytest.fixture
def library(base: Any, tmp_path: Path) -> Any:
    """An empty library of subjects of the embedded base."""
    from multisubject.base_models import load_text_encoders
    from multisubject.page.subjects import SubjectLibrary

    return SubjectLibrary(base, load_text_encoders(base.name), tmp_path / "subjects")


@pytest.fixture
def jobs(base: Any, library: Any, tmp_path: Path) -> Iterator[Any]:
    """No trainings yet, and those that come are as fast as can be."""
    from multisubject.page.training import TrainingJobs

    made = TrainingJobs(base, library, tmp_path / "trainings", on_cpu=True, options=FAST_TRAINING)
    yield made
    made.close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A Hub, and a client that talks to it alone, logged in as `user`, with an empty cache and little patience."""
    import time
    from types import SimpleNamespace

    from hub_server import LoopbackHub
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from multisubject import hub_client

    with LoopbackHub({"hf_" + "t" * 34: "user", "hf_" + "g" * 34: "guest"}) as server:
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_client, "RETRY_WAIT_SECONDS", 0.01)
        monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
        yield server
