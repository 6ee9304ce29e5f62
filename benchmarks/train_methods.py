"""Three ways to learn a subject: who is recognised, what the prompt's other words still do, time and memory.

    python benchmarks/train_methods.py                                     # everything; goes on where it stopped
    python benchmarks/train_methods.py --num_pictures 8 --subjects comet   # a first look
    python benchmarks/train_methods.py --base tiny_world/base_xl --parts embedded
    python benchmarks/train_methods.py --parts sd21                        # peak memory alone
    python benchmarks/train_methods.py --parts sd21 --sd21_resolution 768 --sd21_steps 25 \
        --train_flags train_batch_size=1 mixed_precision=bf16              # the same as one would train it, on a GPU

On a base of the drawn world, of Stable Diffusion 1.x, 2.x or XL, every method learns every subject from the same
pictures, and a judge looks at pictures from prompts that no training used; the row `base` is the same prompts and seeds
with the plain class phrase. Then random models of Stable Diffusion 2.1's shape show each method's peak memory and the
time of a step. Every training is a process of its own, so that its time and its peak memory are its own, and runs on a
GPU if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from tqdm.auto import tqdm

from multisubject.benchmarks.bases import ROOT, DrawnBase
from multisubject.benchmarks.results import digest_of_weights, load_results
from multisubject.subject_file import write_atomically
from multisubject.tiny_world import EMBEDDED_BASE
from multisubject.tiny_world.judge import Judge
from multisubject.tiny_world.scenes import World, article, is_visible
from multisubject.tiny_world.subjects import SUBJECTS, Subject, save_training_pictures
from multisubject.training.config import LEARNING_RATES
from multisubject.visualization import contact_sheet

CONFIG = ROOT / "configs" / "train_tiny_world.yaml"
METHODS = ("residual", "lora", "text_encoder")
SHOWN = 8  # pictures of each run on a subject's sheet
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


# --- prompts, pictures and what they show ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A method and its number of optimiser steps."""

    method: str
    steps: int

    def __str__(self) -> str:
        return f"{self.method}:{self.steps}"


@dataclass(frozen=True)
class Asked:
    """A prompt with `{}` for the subject, and what else its picture should show: an ordinary object of a category and
    a colour in every second one."""

    prompt: str
    setting: str
    category: str | None
    colour: str | None


