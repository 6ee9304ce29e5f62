"""What region guidance costs: guided calls against plain ones of the same number of UNet calls, in one run.

    python benchmarks/speed.py                    # embedded base, and a random UNet of Stable Diffusion 1.5's shape
    python benchmarks/speed.py --model embedded --pairs 15
    python benchmarks/speed.py --device cuda --dtype float16 --sd15_latents 64

Plain and guided calls alternate, so that a machine that slows down slows both; the ratio is the median over the pairs.
Peak memory is the process's resident set on the CPU (Linux), weights included, and torch's allocations on a GPU.
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

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from multisubject.guidance_methods import GUIDANCE_METHODS
from multisubject.pipeline_multisubject import MultiSubjectPipeline
from multisubject.tiny_world import EMBEDDED_BASE
from multisubject.training.devices import quick_dtype

PROMPT = "a photo of a red dog and a blue ball"
LAYOUT = {"red dog": (0.05, 0.2, 0.45, 0.95), "blue ball": (0.55, 0.2, 0.95, 0.95)}
MOST_TIME, MOST_MEMORY = 1.05, 1.03


def sd15_pipeline(latent_size: int) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's UNet with random weights; text encoder and VAE, which both calls share, are stubs."""
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_BASE / "tokenizer")
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=768,
        num_hidden_layers=1,
        num_attention_heads=12,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=latent_size, cross_attention_dim=768, attention_head_dim=8).eval(),
        vae=AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
        ).eval(),
        text_encoder=CLIPTextModel(text_config).eval(),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


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


def compare(name: str, plain: StableDiffusionPipeline, method: str, args: argparse.Namespace) -> bool:
    """Print one line of the table; True if both ratios are within their bounds."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    guided = MultiSubjectPipeline(**plain.components, requires_safety_checker=False)
    for pipe in (plain, guided):
        pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": args.steps, "output_type": "latent"}

    def call_plain() -> object:
        return plain(PROMPT, **arguments)

    def call_guided() -> object:
        return guided(PROMPT, layout=LAYOUT, guidance_method=method, **arguments)

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
    return time_ratio <= MOST_TIME and not memory_ratio > MOST_MEMORY


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("embedded", "sd15", "both"), default="both")
    parser.add_argument("--guidance_method", nargs="+", choices=sorted(GUIDANCE_METHODS), default=["multisubject"])
    parser.add_argument("--pairs", type=int, default=9, help="pairs of a plain and a guided call")
    parser.add_argument("--steps", type=int, default=25, help="UNet calls of each")
    parser.add_argument("--sd15_latents", type=int, default=16, help="latent height and width for the SD 1.5 UNet")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="float32",
        help="auto: float16 on a GPU, bfloat16 on a processor that has it, else float32 (default: %(default)s)",
    )
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds of this process, for a busy machine")
    args = parser.parse_args()
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
        "sd15": ("SD 1.5's UNet", lambda: sd15_pipeline(args.sd15_latents)),
    }
    within = True
    for key in bases if args.model == "both" else [args.model]:
        name, load = bases[key]
        plain = load().to(device=args.device, dtype=dtype)
        for method in args.guidance_method:
            within &= compare(name, plain, method, args)
    print(f"\n{'within' if within else 'NOT within'} {MOST_TIME} of the time and {MOST_MEMORY} of the memory")
    sys.exit(not within)


if __name__ == "__main__":
    main()
