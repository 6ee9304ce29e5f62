"""What region guidance costs: guided calls against plain ones of the same number of UNet calls, in one run.

    python benchmarks/speed.py                    # embedded base, and a random UNet of Stable Diffusion 1.5's shape
    python benchmarks/speed.py --model embedded --pairs 15
    python benchmarks/speed.py --model sdxl-tiny --cpu_time      # Stable Diffusion XL's structure with thin layers
    python benchmarks/speed.py --model embedded --regions 20     # of 75 tokens of their own each
    python benchmarks/speed.py --model embedded --loras --cpu_time    # two LoRAs in regions against everywhere
    python benchmarks/speed.py --device cuda --dtype float16 --sd15_latents 64
    python benchmarks/speed.py --device cuda --dtype float16 --model sdxl        # its true shape: 2.6 billion weights

Plain and guided calls alternate, so that a machine that slows down slows both; the ratio is the median over the pairs.
Peak memory is the process's resident set on the CPU (Linux), weights included, and torch's allocations on a GPU. Thin
layers overstate its ratio: the keys that are kept of the prompt grow with the width, weights with its square.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from multisubject.benchmarks.bases import ROOT
from multisubject.command_line import CommandParser
from multisubject.guidance_methods import GUIDANCE_METHODS
from multisubject.pipeline_multisubject import MultiSubjectPipeline
from multisubject.pipeline_multisubject_xl import MultiSubjectXLPipeline
from multisubject.tiny_world import EMBEDDED_BASE
from multisubject.training.devices import quick_dtype

PROMPT = "a photo of a red dog and a blue ball"
LAYOUT = {"red dog": (0.05, 0.2, 0.45, 0.95), "blue ball": (0.55, 0.2, 0.95, 0.95)}
MOST_TIME, MOST_MEMORY = 1.05, 1.02
MOST_TIME_OF_LORAS = 1.10
LORAS = {"red dog": "biscuit", "blue ball": "majesty"}
"""Region -> a LoRA of `embeddings/loras`: what it has learnt does not matter here."""


def random_unet(model: str, width: int = 320, latent_size: int = 16) -> UNet2DConditionModel:
    """A UNet of the structure of Stable Diffusion 1.5 (`sd15`) or XL (`sdxl`), with random weights.

    Args:
        model: which structure: which blocks, how many layers and attention blocks, and what they read.
        width: channels of the first level, a multiple of 32; 320 gives the released models' shape.
        latent_size: height and width of what it denoises by default.
    """
    common: dict[str, Any] = {"sample_size": latent_size, "norm_num_groups": min(32, width // 2)}
    if model == "sd15":
        return UNet2DConditionModel(
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=sum(text_widths(model, width)),
            attention_head_dim=8,  # diffusers' misnomer: the number of heads, here and below
            **common,
        ).eval()
    cross, plain = "CrossAttn{}Block2D", "{}Block2D"
    return UNet2DConditionModel(
        down_block_types=tuple(kind.format("Down") for kind in (plain, cross, cross)),
        up_block_types=tuple(kind.format("Up") for kind in (cross, cross, plain)),
        block_out_channels=(width, 2 * width, 4 * width),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20) if width % 5 == 0 else (2, 4, 8),
        cross_attention_dim=sum(text_widths(model, width)),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=text_widths(model, width)[-1] + 6 * 256,
        **common,
    ).eval()


def text_widths(model: str, width: int = 320) -> tuple[int, ...]:
    """Columns of each text encoder's output, in proportion to the UNet's."""
    return tuple(columns * width // 320 for columns in ((768,) if model == "sd15" else (768, 1280)))


def random_pipeline(model: str, width: int, latent_size: int, device: str = "cpu") -> Any:
    """diffusers' own pipeline around `random_unet`, whose weights are drawn on `device`; text encoders and VAE, which
    both calls share, are stubs."""
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_BASE / "tokenizer")

    def text_config(columns: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=columns,
            intermediate_size=columns,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            projection_dim=columns,
        )

    first, *second = map(text_config, text_widths(model, width))
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    with torch.device(device):
        unet = random_unet(model, width, latent_size)
    components: dict[str, Any] = {
        "unet": unet,
        "vae": AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
        ).eval(),
        "text_encoder": CLIPTextModel(first).eval(),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False),
    }
    if not second:
        return StableDiffusionPipeline(
            **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    components |= {"text_encoder_2": CLIPTextModelWithProjection(second[0]).eval(), "tokenizer_2": tokenizer}
    return StableDiffusionXLPipeline(**components, add_watermarker=False)


def guided_pipeline(plain: Any) -> Any:
    """The project's pipeline around another's models."""
    is_xl = "text_encoder_2" in plain.components
    options = {"add_watermarker": False} if is_xl else {"requires_safety_checker": False}
    return (MultiSubjectXLPipeline if is_xl else MultiSubjectPipeline)(**plain.components, **options)


def measure(call: Callable[[], object], device: str, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds and peak MiB of one call (nan where the platform does not tell)."""
    gc.collect()
    peak = float("nan")
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what the last call freed must not count for this one
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident set
    start = clock()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = clock() - start
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated() / 2**20
    elif sys.platform == "linux":
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) / 2**10
    return seconds, peak


def regions_of_words(count: int) -> list[dict[str, Any]]:
    """A layout of columns, each with as many words of its own as a text encoder reads."""
    words = " ".join(["hat"] * 75)
    return [{"prompt": words, "box": (i / count, 0.0, (i + 1) / count, 1.0)} for i in range(count)]