def draw_prompts(subject: Subject, world: World, count: int, seed: int) -> list[Asked]:
    """Half alone, half beside another object; no training sentence says a setting or another object. The same for the
    same seed, whatever `count` is."""
    rng = random.Random(f"{seed}/{subject.name}")
    settings = [setting for setting in world.settings if is_visible(subject.look.colour, setting)]
    others = [category for category in world.categories if category != subject.category]
    asked = []
    for index in range(count):
        setting = settings[index // 2 % len(settings)]
        opening = rng.choice(("a photo of", "a picture of", "an image of"))
        things = [f"{rng.choice(('a', 'the', 'my'))} {{}}"]
        category = colour = None
        if index % 2:
            category = rng.choice(others)
            colour = rng.choice([colour for colour in world.colours if is_visible(colour, setting)])
            things.insert(rng.randrange(2), f"{article(colour)} {colour} {category}")
        asked.append(Asked(f"{opening} {' and '.join(things)} {setting}", setting, category, colour))
    return asked


@torch.inference_mode()
def draw_pictures(pipe: Any, asked: Sequence[Asked], words: str, options: argparse.Namespace) -> list[Image.Image]:
    """One picture per prompt, `words` standing for the subject."""
    images: list[Image.Image] = []
    for start in range(0, len(asked), options.batch_size):
        part = asked[start : start + options.batch_size]
        images += pipe(
            [item.prompt.format(words) for item in part],
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=[torch.Generator().manual_seed(options.seed + start + index) for index in range(len(part))],
        ).images
    return images


def score_pictures(
    judge: Judge, subject: Subject, asked: Sequence[Asked], images: Sequence[Image.Image]
) -> list[dict[str, bool]]:
    """What the judge sees in each picture; `object` and `colour` only where another object was asked for."""
    rows = []
    for item, found, (setting, _) in zip(asked, judge.detect(images), judge.settings(images), strict=True):
        row = {"identity": any(detection.subject == subject.name for detection in found)}
        row["setting"] = setting == item.setting
        if item.category:
            others = [detection.verdict for detection in found if detection.category == item.category]
            row["object"] = bool(others)
            row["colour"] = any(verdict.colour == item.colour for verdict in others)
        rows.append(row)
    return rows


# --- trainings -------------------------------------------------------------------------------------------------------

TIMED_TRAINING = """
import json, sys, time
from pathlib import Path
from statistics import median
import torch
from multisubject.train_residual import main
from multisubject.training import loop

step_starts = []

def note_the_time(*arguments, draw_batch=loop.draw_batch):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    step_starts.append(time.monotonic())
    return draw_batch(*arguments)

loop.draw_batch = note_the_time
start, cpu_start = time.monotonic(), time.process_time()
assert main(json.loads(sys.argv[1])) == 0
seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
steps = [after - before for before, after in zip(step_starts, step_starts[1:])]
# Not getrusage: its maximum would begin with the memory of the process that started this one.
(peak,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(json.dumps({
    "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": int(peak) * 1024,
    "step_seconds": median(steps) if len(steps) > 1 else None,
    "gpu_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
}))
"""


def in_process_of_its_own(script: str, flags: list[str], log: Path) -> dict[str, float]:
    """Run a training; its seconds and seconds of processor time (imports not counted), the median seconds of a step,
    the process's peak memory and torch's on the GPU, in bytes.

    Raises RuntimeError with the end of what it printed, all of which is in `log`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # for `benchmarks`
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with log.open("w") as errors:
        command = [sys.executable, "-c", script, json.dumps(flags)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    if answer.returncode:
        raise RuntimeError(f"training failed, see {log}: {log.read_text()[-500:]}")
    cost: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return cost


def train_flags(run: Run, base: Path, subject: Subject, output: Path, options: argparse.Namespace) -> list[str]:
    """The trainer's command line: the shipped configuration, and a method with its rate and its steps."""
    return [
        f"--config={CONFIG}",
        f"--pretrained_model_name_or_path={base}",
        f"--method={run.method}",
        f"--learning_rate={options.learning_rates[run.method]}",
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


# --- on the embedded base --------------------------------------------------------------------------------------------


def runs_of(options: argparse.Namespace) -> list[Run]:
    """Every method with `--steps`, and `text_encoder` with `--encoder_steps` too. The first is the one judged."""
    runs = [Run(method, steps) for method in options.methods for steps in options.steps]
    if "text_encoder" in options.methods:
        runs += [Run("text_encoder", steps) for steps in options.encoder_steps]
    return list(dict.fromkeys(runs))


def measure_embedded(results: dict[str, Any], base: DrawnBase, options: argparse.Namespace) -> None:
    """Train, draw and score what `results["cells"][run][subject]` lacks; the file is written after each."""
    judge, pipe = Judge.load(), base.load()
    cells = [(name, run) for name in options.subjects for run in (None, *runs_of(options))]
    for name, run in (progress := tqdm(cells, unit="cell")):
        progress.set_description(f"{name}, {run or 'base'}")
        subject, label = SUBJECTS[name], str(run or "base")
        cell = results["cells"].setdefault(label, {}).setdefault(name, {"pictures": []})
        if len(cell["pictures"]) >= options.num_pictures:
            continue
        output = options.output_dir / "trained" / label.replace(":", "-") / name
        words = subject.category
        if run is not None:
            adapter = output / f"{name}.safetensors"
            if "cost" not in cell or not adapter.is_file():
                flags = train_flags(run, base.folder, subject, output, options)
                cell["cost"] = in_process_of_its_own(TIMED_TRAINING, flags, output.with_suffix(".log"))
                write_atomically(options.output_dir / "results.json", json.dumps(results, indent=1).encode())
            pipe.load_subject(str(adapter), name=name)
            words = f"<{name}>"
        asked = draw_prompts(subject, base.world, options.num_pictures, options.seed)
        images = draw_pictures(pipe, asked, words, options)
        if run is not None:
            pipe.unload_subject(name)
        for index, image in enumerate(images[:SHOWN]):
            path = picture_path(options, label, name, index)
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        cell["pictures"] = score_pictures(judge, subject, asked, images)
        write_atomically(options.output_dir / "results.json", json.dumps(results, indent=1).encode())
    for name in options.subjects:
        save_sheet(name, base.world, options)


def picture_path(options: argparse.Namespace, label: str, name: str, index: int) -> Path:
    """Where a picture for the sheets is."""
    return Path(options.output_dir / "pictures" / label.replace(":", "-") / name / f"{index}.png")


def save_sheet(name: str, world: World, options: argparse.Namespace) -> None:
    """`sheets/{name}.png`: training pictures, then a row for the base and each run, from the same prompts."""
    rows = {"training picture": sorted((options.data_dir / name).glob("*.png"))}
    for label in ("base", *map(str, runs_of(options))):
        rows[label] = [picture_path(options, label, name, index) for index in range(options.num_pictures)]
    columns = min(SHOWN, options.num_pictures)
    prompts = [item.prompt for item in draw_prompts(SUBJECTS[name], world, columns, options.seed)]
    pictures, captions = [], []
    for label, paths in rows.items():
        for column in range(columns):
            found = column < len(paths) and paths[column].is_file()
            size = (world.image_size, world.image_size)
            picture = Image.open(paths[column]).convert("RGB") if found else Image.new("RGB", size, "white")
            pictures.append(picture)
            captions.append(label if label == "training picture" else f"{label}: {prompts[column].format('…')}")
    sheet = options.output_dir / "sheets" / f"{name}.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, columns=columns, captions=captions).save(sheet)


# --- tables and verdict ----------------------------------------------------------------------------------------------


def share(rows: Sequence[dict[str, bool]], key: str) -> float:
    """Of the rows that were asked for `key`, the share that has it."""
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values) if values else float("nan")


@dataclass(frozen=True)
class Summary:
    """A run over all subjects: shares of pictures in [0, 1], mean seconds, highest peak.

    `identity` and `by_subject` (by name) are of pictures that ask for the subject alone; `beside` of the others.
    """

    identity: float
    beside: float
    by_subject: dict[str, float]
    setting: float
    object: float
    colour: float
    seconds: float
    cpu_seconds: float
    peak_bytes: float

    @property
    def recognised_subjects(self) -> int:
        """Subjects that the judge recognises in 90 % of their pictures alone."""
        return sum(value >= 0.9 for value in self.by_subject.values())


def summarise(cells: dict[str, Any], subjects: Sequence[str]) -> Summary:
    """One run's cells (name -> cell) as numbers."""
    rows = [row for name in subjects for row in cells[name]["pictures"]]
    costs = [cells[name].get("cost", {"seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": 0}) for name in subjects]
    return Summary(
        **{key: share(rows, key) for key in ("setting", "object", "colour")},
        identity=share([row for row in rows if "object" not in row], "identity"),
        beside=share([row for row in rows if "object" in row], "identity"),
        by_subject={
            name: share([row for row in cells[name]["pictures"] if "object" not in row], "identity")
            for name in subjects
        },
        **{key: sum(cost[key] for cost in costs) / len(costs) for key in ("seconds", "cpu_seconds")},
        peak_bytes=max(cost["peak_bytes"] for cost in costs),
    )


def tables(base: str, summaries: dict[str, Summary]) -> str:
    """Markdown: a row per run, then the share of recognised pictures per subject; `base` is whose runs they are."""
    lines = [
        f"| method, {base} | recognised alone | subjects ≥ 90 % | beside another object | setting | second object "
        "| in its colour | seconds | CPU seconds | peak memory |",
        "|" + "---|" * 10,
    ]
    for label, found in summaries.items():
        cost = f"{found.seconds:.0f} | {found.cpu_seconds:.0f} | {found.peak_bytes / 1e9:.2f} GB"
        lines.append(
            f"| {label} | {found.identity:.1%} | {found.recognised_subjects} of {len(found.by_subject)} "
            f"| {found.beside:.1%} | {found.setting:.1%} | {found.object:.1%} | {found.colour:.1%} "
            f"| {cost if found.peak_bytes else '– | – | –'} |"
        )
    lines += ["", f"| subject, {base} | " + " | ".join(summaries) + " |", "|" + "---|" * (len(summaries) + 1)]
    for name in next(iter(summaries.values())).by_subject:
        shares = " | ".join(f"{found.by_subject[name]:.0%}" for found in summaries.values())
        lines.append(f"| {name} | {shares} |")
    return "\n".join(lines)


def verdict(summaries: dict[str, Summary], runs: Sequence[Run]) -> list[tuple[bool, str]]:
    """What was promised of the first run, and whether it holds."""
    judged, base = summaries[str(runs[0])], summaries["base"]
    count = len(judged.by_subject)
    good = judged.recognised_subjects
    answers = [
        (
            good * 8 >= count * 7,
            f"{good} of {count} subjects recognised in 90 % of pictures of them alone (7 of 8 wanted)",
        )
    ]
    for key, what in (("setting", "settings"), ("object", "second objects"), ("colour", "second objects' colours")):
        lost = 100 * (getattr(base, key) - getattr(judged, key))
        if lost == lost:
            answers.append(
                (lost <= 5, f"{what} come {lost:.1f} points less often than from the base alone (at most 5)")
            )
    tuned = {run: summaries[str(run)] for run in runs if run.method == "text_encoder"}
    others = {run: summaries[str(run)] for run in runs if run.method == runs[0].method}
    if tuned and runs[0].method != "text_encoder":
        # The best that both reach, and the shortest run with which each reached it.
        level = min(max(found.identity for found in part.values()) for part in (tuned, others))
        ours, theirs = (
            min((found.seconds, run.steps) for run, found in part.items() if found.identity >= level)
            for part in (others, tuned)
        )
        ratio = theirs[0] / ours[0]
        answers.append(
            (
                ratio >= 5,
                f"identity of {level:.1%}: {runs[0].method} in {ours[0]:.0f} s ({ours[1]} steps), text_encoder in "
                f"{theirs[0]:.0f} s ({theirs[1]} steps), {ratio:.1f} times as long (at least 5 wanted)",
            )
        )
    return answers


# --- random models of Stable Diffusion 2.1's shape -------------------------------------------------------------------

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

    from multisubject.training import models as loading
    from multisubject.training.models import Models, TextEncoders, frozen, weight_dtype

    def load_encoders(config: Any, accelerator: Any) -> Models:
        dtype = weight_dtype(accelerator)
        tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_BASE / "tokenizer")
        scheduler = DDIMScheduler.from_pretrained(EMBEDDED_BASE / "scheduler")
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        text_encoder = CLIPTextModel(CLIPTextConfig(**SD21_TEXT_ENCODER, **ids))
        return Models(
            tokenizers={"text_encoder": tokenizer},
            text_encoders=frozen(TextEncoders({"text_encoder": text_encoder}), accelerator.device, torch.float32),
            vae=frozen(AutoencoderKL(**SD21_VAE), accelerator.device, dtype),
            unet=None,
            unet_config={"sample_size": 96, "block_out_channels": [320, 640, 1280, 1280]},
            noise_scheduler=DDPMScheduler.from_config(scheduler.config),
            sampling_scheduler=scheduler,
            device=accelerator.device,
            dtype=dtype,
            fingerprints={"text_encoder": None},
            widths={"text_encoder": text_encoder.config.hidden_size},
        )

    def load_unet(config: Any, models: Models) -> UNet2DConditionModel:
        unet = UNet2DConditionModel(**SD21_UNET)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        return frozen(unet, models.device, models.dtype)

    loading.load_encoders, loading.load_unet = load_encoders, load_unet


