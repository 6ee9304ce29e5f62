"""What a picture of the placement benchmark is worth: who stands in which region, how exactly, and how it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from multisubject.benchmarks.placement_tasks import Target, Task
from multisubject.tiny_world.judge import Detection, Judge, Verdict
from multisubject.tiny_world.scenes import Box, Scene, SceneObject, iou, render

RENDERED = "rendered"
"""In place of a method: the scenes as the renderer draws them, which shows how much the judge itself errs."""

SCORES = 2
"""Of results' settings: pictures scored by other versions of `score_picture` are not mixed."""

EXACT = 0.5
"""Intersection over union from which on an object counts as standing in its box."""


def sharpness(picture: Image.Image) -> float:
    """Mean absolute Laplacian of the grey picture, in grey levels of 0 to 255."""
    grey = np.asarray(picture.convert("L"), dtype=np.float32)
    inner = grey[1:-1, 1:-1]
    return float(np.abs(4 * inner - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]).mean())


def shows(verdict: Verdict, target: Target) -> bool:
    """Category, colour and pattern; of a personal subject also the second colour of its pattern."""
    right = (verdict.category, verdict.colour, verdict.pattern) == (
        target.category,
        target.look.colour,
        target.look.pattern,
    )
    return right and (target.subject is None or verdict.second_colour == target.look.second_colour)


def score_picture(judge: Judge, task: Task, picture: Image.Image) -> dict[str, Any]:
    """What the judge sees, as numbers of few digits. Counts are over the task's regions; `ious` has one for each.

    `doubled` counts those in which more objects of their category stand than are asked for.
    """
    verdicts = judge.classify([picture] * len(task.targets), [target.box for target in task.targets])
    pairs = list(zip(verdicts, task.targets, strict=True))
    leaked = 0
    for verdict, target in pairs:
        others = [other for other in task.targets if other is not target]
        leaked += not shows(verdict, target) and any(
            verdict.colour == other.look.colour or verdict.category == other.category != target.category
            for other in others
        )
    detections = judge.detect([picture])[0]
    ious = [best_iou(detections, target) for target in task.targets]
    looks = [shows(verdict, target) for verdict, target in pairs]
    return {
        "regions": len(pairs),
        "category": sum(verdict.category == target.category for verdict, target in pairs),
        "look": sum(looks),
        "success": sum(look and found >= EXACT for look, found in zip(looks, ious, strict=True)),
        "ious": [round(found, 3) for found in ious],
        "identity": sum(t.subject is not None and verdict.subject == t.subject for verdict, t in pairs),
        "missing": sum(verdict.category is None for verdict, _ in pairs),
        "leaked": leaked,
        "doubled": sum(number_in(detections, target) > number_in(task.targets, target) for target in task.targets),
        "extras": sum(not any(stands_in(found.box, target.box) for target in task.targets) for found in detections),
        "setting": int(judge.settings([picture])[0][0] == task.setting),
        "sharpness": round(sharpness(picture), 2),
    }


def rendered(tasks: Sequence[Task], size: int) -> list[Image.Image]:
    """The tasks as the renderer draws them, every object in its box: what the judge makes of perfect pictures.

    Args:
        size: side of the pictures, in pixels.
    """
    return [
        render(
            Scene(task.setting, tuple(SceneObject(t.category, t.look, t.box) for t in task.targets), task.seed), size
        ).image
        for task in tasks
    ]


def best_iou(detections: Sequence[Detection], target: Target) -> float:
    """Intersection over union of the target's box and the best detection of its category; 0 where there is none.

    Masks count by the box around them: the judge finds boxes.
    """
    return max((iou(found.box, target.box) for found in detections if found.category == target.category), default=0.0)


def stands_in(box: Box, region: Box) -> bool:
    """Whether the middle of a box lies in a region."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return region[0] <= x <= region[2] and region[1] <= y <= region[3]


def number_in(objects: Sequence[Detection] | Sequence[Target], target: Target) -> int:
    """How many objects of the target's category stand in its box."""
    return sum(one.category == target.category and stands_in(one.box, target.box) for one in objects)


def whole(pictures: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """For each picture 1.0 where `key` (`success`, `look`) holds in all its regions, else 0.0."""
    return np.array([picture[key] == picture["regions"] for picture in pictures], dtype=float)
