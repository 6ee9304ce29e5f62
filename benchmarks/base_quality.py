"""Measure a base of the drawn world with the judge, and print the table of its model card.

    python benchmarks/base_quality.py                                  # tiny_world/base, 200 prompts of each kind
    python benchmarks/base_quality.py --num_prompts 20 --sheets docs/images
    python benchmarks/base_quality.py --base tiny_world/base_xl --subjects   # and its subjects, each alone

Every picture has its own seed, so the figures do not depend on the batch size. Pairs that nobody could see (white in
the snow, black at night) are not asked for. A subject is recognised where the judge names it after category, colours,
pattern, its scale and accessory. Where a base has two text encoders, its subjects are also drawn with the residual of
each encoder alone, from the same seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from tqdm.auto import tqdm

from multisubject.benchmarks.bases import DrawnBase
from multisubject.tiny_world import EMBEDDED_BASE
from multisubject.tiny_world.judge import Detection, Judge
from multisubject.tiny_world.scenes import (
    Look,
    Scene,
    World,
    article,
    describe,
    phrase,
    random_look,
    random_scene,
    render,
)
from multisubject.tiny_world.subjects import SUBJECTS, subject_sheet
from multisubject.visualization import contact_sheet

SHEET_PICTURES = 24


@dataclass(frozen=True)
class Options:
    """What the command line asks for. `subjects`: names, of which `num_pictures` each are drawn."""

    num_prompts: int
    steps: int
    guidance_scale: float
    scheduler: str | None
    batch_size: int
    seed: int
    subjects: tuple[str, ...]
    num_pictures: int


@dataclass(frozen=True)
class Score:
    """A share of `total` trials, with the share that is aimed at."""

    name: str
    successes: int
    total: int
    target: str = ""

    @property
    def share(self) -> float:
        return self.successes / self.total

    def row(self) -> str:
        low, high = wilson_interval(self.successes, self.total)
        interval = f"{100 * low:.1f} to {100 * high:.1f} %"
        return f"| {self.name} | {100 * self.share:.1f} % | {interval} | {self.total} | {self.target} |"


@dataclass(frozen=True)
class Asked:
    """A prompt and what its picture should show."""

    prompt: str
    setting: str
    objects: tuple[tuple[str, Look], ...]  # category and look


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share."""
    share, z = successes / total, 1.96
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


# --- prompts -------------------------------------------------------------------------------------------------------


def draw_prompts(world: World, count: int, seed: int, *, objects: int, described: bool) -> list[Asked]:
    """Prompts of `objects` different categories, with colour and pattern when `described`, else by name alone."""
    rng = random.Random(seed)
    asked = []
    for _ in range(count):
        setting = rng.choice(world.settings)
        cast = tuple((name, random_look(rng, world, setting)) for name in rng.sample(world.categories, objects))
        words = [phrase(category, look, described, described) for category, look in cast]
        phrases = [f"{article(said)} {said}" for said in words]
        asked.append(Asked(f"a photo of {' and '.join(phrases)} {setting}", setting, cast))
    return asked


def sample(
    pipe: Any, prompts: Sequence[str], options: Options, label: str, seeds: Sequence[int] | None = None
) -> list[Image.Image]:
    """One picture per prompt; without `seeds` from `options.seed` on."""
    seeds = seeds or range(options.seed, options.seed + len(prompts))
    images: list[Image.Image] = []
    with tqdm(total=len(prompts), desc=label) as progress:
        for start in range(0, len(prompts), options.batch_size):
            part = slice(start, start + options.batch_size)
            images += pipe(
                list(prompts[part]),
                num_inference_steps=options.steps,
                guidance_scale=options.guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            ).images
            progress.update(len(seeds[part]))
    return images


@contextmanager
def residual_of(pipe: Any, encoder: str) -> Iterator[None]:
    """Within the context, subjects have the residual of that text encoder alone."""
    whole = dict(pipe.subjects)
    for name, subject in whole.items():
        deltas = {part: delta if part == encoder else delta * 0 for part, delta in subject.deltas.items()}
        pipe.subjects[name] = replace(subject, deltas=deltas)
    try:
        yield
    finally:
        pipe.subjects.update(whole)


# --- measures ------------------------------------------------------------------------------------------------------