def measure_sd21(results: dict[str, Any], options: argparse.Namespace) -> None:
    """What a few steps of each method cost on random models of SD 2.1's size, in `results["sd21"]`."""
    subject, costs = SUBJECTS[options.subjects[0]], results.setdefault("sd21", {})
    for method in (progress := tqdm(options.methods, unit="method")):
        progress.set_description(f"Stable Diffusion 2.1's shape, {method}")
        if method in costs:
            continue
        output = options.output_dir / "trained" / f"sd21-{method}" / subject.name
        run = Run(method, options.sd21_steps)
        flags = [*train_flags(run, EMBEDDED_BASE, subject, output, options), f"--resolution={options.sd21_resolution}"]
        costs[method] = in_process_of_its_own(SD21_TRAINING, flags, output.with_suffix(".log"))
        shutil.rmtree(output)  # checkpoints of gigabytes
        write_atomically(options.output_dir / "results.json", json.dumps(results, indent=1).encode())


def report_sd21(costs: dict[str, dict[str, float]], methods: Sequence[str]) -> tuple[str, list[tuple[bool, str]]]:
    """Markdown, and whether the first method saves 4 GB (of the GPU's memory, where the training was on one)."""
    lines = [
        "| method, Stable Diffusion 2.1's shape | peak memory | of the GPU | seconds a step |",
        "|---|---|---|---|",
    ]
    for method in methods:
        cost = costs[method]
        on_gpu = f"{cost['gpu_peak_bytes'] / 1e9:.2f} GB" if cost["gpu_peak_bytes"] else "–"
        step = f"{cost['step_seconds']:.3f}" if cost["step_seconds"] else "–"
        lines.append(f"| {method} | {cost['peak_bytes'] / 1e9:.2f} GB | {on_gpu} | {step} |")
    answers = []
    if "text_encoder" in methods and methods[0] != "text_encoder":
        key = "gpu_peak_bytes" if costs[methods[0]]["gpu_peak_bytes"] else "peak_bytes"
        saved = (costs["text_encoder"][key] - costs[methods[0]][key]) / 1e9
        answers = [(saved >= 4, f"{methods[0]} needs {saved:.2f} GB less than text_encoder (at least 4 wanted)")]
    return "\n".join(lines), answers