def load_loras(pipe: Any) -> None:
    """Load `LORAS` and make them active everywhere."""
    for name in LORAS.values():
        pipe.load_lora_weights(str(ROOT / "embeddings" / "loras" / f"{name}.safetensors"), adapter_name=name)
    pipe.set_adapters([*LORAS.values()])


def compare(name: str, plain: Any, method: str, args: argparse.Namespace) -> bool:
    """Print one line of the table; True if both ratios are within their bounds."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    guided, layout = guided_pipeline(plain), regions_of_words(args.regions) if args.regions else LAYOUT
    if args.loras:
        load_loras(guided)
        layout = [{"subject": words, "box": LAYOUT[words], "lora": lora} for words, lora in LORAS.items()]
    for pipe in (plain, guided):
        pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": args.steps, "output_type": "latent"}

    def call_plain() -> object:
        if args.loras:
            return guided(PROMPT, layout=LAYOUT, guidance_method=method, **arguments)
        return plain(PROMPT, **arguments)

    def call_guided() -> object:
        return guided(PROMPT, layout=layout, guidance_method=method, **arguments)

    call_plain(), call_guided()  # warm up
    runs = []
    for pair in range(args.pairs):
        order = (call_plain, call_guided) if pair % 2 == 0 else (call_guided, call_plain)
        found = {call: measure(call, args.device, clock) for call in order}
        runs.append((*found[call_plain], *found[call_guided]))
    plain_time, plain_peak, guided_time, guided_peak = (statistics.median(column) for column in zip(*runs, strict=True))
    time_ratio = statistics.median(run[2] / run[0] for run in runs)
    memory_ratio = statistics.median(run[3] / run[1] for run in runs)
    size = plain.unet.config.sample_size
    print(f"| {name}, latents {size} x {size} | {method} | {args.steps} ", end="")
    print(
        f"| {plain_time:.2f} s | {guided_time:.2f} s | {time_ratio:.3f} |"
        f" {plain_peak:,.0f} MiB | {guided_peak:,.0f} MiB | {memory_ratio:.3f} |",
        flush=True,
    )
    return time_ratio <= (MOST_TIME_OF_LORAS if args.loras else MOST_TIME) and not memory_ratio > MOST_MEMORY


def main() -> None:
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model",
        choices=("embedded", "sd15", "both", "sdxl", "sdxl-tiny"),
        default="both",
        help="both: embedded and sd15; sdxl-tiny: SDXL's structure with a tenth of its channels (default: %(default)s)",
    )
    parser.add_argument("--guidance_method", nargs="+", choices=sorted(GUIDANCE_METHODS), default=["multisubject"])
    parser.add_argument("--regions", type=int, help="as many regions with 75 tokens of their own, not two phrases")
    parser.add_argument(
        "--loras",
        action="store_true",
        help="two LoRAs of the embedded base: guided calls with both active everywhere (in the columns `plain`) against"
        " the same calls with each in its region (`guided`)",
    )
    parser.add_argument("--pairs", type=int, default=9, help="pairs of a plain and a guided call")
    parser.add_argument("--steps", type=int, default=25, help="UNet calls of each")
    parser.add_argument("--sd15_latents", type=int, default=16, help="latent height and width for the SD 1.5 UNet")
    parser.add_argument(
        "--sdxl_latents", type=int, help="the same for SDXL's; default: 128 as released, 32 for sdxl-tiny"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="float32",
        help="auto: float16 on a GPU, bfloat16 on a processor that has it, else float32 (default: %(default)s)",
    )
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds of this process, for a busy machine")
    args = parser.parse_args()
    if args.model == "sdxl" and args.device == "cpu":
        parser.error(
            "--model sdxl has the 2.6 billion weights of the released UNet, 10 GB in float32; expected a GPU, as "
            "in --device cuda --dtype float16. --model sdxl-tiny has the same structure with thin layers."
        )
    if args.loras and (args.model != "embedded" or args.regions):
        parser.error(
            f"--loras are of the embedded base: expected --model embedded, without --regions; got {args.model}."
        )
    dtype = quick_dtype(args.device) if args.dtype == "auto" else getattr(torch, args.dtype)

    print(f"`python {' '.join(sys.argv)}`: {args.device}, {dtype}, {torch.get_num_threads()} threads, ", end="")
    print("CPU time, " if args.cpu_time else "wall time, ", end="")
    print(f"torch {torch.__version__}, {args.pairs} interleaved pairs, medians\n")
    print(
        "| base | method | UNet calls | plain | guided | ratio | plain peak | guided peak | ratio |\n"
        + "|---" * 9
        + "|"
    )
    bases = {
        "embedded": ("embedded base", lambda: StableDiffusionPipeline.from_pretrained(EMBEDDED_BASE)),
        "sd15": ("SD 1.5's UNet", lambda: random_pipeline("sd15", 320, args.sd15_latents)),
        "sdxl": ("SDXL's UNet", lambda: random_pipeline("sdxl", 320, args.sdxl_latents or 128, args.device)),
        "sdxl-tiny": (
            "SDXL's structure, a tenth as wide",
            lambda: random_pipeline("sdxl", 32, args.sdxl_latents or 32),
        ),
    }
    within = True
    for key in ("embedded", "sd15") if args.model == "both" else [args.model]:
        name, load = bases[key]
        plain = load().to(device=args.device, dtype=dtype)
        for method in args.guidance_method:
            within &= compare(name, plain, method, args)
    most_time = MOST_TIME_OF_LORAS if args.loras else MOST_TIME
    print(f"\n{'within' if within else 'NOT within'} {most_time} of the time and {MOST_MEMORY} of the memory")
    sys.exit(not within)


if __name__ == "__main__":
    main()
