"""From models and pictures to numbers: which detection is whose, how well it stands, what it looks like."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multisubject.evaluation.arguments import EvaluateArguments
from multisubject.evaluation.models import Detection, Detector, Encoder, Runtime, best_detections, box_iou
from multisubject.evaluation.pictures import Crop, Notes, Picture
from multisubject.layout import Box, Region
from multisubject.subject_file import printable

# Key of a score -> heading of its column. Three at a time make a line of the contact sheet.
METRICS = {
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "found": "found",
    "iou": "IoU",
    "centre": "centre",
    "clip_i_own": "CLIP-I own",
    "clip_i_leak": "CLIP-I leak",
    "dino_own": "DINO own",
    "dino_leak": "DINO leak",
}


def evaluate(
    pictures: Sequence[Picture], references: Mapping[str, Sequence[Path]], args: EvaluateArguments, notes: Notes
) -> list[dict[str, Any]]:
    """Score pictures.

    Args:
        pictures: what to score.
        references: name -> files, for each reference that a target names.
        args: which models, and how to run them.
        notes: gets what has to be said about the results.

    Returns:
        One record per picture, as plain JSON data: `file`, `folder`, `prompt`, `targets` (each with `name`, `phrase`,
        `detection`, `scores`) and `scores`: the means over its targets, and CLIP-T. Scores have the keys of `METRICS`.

    Raises:
        EvaluationError: a model that cannot be used for this.
    """
    runtime = Runtime(str(args.device), args.dtype, args.batch_size)

    # 1. Find the targets in the pictures, and the subjects in their references
    examples = {name: [Crop(path) for path in paths] for name, paths in references.items()}
    found: dict[tuple[Path, str], list[Detection]] = {}
    if args.detector:
        phrases = {target.reference: target.phrase for picture in pictures for target in picture.targets}
        detector = Detector.load(args.detector, runtime, args.detector_query, args.detection_threshold)
        wanted = [(picture.path, target.phrase) for picture in pictures for target in picture.targets]
        found = detector.detect(wanted + [(path, phrases[name]) for name in references for path in references[name]])
        for name, paths in references.items():
            boxes = [next((one.box for one in found[path, phrases[name]]), None) for path in paths]
            examples[name] = [Crop(path, box) for path, box in zip(paths, boxes, strict=True)]
            if missed := boxes.count(None):
                notes.warn(f"{name}: no {phrases[name]!r} found in {missed} of {len(boxes)} references, taken whole.")

    # 2. Vectors of whole pictures, of crops and of prompts
    encoders: dict[str, Encoder] = {}
    if args.dino_model:
        encoders["dino"] = Encoder.dino(args.dino_model, runtime)
    texts: dict[str, torch.Tensor] = {}
    if args.clip_model:
        encoders["clip_i"] = clip = Encoder.clip(args.clip_model, runtime)
        texts = clip.texts(picture.prompt for picture in pictures if picture.prompt is not None)
        for prompt in texts:
            if clip.count_tokens(prompt) > clip.text_limit:
                notes.warn(f"CLIP-T reads no more than {clip.text_limit} tokens of {printable(prompt)!r}.")
    crops = [Crop(path) for paths in references.values() for path in paths]
    crops += [crop for group in examples.values() for crop in group]
    for picture in pictures:
        crops.append(Crop(picture.path))
        for choice, _ in _choices(picture, found) if references else ():
            crops += [Crop(picture.path, one.box) for one in choice.values()]
    vectors = {metric: encoder.images(crops) for metric, encoder in encoders.items()}

    def similarity(metric: str, crop: Crop, others: Sequence[Crop]) -> float:
        return float((torch.stack([vectors[metric][other] for other in others]) @ vectors[metric][crop]).mean())

    def likeness(metric: str, crop: Crop, name: str) -> float:
        return similarity(metric, crop, examples[name])

    # 3. Put them together
    looks_like = partial(likeness, next(iter(vectors))) if vectors else None
    records = []
    for picture in pictures:
        rows: list[dict[str, Any]] = []
        detections = _assign(picture, found, looks_like)
        for target, detection in zip(picture.targets, detections, strict=True):
            scores: dict[str, float] = {}
            others = {other.reference for other in picture.targets} - {target.reference, None}
            for metric in vectors if target.reference else ():
                whole = [Crop(path) for path in references[str(target.reference)]]
                scores[metric] = similarity(metric, Crop(picture.path), whole)
                if detection:
                    crop = Crop(picture.path, detection.box)
                    scores[f"{metric}_own"] = likeness(metric, crop, str(target.reference))
                    if others:
                        leaks = [likeness(metric, crop, str(name)) for name in others]
                        scores[f"{metric}_leak"] = float(np.mean(leaks))
            if args.detector:
                scores["found"] = float(detection is not None)
            if target.region is not None:
                scores["iou"], scores["centre"] = layout_score(detection.box if detection else None, target.region)
            rows.append(
                {
                    "name": target.name,
                    "phrase": target.phrase,
                    "detection": asdict(detection) if detection else None,
                    "scores": scores,
                }
            )
        columns = {metric: [row["scores"][metric] for row in rows if metric in row["scores"]] for metric in METRICS}
        means = {metric: float(np.mean(values)) for metric, values in columns.items() if values}
        if picture.prompt in texts:
            means["clip_t"] = float(texts[picture.prompt] @ vectors["clip_i"][Crop(picture.path)])
        named = {"file": str(picture.path), "folder": picture.folder, "prompt": picture.prompt}
        records.append({**named, "scores": means, "targets": rows})
    return records


def _choices(
    picture: Picture, found: Mapping[tuple[Path, str], list[Detection]]
) -> list[tuple[dict[int, Detection], bool]]:
    """What each target may be given: thing -> its detection, best first; and whether it and its rivals have regions."""
    targets = picture.targets
    candidates = [found.get((picture.path, target.phrase), [])[: len(targets)] for target in targets]
    things = best_detections(itertools.chain(*candidates))
    claims: list[dict[int, Detection]] = [{} for _ in targets]
    for claim, detections in zip(claims, candidates, strict=True):
        for detection in detections:
            claim.setdefault(int(np.argmax([box_iou(detection.box, thing.box) for thing in things])), detection)
    choices: list[tuple[dict[int, Detection], bool]] = [({}, False) for _ in targets]
    for rivals in _rivals([target.phrase for target in targets], claims):
        all_placed = all(targets[row].region for row in rivals)
        for row in rivals:
            choices[row] = dict(list(claims[row].items())[: len(rivals)]), all_placed
    return choices


def _assign(
    picture: Picture,
    found: Mapping[tuple[Path, str], list[Detection]],
    looks_like: Callable[[Crop, str], float] | None,
) -> list[Detection | None]:
    """The detection of each target; one thing in the picture, whatever it is called, is that of one target at most.

    Targets that may want the same thing are told apart by their regions if all have one, else by what they look like:
    then `own` is the best that can be said of them. Where neither tells, the detector's score does.
    """
    choices = _choices(picture, found)
    num_things = 1 + max((thing for choice, _ in choices for thing in choice), default=-1)
    scores = np.full((len(choices), num_things), -np.inf)
    for row, (target, (choice, all_placed)) in enumerate(zip(picture.targets, choices, strict=True)):
        for column, detection in choice.items():
            if target.region and all_placed:
                scores[row, column] = layout_score(detection.box, target.region)[0]
            elif target.reference and looks_like:
                scores[row, column] = looks_like(Crop(picture.path, detection.box), target.reference)
            else:  # less than any cosine; and who has the smaller choice goes first
                scores[row, column] = detection.score - 2 * len(choice)
    columns = zip(choices, match(scores), strict=True)
    return [None if column is None else choice[column] for (choice, _), column in columns]


def _rivals(phrases: Sequence[str], claims: Sequence[Mapping[int, Detection]]) -> list[set[int]]:
    """Groups of targets that may want the same thing: those of one phrase, and groups whose choices meet.

    The choice of each target in a group of n is the n best things of its phrase.
    """

    def choice(group: set[int]) -> set[int]:
        return {thing for row in group for thing in list(claims[row])[: len(group)]}

    def meet(pair: tuple[set[int], ...]) -> bool:
        return bool(choice(pair[0]) & choice(pair[1]))

    groups = [{row for row, other in enumerate(phrases) if other == phrase} for phrase in dict.fromkeys(phrases)]
    while meeting := next(filter(meet, itertools.combinations(groups, 2)), None):
        groups = [group for group in groups if group not in meeting] + [set.union(*meeting)]
    return groups


def layout_score(box: Box | None, region: Region) -> tuple[float, float]:
    """How well a detection stands in its region.

    Args:
        box: the detection's; None if nothing was found, which scores 0.
        region: what the layout asked for. Of a mask, what is at least half its peak is inside.

    Returns:
        IoU of the box and the region's bounding box, and whether (1 or 0) the box's centre is inside the region.
    """
    if box is None:
        return 0.0, 0.0
    inside = region.mask >= region.mask.max() / 2
    height, width = inside.shape
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    bounds = (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)
    row, column = int((box[1] + box[3]) / 2 * height), int((box[0] + box[2]) / 2 * width)
    return float(box_iou(box, bounds)), float(inside[min(row, height - 1), min(column, width - 1)])


def match(scores: np.ndarray) -> list[int | None]:
    """Give each row (target) a column (thing) of its own, the best pair first; None to rows that are left over.

    A pair whose score is -inf is never made.
    """
    columns: list[int | None] = [None] * len(scores)
    order = np.argsort(-scores, axis=None, kind="stable")  # equal pairs: the first target gets the first detection
    for row, column in zip(*np.unravel_index(order, scores.shape), strict=True):
        if np.isfinite(scores[row, column]) and columns[row] is None and int(column) not in columns:
            columns[row] = int(column)
    return columns