# --- the run ---------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Measure what is missing, print the tables and the verdict; 0 if all that was promised holds."""
    folders = [options.data_dir / name for name in options.subjects] if options.data_dir else []
    if lacking := [str(folder) for folder in folders if not folder.is_dir()]:
        raise ValueError(f"--data_dir: no folders {lacking}; expected one per subject, or leave it out to draw them.")
    base = DrawnBase.read(options.base)
    settings = {
        "base": digest_of_weights(base.folder),
        "seed": options.seed,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "learning_rates": options.learning_rates,
        "train_flags": options.train_flags,
        "sd21": [options.sd21_resolution, options.sd21_steps],
        "config": yaml.safe_load(CONFIG.read_text()),
        "data_dir": str(options.data_dir) if options.data_dir else None,
    }
    results = load_results(options.output_dir / "results.json", base.name, settings, "--output_dir")
    if options.data_dir is None:
        options.data_dir = options.output_dir / "data"
        save_training_pictures(options.data_dir, base.world)
    answers = []
    if "embedded" in options.parts:
        measure_embedded(results, base, options)
        labels = ["base", *map(str, runs_of(options))]
        summaries = {label: summarise(results["cells"][label], options.subjects) for label in labels}
        print(tables(base.name, summaries), flush=True)
        answers += verdict(summaries, runs_of(options))
    if "sd21" in options.parts:
        measure_sd21(results, options)
        text, saved = report_sd21(results["sd21"], options.methods)
        print(f"\n{text}")
        answers += saved
    print()
    for holds, sentence in answers:
        print(f"{'PASS' if holds else 'FAIL'}: {sentence}")
    return 0 if all(holds for holds, _ in answers) else 1


