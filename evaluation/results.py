"""Scores as people read them: means with their intervals, tables, a sheet of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from multisubject.evaluation.intervals import summarize
from multisubject.evaluation.pictures import Crop, Picture
from multisubject.evaluation.scores import METRICS
from multisubject.layout import Region
from multisubject.subject_file import printable
from multisubject.visualization import contact_sheet, draw_regions

TOTAL = "(all)/"  # the row of all pictures; no folder is called that, for their names do not end in a slash
SHEET_PICTURES = 48
_SHEET_WIDTH = 384


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