def matches(detection: Detection, category: str, look: Look) -> bool:
    """The right category in the right colour and pattern."""
    verdict = detection.verdict
    return (verdict.category, verdict.colour, verdict.pattern) == (category, look.colour, look.pattern)


def score_one_object(judge: Judge, asked: Sequence[Asked], images: Sequence[Image.Image]) -> list[Score]:
    """Judges the surest object of each picture; none found counts as wrong throughout."""
    detections = judge.detect(images)
    verdicts = [found[0].verdict if found else None for found in detections]
    looks = [item.objects[0] for item in asked]
    total = len(asked)

    def count(attribute: str, wanted: Sequence[str]) -> int:
        return sum(v is not None and getattr(v, attribute) == w for v, w in zip(verdicts, wanted, strict=True))

    whole = sum(
        v is not None and (v.category, v.colour, v.pattern) == (category, look.colour, look.pattern)
        for v, (category, look) in zip(verdicts, looks, strict=True)
    )
    settings = [name for name, _ in judge.settings(images)]
    return [
        Score("one object: category", count("category", [category for category, _ in looks]), total, "95 %"),
        Score("one object: colour", count("colour", [look.colour for _, look in looks]), total, "90 %"),
        Score("one object: pattern", count("pattern", [look.pattern for _, look in looks]), total, "85 %"),
        Score("one object: all three", whole, total),
        Score("one object: nothing beside it", sum(len(found) == 1 for found in detections), total),
        Score("one object: setting", sum(s == a.setting for s, a in zip(settings, asked, strict=True)), total),
    ]


def score_categories(judge: Judge, asked: Sequence[Asked], images: Sequence[Image.Image], name: str) -> Score:
    """Pictures in which every named category was found."""
    hits = 0
    for item, found in zip(asked, judge.detect(images), strict=True):
        present = {detection.category for detection in found}
        hits += all(category in present for category, _ in item.objects)
    return Score(f"{name}: both categories present", hits, len(asked), "70 %" if name == "two named" else "")


def score_binding(judge: Judge, asked: Sequence[Asked], images: Sequence[Image.Image], name: str) -> Score:
    """Pictures in which every object was found in its own colour and pattern."""
    hits = sum(
        all(any(matches(detection, *wanted) for detection in found) for wanted in item.objects)
        for item, found in zip(asked, judge.detect(images), strict=True)
    )
    return Score(f"{name}: both in their own colour and pattern", hits, len(asked))


@torch.inference_mode()
def reconstruct(pipe: Any, images: Sequence[Image.Image], batch_size: int) -> list[Image.Image]:
    """The pictures through the autoencoder and back, at the posterior's mode."""
    decoded: list[Image.Image] = []
    for start in range(0, len(images), batch_size):
        pixels = pipe.image_processor.preprocess(list(images[start : start + batch_size]))
        latents = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()
        decoded += pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pil")
    return decoded


def score_reconstructions(
    judge: Judge, scenes: Sequence[Scene], originals: Sequence[Image.Image], decoded: Sequence[Image.Image]
) -> list[Score]:
    """What the judge says of every object, before and after the autoencoder; second colours of those that have one."""
    rows = [(index, item) for index, scene in enumerate(scenes) for item in scene.objects]
    scores = []
    for kind, images in (("rendered", originals), ("reconstructed", decoded)):
        verdicts = judge.classify([images[index] for index, _ in rows], [item.box for _, item in rows])
        for attribute in ("category", "pattern", "colour", "second_colour"):
            wanted = [getattr(item if attribute == "category" else item.look, attribute) for _, item in rows]
            asked = [(getattr(v, attribute), w) for v, w in zip(verdicts, wanted, strict=True) if w is not None]
            close = kind == "reconstructed" and attribute == "pattern"
            name, aim = f"{kind} scenes: {attribute.replace('_', ' ')}", "rendered − 3 points" if close else ""
            if asked:
                scores.append(Score(name, sum(found == w for found, w in asked), len(asked), aim))
    return scores