def parse_rate(text: str) -> tuple[str, float]:
    """`lora=1e-3` -> a method and its rate."""
    method, _, rate = text.partition("=")
    try:
        if method in METHODS and float(rate) > 0:
            return method, float(rate)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}; expected method=rate, e.g. text_encoder=1e-4")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("embedded", "sd21"), default=["embedded", "sd21"])
    parser.add_argument("--base", type=Path, default=EMBEDDED_BASE, help="a folder in diffusers' format")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="the first one is judged")
    parser.add_argument("--steps", nargs="+", type=int, default=[150], help="of every method; the first is judged")
    parser.add_argument("--encoder_steps", nargs="*", type=int, default=[300, 750], help="more runs of text_encoder")
    parser.add_argument(
        "--learning_rates", nargs="+", type=parse_rate, default=[], metavar="METHOD=RATE", help="default: the trainer's"
    )
    parser.add_argument("--subjects", nargs="+", choices=sorted(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--num_pictures", type=int, default=100, help="per subject and run; half of them alone")
    parser.add_argument("--sd21_resolution", type=int, default=64, help="small, so that a CPU can do it")
    parser.add_argument("--sd21_steps", type=int, default=2)
    parser.add_argument("--data_dir", type=Path, help="training pictures, a folder per subject; left out: drawn")
    parser.add_argument(
        "--output_dir", type=Path, help="results.json, sheets … (default: output/train_methods/BASE, the base's folder)"
    )
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--batch_size", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train_flags", nargs="*", default=[], metavar="FLAG=VALUE", help="more flags for the trainer")
    options = parser.parse_args(arguments)
    options.output_dir = options.output_dir or Path("output/train_methods", options.base.name)
    options.train_flags = [f"--{flag.lstrip('-')}" for flag in options.train_flags]
    options.learning_rates = {**LEARNING_RATES, **dict(options.learning_rates)}
    counts = (options.num_pictures, options.batch_size, options.sd21_steps, *options.steps, *options.encoder_steps)
    if min(counts) < 1:
        parser.error("--num_pictures, --batch_size, --steps, --encoder_steps and --sd21_steps: expected at least 1.")
    try:
        return run(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
