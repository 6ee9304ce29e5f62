"""Three ways to learn a subject: who is recognised, what the prompt's other words still do, time and memory.

    python tiny_world/subjects.py --output_dir data
    python benchmarks/train_methods.py            # on the embedded base: table, and the verdict on the default method
    python benchmarks/train_methods.py --sd21     # peak memory on random models of Stable Diffusion 2.1's shape

Every run is a process of its own, so that its time and its peak memory are its own. The judge looks at pictures from
prompts that no training used; the row `base` is the same prompts and seeds with the plain class phrase.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from multisubject.tiny_world.judge import Judge
from multisubject.tiny_world.scenes import World, is_visible
from multisubject.tiny_world.subjects import SUBJECTS, Subject

ROOT = Path(__file__).parents[1]
BASE = ROOT / "tiny_world" / "base"
CONFIG = ROOT / "configs" / "train_tiny_world.yaml"
SD21_RESOLUTION = 64
# stabilityai/stable-diffusion-2-1, from its config.json files.
SD21_UNET = {
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD21_TEXT_ENCODER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
SD21_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class Run:
    """A method and its number of optimiser steps."""

    method: str
    steps: int

    @classmethod
    def parse(cls, text: str) -> Run:
        """`residual:150` -> a run."""
        method, _, steps = text.partition(":")
        if not steps.isdigit():
            raise argparse.ArgumentTypeError(f"{text!r}; expected method:steps, e.g. residual:150")
        return cls(method, int(steps))


@dataclass(frozen=True)
class Asked:
    """A prompt with `{}` for the subject, and what else its picture should show."""

    prompt: str
    setting: str
    second: str | None  # category of another, ordinary object


@dataclass
class Score:
    """Sums over pictures, and over the trainings that made them."""

    pictures: int = 0
    identity: int = 0
    setting: int = 0
    second: int = 0
    seconds_asked: int = 0
    recognised_subjects: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def obedience(self) -> float:
        """Share of settings and second objects that came as asked."""
        return (self.setting + self.second) / max(1, self.pictures + self.seconds_asked)


def draw_prompts(subject: Subject, world: World, count: int, seed: int) -> list[Asked]:
    """Half alone, half beside another object; no training sentence says a setting or another object."""
    rng = random.Random(f"{seed}/{subject.name}")
    settings = [setting for setting in world.settings if is_visible(subject.look.colour, setting)]
    others = [category for category in world.categories if category != subject.category]
    asked = []
    for index in range(count):
        setting = settings[index % len(settings)]
        second = rng.choice(others) if index % 2 else None
        opening = rng.choice(("a photo of a {}", "a picture of the {}", "a {}"))
        asked.append(Asked(f"{opening}{f' and a {second}' if second else ''} {setting}", setting, second))
    return asked


@torch.inference_mode()
def draw_pictures(pipe: Any, asked: Sequence[Asked], words: str, options: argparse.Namespace) -> list[Any]:
    """One picture per prompt, `words` standing for the subject."""
    images: list[Any] = []
    for start in range(0, len(asked), options.batch_size):
        part = asked[start : start + options.batch_size]
        images += pipe(
            [item.prompt.format(words) for item in part],
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=[torch.Generator().manual_seed(options.seed + start + index) for index in range(len(part))],
        ).images
    return images


def count_answers(judge: Judge, subject: Subject, asked: Sequence[Asked], images: list[Any], score: Score) -> None:
    """Add what the judge sees in `images` to `score`."""
    known = 0
    found = zip(asked, judge.detect(images), judge.settings(images), strict=True)
    for item, detections, (setting, _) in found:
        known += any(detection.subject == subject.name for detection in detections)
        score.setting += setting == item.setting
        if item.second:
            score.seconds_asked += 1
            score.second += any(detection.category == item.second for detection in detections)
    score.pictures += len(asked)
    score.identity += known
    score.recognised_subjects += known >= 0.9 * len(asked)


TIMED_TRAINING = """
import json, sys, time
from pathlib import Path
from multisubject.train_residual import main
start = time.monotonic()
assert main(json.loads(sys.argv[1])) == 0
seconds = time.monotonic() - start
# Not getrusage: its maximum would begin with the memory of the process that started this one.
(peak,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(json.dumps([seconds, int(peak) * 1024]))
"""


def in_process_of_its_own(script: str, flags: list[str]) -> tuple[float, int]:
    """Run a training; returns its seconds (imports not counted) and its peak memory in bytes."""
    command = [sys.executable, "-c", script, json.dumps(flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # for `benchmarks`
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    seconds, peak = json.loads(answer.splitlines()[-1])
    return float(seconds), int(peak)


def train_flags(run: Run, subject: Subject, output: Path, options: argparse.Namespace) -> list[str]:
    """The trainer's command line; the same for every method but for the method and its steps."""
    return [
        f"--config={CONFIG}",
        f"--method={run.method}",
        f"--max_train_steps={run.steps}",
        f"--instance_data_dir={options.data_dir / subject.name}",
        f"--instance_prompt={subject.category}",
        f"--name={subject.name}",
        f"--output_dir={output}",
        "--overwrite_output_dir",
        "--validation_prompts=a photo of a {}",
        "--validation_inference_steps=1",
        *options.train_flags,
    ]


def compare_on_embedded_base(options: argparse.Namespace) -> int:
    """Train every run on every subject, score, print the table; 0 if the default method wins as promised."""
    from multisubject.pipeline_multisubject import MultiSubjectPipeline

    judge, world = Judge.load(), World()
    pipe = MultiSubjectPipeline.from_pretrained(str(BASE), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scores: dict[Run | None, Score] = {run: Score() for run in (None, *options.runs)}
    for name in options.subjects:
        subject = SUBJECTS[name]
        asked = draw_prompts(subject, world, options.num_pictures, options.seed)
        count_answers(judge, subject, asked, draw_pictures(pipe, asked, subject.category, options), scores[None])
        for run in options.runs:
            output = options.output_dir / f"{run.method}-{run.steps}" / name
            seconds, peak = in_process_of_its_own(TIMED_TRAINING, train_flags(run, subject, output, options))
            score = scores[run]
            score.seconds += seconds / len(options.subjects)
            score.peak_bytes = max(score.peak_bytes, peak)
            pipe.load_subject(str(output / f"{name}.safetensors"), name=name)
            count_answers(judge, subject, asked, draw_pictures(pipe, asked, f"<{name}>", options), score)
            pipe.unload_subject(name)
            print(f"{name}, {run.method}:{run.steps}: {seconds:.0f} s", file=sys.stderr, flush=True)
    print("| method | steps | recognised | subjects ≥ 90 % | setting | second object | seconds | peak memory |")
    print("|---|---|---|---|---|---|---|---|")
    for run_or_base, score in scores.items():
        label = f"{run_or_base.method} | {run_or_base.steps}" if run_or_base else "base | –"
        print(
            f"| {label} | {score.identity / score.pictures:.1%} "
            f"| {score.recognised_subjects} of {len(options.subjects)} "
            f"| {score.setting / score.pictures:.1%} | {score.second / max(1, score.seconds_asked):.1%} "
            f"| {score.seconds:.0f} | {score.peak_bytes / 1e9:.2f} GB |"
        )
    return verdict(scores, options.runs)


def verdict(scores: dict[Run | None, Score], runs: Sequence[Run]) -> int:
    """Is the first run as recognisable as the encoder's best, in a fifth of the time, and as obedient as the base?"""
    default = scores[runs[0]]
    tuned = [run for run in runs if run.method == "text_encoder"]
    failures = 0
    if tuned:
        best = max(tuned, key=lambda run: (scores[run].identity, -scores[run].seconds))
        faster = scores[best].seconds / default.seconds
        good = default.identity >= scores[best].identity and faster >= 5
        failures += not good
        print(
            f"{'PASS' if good else 'FAIL'}: {runs[0].method}:{runs[0].steps} recognised {default.identity} times, "
            f"text_encoder:{best.steps} {scores[best].identity} times at {faster:.1f} x its time (at least 5 x wanted)."
        )
    lost = scores[None].obedience - default.obedience
    failures += lost > 0.05
    print(f"{'PASS' if lost <= 0.05 else 'FAIL'}: other words obey {100 * lost:+.1f} points less than the base alone.")
    return 1 if failures else 0


SD21_TRAINING = (
    """
import json, sys, torch
from benchmarks.train_methods import random_sd21
random_sd21()
"""
    + TIMED_TRAINING
)


def random_sd21() -> None:
    """Let the trainer load random models of Stable Diffusion 2.1's configuration, component by component."""
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    import multisubject.train_residual as trainer

    def load_encoders(config: Any, accelerator: Any) -> trainer.Models:
        tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
        scheduler = DDIMScheduler.from_pretrained(BASE / "scheduler")
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        text_encoder = CLIPTextModel(CLIPTextConfig(**SD21_TEXT_ENCODER, **ids))
        return trainer.Models(
            tokenizer=tokenizer,
            text_encoder=text_encoder.requires_grad_(False).eval(),
            vae=AutoencoderKL(**SD21_VAE).requires_grad_(False).eval(),
            unet=None,
            unet_config={"sample_size": 96, "block_out_channels": [320, 640, 1280, 1280]},
            noise_scheduler=DDPMScheduler.from_config(scheduler.config),
            sampling_scheduler=scheduler,
            device=accelerator.device,
            dtype=torch.float32,
            fingerprint=None,
        )

    trainer.load_encoders = load_encoders
    trainer.load_unet = lambda *_: UNet2DConditionModel(**SD21_UNET).requires_grad_(False).eval()


def compare_memory(options: argparse.Namespace) -> int:
    """Peak memory of two steps of each method on random models of SD 2.1's size; 0 if the default saves 4 GB."""
    subject = SUBJECTS[options.subjects[0]]
    peaks = {}
    print("| method | peak memory |\n|---|---|")
    for method in ("residual", "lora", "text_encoder"):
        output = options.output_dir / f"sd21-{method}" / subject.name
        flags = [*train_flags(Run(method, 2), subject, output, options), f"--resolution={SD21_RESOLUTION}"]
        _, peaks[method] = in_process_of_its_own(SD21_TRAINING, flags)
        print(f"| {method} | {peaks[method] / 1e9:.2f} GB |", flush=True)
    saved = (peaks["text_encoder"] - peaks["residual"]) / 1e9
    print(
        f"{'PASS' if saved >= 4 else 'FAIL'}: residual needs {saved:.2f} GB less than text_encoder (at least 4 wanted)."
    )
    return 0 if saved >= 4 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = ["residual:150", "text_encoder:150", "lora:150", "text_encoder:750"]
    parser.add_argument("--runs", nargs="+", type=Run.parse, default=list(map(Run.parse, runs)), help=" ".join(runs))
    parser.add_argument("--sd21", action="store_true", help="measure memory on random models of SD 2.1's configuration")
    parser.add_argument("--subjects", nargs="+", choices=sorted(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="written by tiny_world/subjects.py")
    parser.add_argument("--output_dir", type=Path, default=Path("output/train_methods"))
    parser.add_argument("--num_pictures", type=int, default=50, help="per subject and run")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--batch_size", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train_flags", nargs="*", default=[], metavar="FLAG=VALUE", help="more flags for the trainer")
    options = parser.parse_args()
    options.train_flags = [f"--{flag.lstrip('-')}" for flag in options.train_flags]
    if not options.data_dir.is_dir():
        parser.error(
            f"--data_dir: {options.data_dir} is not there; run tiny_world/subjects.py --output_dir data first."
        )
    return compare_memory(options) if options.sd21 else compare_on_embedded_base(options)


if __name__ == "__main__":
    sys.exit(main())