def score_subjects(judge: Judge, pipe: Any, options: Options) -> tuple[list[Score], list[Image.Image]]:
    """How often each subject is recognised in pictures of it alone, and the pictures, subject by subject.

    With two text encoders also how often with the residual of either alone.
    """
    pipe.set_subjects(list(options.subjects))
    names = [name for name in options.subjects for _ in range(options.num_pictures)]
    prompts = [f"a photo of a <{name}>" for name in names]
    seeds = [*range(options.seed, options.seed + options.num_pictures)] * len(options.subjects)

    def recognised(label: str) -> tuple[list[bool], list[Image.Image]]:
        images = sample(pipe, prompts, options, label, seeds)
        found = judge.detect(images)
        return [any(d.subject == name for d in seen) for name, seen in zip(names, found, strict=True)], images

    right, pictures = recognised("subjects")
    scores = [Score("subjects recognised alone", sum(right), len(names))]
    encoders = list(next(iter(pipe.subjects.values())).deltas)
    for encoder in encoders if len(encoders) > 1 else ():
        with residual_of(pipe, encoder):
            part, _ = recognised(encoder)
        scores.append(Score(f"… with the residual of `{encoder}` alone", sum(part), len(names)))
    for name in options.subjects:
        own = [hit for whose, hit in zip(names, right, strict=True) if whose == name]
        scores.append(Score(f"subject {name} recognised alone", sum(own), len(own)))
    return scores, pictures


_ONE_PICTURE = """
import json, sys, time, torch
from diffusers import DiffusionPipeline
base, prompt, steps, guidance_scale = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
pipe = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
start = time.perf_counter()
pipe(prompt, num_inference_steps=steps, guidance_scale=guidance_scale)
print(json.dumps(time.perf_counter() - start))
"""


def time_one_picture(base: Path, options: Options) -> dict[str, float]:
    """Seconds of one picture, and of the whole process that makes it from a cold start."""
    command = [sys.executable, "-c", _ONE_PICTURE, str(base), "a photo of a red striped guitar on the beach"]
    start = time.perf_counter()
    finished = subprocess.run(
        [*command, str(options.steps), str(options.guidance_scale)], capture_output=True, text=True, check=True
    )
    whole = time.perf_counter() - start
    return {"picture": json.loads(finished.stdout.splitlines()[-1]), "process": whole}


# --- report --------------------------------------------------------------------------------------------------------


def format_table(base: str, scores: Sequence[Score], seconds: dict[str, float], options: Options) -> str:
    """The model card's table, in Markdown."""
    lines = [f"| measure, {base} | result | 95 % interval | trials | aim |", "|---|---|---|---|---|"]
    lines += [score.row() for score in scores]
    if seconds:
        lines.append(f"| one {options.steps}-step picture | {seconds['picture']:.1f} s | | 1 | 5 s |")
        lines.append(f"| … whole process | {seconds['process']:.1f} s | | 1 | 20 s |")
    return "\n".join(lines)


def found_line(found: Sequence[Detection]) -> str:
    """What the judge saw, in few words."""
    return (
        " + ".join(phrase(d.category, Look(d.verdict.colour or "", d.verdict.pattern or "")) for d in found)
        or "nothing"
    )


def judged_sheet(judge: Judge, images: Sequence[Image.Image]) -> Image.Image:
    """Pictures, each over what the judge saw in it."""
    return contact_sheet(images, columns=6, captions=[found_line(found) for found in judge.detect(images)])


