"""Folders of generated pictures -> scores: do they show the prompt, the subjects themselves, each in its region?

    python evaluate.py --pictures results --references petrucci=data/petrucci majesty=data/majesty

- CLIP-T: cosine of prompt and picture. CLIP-I, DINO: mean cosine of the picture and a subject's reference pictures.
- own, leak: a detector finds each subject by its class phrase; its crop against the crops of its own references, and
  against those of the picture's other subjects. What was not found has neither: read them beside `found`.
- IoU, centre: that detection and the region that the layout asked for; 0 for what was not found.

One thing in a picture is a detection of one subject at most.

Prompts, class phrases and layouts are read from the PNGs of `generate_images.py`. **The tests run this on tiny models
of random weights: it has never been run with released weights, nor on a GPU.**
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import HfArgumentParser

import multisubject
from multisubject.evaluation_data import (
    Crop,
    EvaluateArguments,
    EvaluationError,
    Notes,
    Picture,
    check_output,
    find_pictures,
    read_pairs,
    read_pictures,
)
from multisubject.evaluation_models import Detection, Detector, Encoder, Runtime, best_detections, box_iou
from multisubject.generate_images import parse_arguments
from multisubject.layout import Box, Region
from multisubject.pictures import png_bytes
from multisubject.subject_file import printable, write_atomically
from multisubject.visualization import contact_sheet, draw_regions

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
TOTAL = "(all)/"  # the row of all pictures; no folder is called that, for their names do not end in a slash
SHEET_PICTURES = 48
_SHEET_WIDTH = 384


# --- scores --------------------------------------------------------------------------------------------------------


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


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` `(n,)`, from 2,000 resamples; the same every time."""
    means = values[np.random.default_rng(0).integers(len(values), size=(2000, len(values)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def summarize(values: Iterable[float]) -> dict[str, Any]:
    """Mean, count, and 95 % bootstrap interval of the mean (`low`, `high`; None for a single value)."""
    array = np.asarray(list(values))
    low, high = bootstrap_interval(array) if len(array) > 1 else (None, None)
    return {"mean": float(array.mean()), "low": low, "high": high, "count": len(array)}


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


# --- results -------------------------------------------------------------------------------------------------------


def summaries(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """`folders` (the first is `TOTAL`) and `subjects` -> name -> metric -> what `summarize` returns."""
    folders: dict[str, list[Mapping[str, float]]] = {TOTAL: [record["scores"] for record in records]}
    subjects: dict[str, list[Mapping[str, float]]] = {}
    for record in records:
        folders.setdefault(record["folder"], []).append(record["scores"])
        for target in record["targets"]:
            subjects.setdefault(target["name"], []).append(target["scores"])
    return {
        kind: {
            name: {m: summarize(row[m] for row in rows if m in row) for m in METRICS if any(m in row for row in rows)}
            for name, rows in groups.items()
        }
        for kind, groups in (("folders", folders), ("subjects", subjects))
    }


def markdown_table(heading: str, rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """`mean [low, high]` of each metric that any row has, and how many scores a row's fullest column has."""
    metrics = [metric for metric in METRICS if any(metric in row for row in rows.values())]
    lines = [[heading, "n", *(METRICS[metric] for metric in metrics)], ["---"] * (2 + len(metrics))]
    for name, row in rows.items():
        cells = [str(max((one["count"] for one in row.values()), default=0))]
        for one in map(row.get, metrics):
            interval = f" [{one['low']:.3f}, {one['high']:.3f}]" if one and one["low"] is not None else ""
            cells.append(f"{one['mean']:.3f}{interval}" if one else "–")
        lines.append([printable(name).removesuffix("/").replace("|", "\\|"), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def evaluation_sheet(pictures: Sequence[Picture], records: Sequence[Mapping[str, Any]]) -> Image.Image:
    """At most `SHEET_PICTURES`, evenly spread, with their scores; regions asked for and detections drawn in."""
    cells = []
    for index in np.unique(np.linspace(0, len(pictures) - 1, min(SHEET_PICTURES, len(pictures))).round().astype(int)):
        image = Crop(pictures[index].path).load()
        image.thumbnail((_SHEET_WIDTH, _SHEET_WIDTH))
        drawn = []
        for target, row in zip(pictures[index].targets, records[index]["targets"], strict=True):
            if target.region is not None:
                drawn.append(replace(target.region, subject=f"{target.name} asked"))
            if row["detection"] is not None:
                box, mask = np.asarray(row["detection"]["box"]), np.zeros((image.height, image.width), np.float32)
                left, top, right, bottom = (box * (image.size * 2) + (0, 0, 0.999, 0.999)).astype(int)
                mask[top:bottom, left:right] = 1
                drawn.append(Region(f"{target.name} {row['detection']['score']:.2f}", mask))
        cell, scores = draw_regions(image, drawn), records[index]["scores"]
        captions = [f"{title} {scores[metric]:.2f}" for metric, title in METRICS.items() if metric in scores]
        for start in range(0, len(captions), 3):
            cell = contact_sheet([cell], captions=["  ".join(captions[start : start + 3])])
        cells.append(cell)
    return contact_sheet(cells)


# --- the command ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with status 2 and one message where arguments, pictures or models are wrong."""
    args: EvaluateArguments = parse_arguments(_parser(), argv)
    notes = Notes()
    try:
        # 1. Read what there is to compare, before anything heavy
        references = {
            name: find_pictures(f"--references {name}", folder, notes, recursive=False)
            for name, folder in read_pairs("--references", args.references).items()
        }
        pictures = read_pictures(args, references, notes)
        output = Path(str(args.output))
        check_output(output)
        # 2. Score it
        records = evaluate(pictures, references, args, notes)
    except (EvaluationError, ImportError) as error:  # some processors want a package that is not installed, and say so
        sys.exit(_error(error))

    # 3. Tell, before anything can fail
    summary = summaries(records)
    print(markdown_table("folder", summary["folders"]))
    if summary["subjects"]:
        print(f"\n{markdown_table('subject', summary['subjects'])}")
    print(f"\n{len(pictures)} pictures, {len(notes.damaged)} damaged ones left out. Mean [95 % bootstrap interval].")
    if left_out := [name for name in ("clip_model", "dino_model", "detector", "references") if not getattr(args, name)]:
        print(f"Without --{', --'.join(left_out)}: their scores are left out.")

    # 4. Write
    about = {"made_by": "multisubject-evaluate", "version": multisubject.__version__, "arguments": asdict(args)}
    result = {**about, "damaged": notes.damaged, "warnings": notes.warnings, **summary, "pictures": records}
    try:
        write_atomically(output, json.dumps(result, indent=1, allow_nan=False).encode())
        write_atomically(output.with_suffix(".png"), png_bytes(evaluation_sheet(pictures, records)))
    except OSError as error:
        message = (
            f"--output is {str(output)!r}; writing it and its contact sheet failed: {error}. Expected a folder with "
            "room for both. The means are above; for every picture's scores, run it again with another."
        )
        sys.exit(_error(EvaluationError(message)))
    print(f"scores: {output}\ncontact sheet: {output.with_suffix('.png')}")


def _error(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _parser() -> HfArgumentParser:
    return HfArgumentParser(
        EvaluateArguments,
        prog="multisubject-evaluate",
        description="Scores for folders of generated pictures: prompt (CLIP-T), subjects (CLIP-I, DINO), each subject "
        "where a detector finds it (own, leak), and the layout (IoU, centre).",
        epilog="multisubject-evaluate --pictures results --references petrucci=data/petrucci majesty=data/majesty, or "
        "for any pictures: multisubject-evaluate --pictures photos --prompt 'a photo of a person' --references "
        "petrucci=data/petrucci --class_phrases petrucci=person. Tested with tiny models of random weights only, never "
        "with released ones.",
    )


if __name__ == "__main__":
    main()
