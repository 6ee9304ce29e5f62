"""The tasks of `placement.py`: which prompt and which regions a picture is drawn from, and what each should show."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from multisubject.tiny_world.scenes import Box, Look, World, article, is_visible, phrase, random_boxes, random_look
from multisubject.tiny_world.subjects import SUBJECTS

CELLS = (
    *(f"described {count}" for count in (1, 2, 3, 4, 6)),
    *(f"twins {count}" for count in (2, 3)),
    *(f"subjects {count}" for count in (1, 2, 3, 4)),
    "subject twins 2",
    *(f"loras {count}" for count in (1, 2, 3)),
    *(f"described 2 {shape}" for shape in ("small", "overlap", "masks", "halves")),
)
HALVES = (0.03, 0.15, 0.48, 0.95), (0.52, 0.15, 0.97, 0.95)
"""Boxes as somebody draws them who does not think of the shape of what is to stand there."""

LORAS = ("petrucci", "slash", "majesty", "biscuit")
"""Subjects that are in `embeddings/loras` as well."""


def has_subjects(cell: str) -> bool:
    """Whether a cell asks for personal subjects."""
    return cell.startswith(("subject", "loras"))


@dataclass(frozen=True)
class Target:
    """What one region should show. `words` is its key in the layout; `subject` a personal subject's name."""

    words: str
    category: str
    look: Look
    box: Box
    subject: str | None = None


@dataclass(frozen=True)
class Task:
    """One picture to draw."""

    prompt: str
    setting: str
    targets: tuple[Target, ...]
    masks: bool
    seed: int

    @property
    def layout(self) -> dict[str, Any]:
        """As the pipeline takes it: boxes, or the ellipses inside them."""
        return {target.words: ellipse(target.box) if self.masks else target.box for target in self.targets}


def ellipse(box: Box, size: int = 64) -> np.ndarray:
    """`(size, size)` float32, 1 inside the ellipse that touches the box's four sides."""
    x, y = np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2)
    across = (x - (box[0] + box[2]) / 2) / ((box[2] - box[0]) / 2)
    down = (y - (box[1] + box[3]) / 2) / ((box[3] - box[1]) / 2)
    return (across**2 + down**2 <= 1).astype(np.float32)


def draw_tasks(cell: str, count: int, seed: int, world: World) -> list[Task]:
    """The first `count` tasks of a cell; the same for the same seed, whatever `count` is."""
    rng = random.Random(f"{cell}/{seed}")
    return [draw_task(cell, rng, world, seed=1000 * seed + index) for index in range(count)]


def draw_task(cell: str, rng: random.Random, world: World, seed: int) -> Task:
    """One task of a cell such as `described 2 small`."""
    kind, _, rest = cell.partition(" 2 ") if " 2 " in cell else (cell[:-2], "", "")
    regions = 2 if rest else int(cell[-1])
    setting = rng.choice(world.settings)
    named: list[tuple[str, str, Look, str | None]] = []  # words, category, look, subject
    if has_subjects(cell):
        cast = [subject for subject in SUBJECTS.values() if is_visible(subject.look.colour, setting)]
        if kind == "loras":
            cast = [subject for subject in cast if subject.name in LORAS]
        while True:
            chosen = rng.sample(cast, regions)
            categories = {subject.category for subject in chosen}
            if len(categories) == (1 if kind == "subject twins" else regions):
                break
        named = [(subject.name, subject.category, subject.look, subject.name) for subject in chosen]
    else:
        if kind == "twins":
            categories_drawn = [rng.choice(world.categories)] * regions
        else:
            categories_drawn = rng.sample(world.categories, min(regions, len(world.categories)))
            categories_drawn += rng.sample(world.categories, regions - len(categories_drawn))
        colours: set[str] = set()
        for category in categories_drawn:
            look = random_look(rng, world, setting)
            while look.colour in colours:
                look = random_look(rng, world, setting)
            colours.add(look.colour)
            named.append((phrase(category, look), category, look, None))
    boxes = random_boxes(rng, [category for _, category, _, _ in named])
    if rest == "small":
        boxes = [scaled(box, 0.6) for box in boxes]
    elif rest == "overlap":
        boxes = [scaled(box, 1.4) for box in boxes]
    elif rest == "halves":
        boxes = rng.sample(HALVES, 2)
    targets = tuple(
        Target(words, category, look, box, subject)
        for (words, category, look, subject), box in zip(named, boxes, strict=True)
    )
    said = [f"a <{t.subject}>" if t.subject else f"{article(t.words)} {t.words}" for t in targets]
    return Task(f"a photo of {' and '.join(said)} {setting}", setting, targets, rest == "masks", seed)


def with_own_words(task: Task) -> list[dict[str, Any]]:
    """The task's layout with what stands there in the regions' own words, which the prompt then need not have."""
    said = [f"a <{t.subject}>" if t.subject else f"{article(t.words)} {t.words}" for t in task.targets]
    places = ({"mask": place} if task.masks else {"box": place} for place in task.layout.values())
    return [{"prompt": words, **place} for words, place in zip(said, places, strict=True)]


def with_loras(task: Task, *, in_regions: bool) -> tuple[str, list[dict[str, Any]]]:
    """The task's prompt and layout for subjects that are LoRAs, as which they are called by their classes; with or
    without saying which LoRA is where."""
    said = " and ".join(f"{article(target.category)} {target.category}" for target in task.targets)
    layout: list[dict[str, Any]] = []
    for target in task.targets:
        held = {"lora": target.subject} if in_regions else {}
        layout.append({"subject": target.category, "box": target.box, **held})
    return f"a photo of {said} {task.setting}", layout


def scaled(box: Box, factor: float) -> Box:
    """The box about its centre, cut at the picture's edge."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    width, height = factor * (box[2] - box[0]) / 2, factor * (box[3] - box[1]) / 2
    return max(0.0, x - width), max(0.0, y - height), min(1.0, x + width), min(1.0, y + height)