def write_sheets(
    folder: Path,
    world: World,
    scenes: Sequence[Scene],
    originals: Sequence[Image.Image],
    decoded: Sequence[Image.Image],
    asked: Sequence[Asked],
    images: Sequence[Image.Image],
) -> None:
    """The pictures of the documentation: scenes, reconstructions, prompts and subjects."""
    folder.mkdir(parents=True, exist_ok=True)
    described = [describe(scene, random.Random(scene.seed)) for scene in scenes[:SHEET_PICTURES]]
    contact_sheet(originals[:SHEET_PICTURES], columns=6, captions=described).save(folder / "scenes.png")
    pairs = [image for pair in zip(originals, decoded, strict=True) for image in pair][:SHEET_PICTURES]
    contact_sheet(pairs, columns=6, captions=["rendered", "reconstructed"] * (len(pairs) // 2)).save(
        folder / "reconstructions.png"
    )
    prompts = [item.prompt.removeprefix("a photo of ") for item in asked]
    contact_sheet(images[:SHEET_PICTURES], columns=6, captions=prompts[:SHEET_PICTURES]).save(folder / "prompts.png")
    subject_sheet(world).save(folder / "subjects.png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=EMBEDDED_BASE, help="diffusers folder (default: %(default)s)")
    parser.add_argument(
        "--subjects", nargs="*", choices=sorted(SUBJECTS), help="also draw these subjects, each alone; no name: all"
    )
    parser.add_argument("--embeddings", type=Path, help="where they are (default: embeddings, of XL embeddings/xl)")
    parser.add_argument("--num_pictures", type=int, default=50, help="of each subject (default: %(default)s)")
    parser.add_argument("--num_prompts", type=int, default=200, help="prompts of each kind, and scenes for the VAE")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--scheduler", help="a diffusers scheduler class, e.g. DPMSolverMultistepScheduler")
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_timing", action="store_true", help="do not time a cold process")
    parser.add_argument("--json", type=Path, help="write figures and settings here")
    parser.add_argument("--contact_sheet", type=Path, help="write the sampled pictures with the judge's answers here")
    parser.add_argument("--sheets", type=Path, help="write the documentation's pictures into this folder")
    flags = vars(parser.parse_args(arguments))
    flags["subjects"] = () if flags["subjects"] is None else tuple(flags["subjects"] or SUBJECTS)
    options = Options(**{name: flags[name] for name in Options.__dataclass_fields__})
    if min(options.num_prompts, options.num_pictures, options.batch_size) < 1:
        parser.error("--num_prompts, --num_pictures and --batch_size: expected at least 1.")

    judge = Judge.load()
    try:
        base = DrawnBase.read(flags["base"], flags["embeddings"])
        pipe = base.load(options.subjects)
        pipe.set_subjects([])  # an active one also answers to its class phrase
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # What the judge knows, as large as the base draws it.
    world = World(**judge.metadata["recipe"]["world"] | {"image_size": base.world.image_size})
    if options.scheduler is not None:
        scheduler = getattr(diffusers, options.scheduler, None)
        if scheduler is None:
            parser.error(f"--scheduler {options.scheduler}: not a class of diffusers; e.g. DDIMScheduler.")
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)

    rng = random.Random(options.seed)
    scenes = [random_scene(rng, world) for _ in range(options.num_prompts)]
    originals = [render(scene, world.image_size).image for scene in scenes]
    decoded = reconstruct(pipe, originals, options.batch_size)
    scores = score_reconstructions(judge, scenes, originals, decoded)

    kinds = {
        "one object": draw_prompts(world, options.num_prompts, options.seed, objects=1, described=True),
        "two named": draw_prompts(world, options.num_prompts, options.seed + 1, objects=2, described=False),
        "two described": draw_prompts(world, options.num_prompts, options.seed + 2, objects=2, described=True),
    }
    images = {name: sample(pipe, [a.prompt for a in asked], options, name) for name, asked in kinds.items()}
    scores += score_one_object(judge, kinds["one object"], images["one object"])
    for name in ("two named", "two described"):
        scores.append(score_categories(judge, kinds[name], images[name], name))
    scores.append(score_binding(judge, kinds["two described"], images["two described"], "two described"))
    shown: list[Image.Image] = []
    if options.subjects:
        of_subjects, shown = score_subjects(judge, pipe, options)
        scores += of_subjects
    seconds = {} if flags["no_timing"] else time_one_picture(base.folder, options)

    print(format_table(base.name, scores, seconds, options))
    if flags["json"] is not None:
        figures = {score.name: {**asdict(score), "share": score.share} for score in scores}
        flags["json"].parent.mkdir(parents=True, exist_ok=True)
        flags["json"].write_text(
            json.dumps({"base": base.name, "options": asdict(options), "scores": figures, "seconds": seconds}, indent=1)
        )
    if flags["contact_sheet"] is not None:
        flags["contact_sheet"].parent.mkdir(parents=True, exist_ok=True)
        half = SHEET_PICTURES // 2
        shown = images["one object"][:half] + images["two described"][:half] + shown[:: options.num_pictures]
        judged_sheet(judge, shown).save(flags["contact_sheet"])
    if flags["sheets"] is not None:
        mixed = [pair for group in zip(*images.values(), strict=True) for pair in group]
        asked = [item for group in zip(*kinds.values(), strict=True) for item in group]
        write_sheets(flags["sheets"], world, scenes, originals, decoded, asked, mixed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
