"""Layouts: boxes, masks and colour maps -> regions -> maps at every attention resolution.

Boxes are `(xmin, ymin, xmax, ymax)` in fractions of the image; masks are `(height, width)` in [0, 1], 1 inside. A mask
or colour map of another size is stretched to the picture's; how they are read is in `layout_images.py`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import numbers
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from .layout_images import COLOR_KEYS, MIN_PEAK, read_color_map, read_mask
from .region_contents import (
    CONTENT_KEYS,
    HELD_KEYS,
    digest_contents,
    name_of_contents,
    read_contents,
    read_number,
)
from .unknown_names import did_you_mean

__multisubject_version__ = "0.1.0"

Box = tuple[float, float, float, float]

DEFAULT_WEIGHT = 2.5
BACKGROUND = "background"
"""The address of what no other region covers."""
_REGION_KEYS = (*COLOR_KEYS, "box", "mask")


@dataclass(frozen=True, eq=False)
class Region:
    """Where one subject stands, and what else its place holds.

    Args:
        subject: a subject's name or a phrase of the prompt, without angle brackets; where the region names neither,
            what to call it.
        mask: `(height, width)` float32 in [0, 1], with priorities resolved; its peak is at least 1/255.
        weight: how strongly the subject's tokens are pulled inside the region.
        occurrence: 1-based, which of several equal phrases of the prompt; None where there is only one.
        is_named: whether `subject` names words of the prompt; a region that holds something need not.
        is_background: whether it is what no other region covers.
        prompt: words of its own, seen by this region alone; subjects as `<name>`.
        negative_prompt: what not to show here, beside what the picture's own says.
        lora: names of LoRAs that act here -> scale.
        ip_adapter_image: reference pictures: a PIL image or array, embeddings (torch tensor), a list of these, or a
            dict of them by adapter.
        begin, end: fractions of the steps between which the region guides, from 0 to 1.
        strength: factor of the weight; more than 0.
        place: where it stands in the layout, such as `layout[1] ('dog')`, for messages.
    """

    subject: str
    mask: np.ndarray
    weight: float = DEFAULT_WEIGHT
    occurrence: int | None = None
    is_named: bool = True
    is_background: bool = False
    prompt: str | None = None
    negative_prompt: str | None = None
    lora: Mapping[str, float] | None = None
    ip_adapter_image: Any = None
    begin: float = 0.0
    end: float = 1.0
    strength: float = 1.0
    place: str = ""


def is_whole(value: Any, at_least: int) -> bool:
    """Whether a value is a whole number of at least so much; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= at_least


def region_names(regions: Sequence[Region]) -> list[str]:
    """One name per region: its subject, with the occurrence where several regions share one (`dog 1`, `dog 2`)."""
    subjects = [region.subject for region in regions]
    names: list[str] = []
    for subject, region in zip(subjects, regions, strict=True):
        taken = {f"{other.subject} {other.occurrence}" for other in regions if other.occurrence} | {*names}
        numbered = (f"{subject} {count}" for count in itertools.count(1))
        name = f"{subject} {region.occurrence}" if region.occurrence else next(n for n in numbered if n not in taken)
        names.append(subject if subjects.count(subject) == 1 else name)
    return names


def parse_layout(
    layout: Any, *, height: int, width: int, color_context: Mapping[Any, Any] | None = None
) -> tuple[Region, ...]:
    """Read one prompt's layout.

    Args:
        layout: one of
            - `{subject or phrase: box or mask}`,
            - a list of dicts with `subject` (or `phrase`) and `box` or `mask`, and as needed `occurrence`, `weight`,
              `priority` (default 0: where regions overlap, the higher one takes the place and equal ones share it) and
              `feather` (width of a soft edge: the standard deviation of a Gaussian blur as a fraction of the shorter
              side). A region may hold `prompt`, `negative_prompt`, `lora` and `ip_adapter_image` of its own, and then
              needs no `subject`; `begin` and `end` are the fractions of the steps between which it guides (0 and 1),
              `strength` is a factor of its weight (1; 0 switches the region off). `{"subject": "background"}` without
              box and mask is what no other region covers,
            - a colour map, with `color_context`,
            - None: no regions.
            Masks and colour maps are PIL images, paths, `data:image/png;base64,…` or arrays (NumPy or torch). A mask is
            boolean, 0/1, 8- or 16-bit, or floats in [0, 1]; an image with transparency stands for its alpha channel.
        height: picture's height in pixels.
        width: picture's width in pixels.
        color_context: colour of the map (`"255,0,0"`, `(255, 0, 0)` or `"#ff0000"`) -> `[subject, weight]`, a subject,
            a dict with the keys above, or None for a colour that is background. Without a None the commonest grey of
            the map (black and white included) that is not listed is the background, and so is full transparency. A
            pixel on a blended edge is shared between the two colours it blends.

    Returns:
        One region for each `(subject, occurrence)`, in the order of the layout: parts with the same address are joined.
        What is switched off is left out.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a box, mask, colour, key or number that cannot be used; the message names it and the remedy.
    """
    for name, size in (("height", height), ("width", width)):
        if not is_whole(size, at_least=1):
            raise ValueError(f"{name} is {size!r}, expected a positive whole number of pixels.")
    is_list = isinstance(layout, Sequence) and not isinstance(layout, str)
    if color_context is not None and (layout is None or is_list or isinstance(layout, Mapping)):
        raise ValueError(
            f"color_context came with a layout of type {type(layout).__name__}, expected a colour-map image. Pass the "
            "image as layout, or leave color_context out."
        )
    if layout is None:
        return ()
    if isinstance(layout, Mapping):
        entries = {f"layout[{subject!r}]": _mapping_entry(subject, value) for subject, value in layout.items()}
    elif is_list:
        entries = {f"layout[{i}]": entry for i, entry in enumerate(layout)}
    elif isinstance(layout, str | os.PathLike | Image.Image | np.ndarray | torch.Tensor):
        entries = read_color_map(layout, color_context)
    else:
        raise TypeError(
            f"layout is of type {type(layout).__name__}, expected a dict of boxes or masks, a list of dicts, or a "
            "colour-map image with color_context."
        )
    claims = [_read_entry(entry, place, (height, width)) for place, entry in entries.items()]
    backgrounds = [claim.region.place for claim in claims if claim.region.is_background]
    if len(backgrounds) > 1:
        raise ValueError(
            f"{backgrounds[0]} and {backgrounds[1]} are both what no other region covers, expected one of them. Write"
            " what they hold in one."
        )
    return _merge(_resolve_priorities([claim for claim in claims if claim.region.strength]))


def as_layout(regions: Iterable[Region]) -> list[dict[str, Any]]:
    """The list layout that `parse_layout` makes these regions of."""
    keys = (*CONTENT_KEYS, "weight", "occurrence")
    defaults = {part.name: part.default for part in fields(Region) if part.name in keys}
    entries = []
    for region in regions:
        # What a region without words leaves open it may not say, either.
        given = {key: getattr(region, key) for key in keys}
        entry = {key: value for key, value in given.items() if value is not defaults[key] and value != defaults[key]}
        if region.is_named or region.is_background:
            entry["subject"] = region.subject
        if not region.is_background:
            entry["mask"] = region.mask
        entries.append(entry)
    return entries


def layout_checksum(regions: Iterable[Region]) -> str:
    """SHA-256 of all that regions hold, as hexadecimal text: to tell whether the files of a layout have changed."""
    checksum = hashlib.sha256()
    for region in regions:
        checksum.update(json.dumps([region.subject, region.occurrence, region.weight]).encode())
        checksum.update(region.mask.tobytes())
        checksum.update(digest_contents(region))
    return checksum.hexdigest()


def masks_at(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Region masks at another resolution, without losing any region.

    Every cell gets the mean of the area that it covers. The best cell of each region is raised to that region's peak:
    a region too small for the grid keeps one cell, and one that fills a cell is not changed by it.

    Args:
        masks: `(regions, H, W)` in [0, 1].
        size: `(h, w)` of the result.

    Returns:
        `(regions, h, w)`, float32 in [0, 1], on the masks' device.
    """
    masks = masks.to(torch.float32)
    num_regions, height, width = masks.shape
    rows = _area_weights(height, size[0]).to(masks.device)  # [h, H]
    columns = _area_weights(width, size[1]).to(masks.device)  # [w, W]
    resized = (rows @ masks @ columns.T).clamp(0, 1)
    if num_regions:
        peaks = masks.flatten(1).amax(1, keepdim=True)
        cells = resized.flatten(1)
        resized = cells.scatter(1, cells.argmax(1, keepdim=True), peaks).view(num_regions, *size)
    return resized


@dataclass(frozen=True, eq=False)
class _Claim:
    """A region before overlaps are resolved."""

    region: Region
    priority: float


def _mapping_entry(subject: Any, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        raise TypeError(
            f"layout[{subject!r}] is a dict, expected a box or a mask. For more settings pass a list: "
            f"[{{'subject': {subject!r}, 'box': …, 'weight': …}}]."
        )
    is_numbers = isinstance(value, Sequence) and not isinstance(value, str)
    is_numbers = is_numbers or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim < 2)
    return {"subject": subject, "box" if is_numbers else "mask": value}


def _read_entry(entry: Any, place: str, size: tuple[int, int]) -> _Claim:
    """One dict of a list layout -> its claim on the picture."""
    if not isinstance(entry, Mapping):
        raise TypeError(
            f"{place} is of type {type(entry).__name__}, expected a dict such as "
            "{'subject': 'dog', 'box': (0.1, 0.2, 0.5, 0.9)}."
        )
    if unknown := [key for key in entry if key not in _REGION_KEYS]:
        raise ValueError(f"{place} has the unknown key {unknown[0]!r}; {did_you_mean(unknown[0], _REGION_KEYS)}")
    subject = _read_subject(entry, place)
    place = place if subject is None else _named(place, subject)
    contents = read_contents(entry, place)
    has_place = entry.get("box") is not None, entry.get("mask") is not None
    is_background = subject is not None and subject.casefold() == BACKGROUND and has_place == (False, False)
    if not is_background and has_place not in ((True, False), (False, True)):
        raise ValueError(f"{place} needs exactly one of `box` and `mask`.")
    if is_background:
        return _read_background(entry, place, size, contents)
    occurrence = entry.get("occurrence")
    if occurrence is not None and not is_whole(occurrence, at_least=1):
        raise ValueError(f"{place}: occurrence is {occurrence!r}, expected 1 for the first such phrase, 2, 3, …")
    if occurrence is not None and subject is None:
        raise ValueError(f"{place}: occurrence is {occurrence!r} without a `subject` or `phrase` that it counts.")
    weight = read_number(entry.get("weight", DEFAULT_WEIGHT), f"{place}: weight", low=0)
    priority = read_number(entry.get("priority", 0), f"{place}: priority")
    feather = read_number(entry.get("feather", 0), f"{place}: feather", low=0, high=0.5)

    if entry.get("box") is not None:
        mask = _box_mask(_read_box(entry["box"], place, size), size)
    else:
        mask = _resize(read_mask(entry["mask"], place), size)
    if feather:
        mask = _blur(mask, max(feather * min(size), 0.1))  # a blur of a tenth of a pixel changes nothing
    name = subject or name_of_contents(contents)
    occurrence = None if occurrence is None else int(occurrence)
    is_named = subject is not None
    region = Region(name, mask, weight, occurrence, is_named=is_named, place=_named(place, name), **contents)
    return _Claim(region, priority)


def _named(place: str, name: str) -> str:
    """A place in a layout with the name of what stands there, which a long text is shortened to."""
    short = name if len(name) <= 40 else f"{name[:39]}…"
    return place if repr(name) in place or repr(short) in place else f"{place} ({short!r})"


def _read_background(
    entry: Mapping[str, Any], place: str, size: tuple[int, int], contents: Mapping[str, Any]
) -> _Claim:
    """What no other region covers: the whole picture, behind everything else."""
    if meaningless := [key for key in ("occurrence", "priority", "feather") if entry.get(key) is not None]:
        raise ValueError(
            f"{place} has `{meaningless[0]}`, which the background cannot: expected none, or a `box` or `mask` that"
            " makes it a region of its own."
        )
    if not any(key in contents for key in HELD_KEYS):
        raise ValueError(
            f"{place} holds nothing: expected {', '.join(HELD_KEYS[:-1])} or {HELD_KEYS[-1]}, or a `box` or `mask`"
            " if words of the prompt are meant."
        )
    weight = read_number(entry.get("weight", DEFAULT_WEIGHT), f"{place}: weight", low=0)
    mask = np.ones(size, np.float32)
    region = Region(BACKGROUND, mask, weight, is_named=False, is_background=True, place=place, **contents)
    return _Claim(region, -math.inf)


def _read_subject(entry: Mapping[str, Any], place: str) -> str | None:
    given = [entry[key] for key in ("subject", "phrase") if entry.get(key) is not None]
    if len(given) > 1 or (not given and all(entry.get(key) is None for key in HELD_KEYS)):
        raise ValueError(
            f"{place} needs exactly one of `subject` and `phrase`, or neither if it holds something by itself:"
            f" {', '.join(HELD_KEYS)}."
        )
    if not given:
        return None
    if not isinstance(given[0], str):
        raise TypeError(f"{place}: subject is {given[0]!r}, expected a subject's name or words of the prompt.")
    subject = given[0].strip()
    if name := re.fullmatch(r"<([^<>]*)>", subject):
        subject = name[1].strip()
    if not subject:
        raise ValueError(f"{place}: subject is {given[0]!r}, expected a subject's name or words of the prompt.")
    return subject


# --- Boxes ---------------------------------------------------------------------------------------------------------


def _read_box(value: Any, place: str, size: tuple[int, int]) -> Box:
    expected = "expected (xmin, ymin, xmax, ymax) in fractions of the image, each from 0 to 1"
    if isinstance(value, np.ndarray | torch.Tensor):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{place}: box is of type {type(value).__name__}, {expected}.")
    if len(value) != 4 or not all(isinstance(edge, numbers.Real) and not isinstance(edge, bool) for edge in value):
        raise ValueError(
            f"{place}: box is {value!r}, {expected}. A mask must be an array or an image; a subject in several boxes "
            "takes one dict for each in a list layout."
        )
    # A whole number may be too large for a float.
    xmin, ymin, xmax, ymax = box = tuple(math.inf if edge > sys.float_info.max else float(edge) for edge in value)
    if not all(map(math.isfinite, box)):
        raise ValueError(f"{place}: box is {box}, {expected}; it has a value that is not finite.")
    if min(box) < -1e-6 or max(box) > 1 + 1e-6:
        height, width = size
        if min(box) >= 0 and max(xmin, xmax) <= width and max(ymin, ymax) <= height and max(box) >= 2:
            fractions = tuple(round(edge / side, 4) for edge, side in zip(box, (width, height) * 2, strict=True))
            remedy = f"If these are pixels of the {width}x{height} picture, pass {fractions}."
        else:
            remedy = "Clip it to the image; pixels must be divided by the image's width (x) and height (y)."
        raise ValueError(f"{place}: box is {box}, {expected}. {remedy}")
    if xmin >= xmax or ymin >= ymax:
        axis = "xmin < xmax" if xmin >= xmax else "ymin < ymax"
        raise ValueError(
            f"{place}: box is {box}, which is empty or inverted: expected {axis}. The order is xmin, ymin, xmax, ymax."
        )
    return max(xmin, 0.0), max(ymin, 0.0), min(xmax, 1.0), min(ymax, 1.0)


def _box_mask(box: Box, size: tuple[int, int]) -> np.ndarray:
    """Each pixel's share of the box's area: a fractional edge gives a soft one. The best pixel is full."""
    xmin, ymin, xmax, ymax = box
    mask = np.outer(_overlap(ymin, ymax, size[0]), _overlap(xmin, xmax, size[1])).astype(np.float32)
    # Even a box of less than a pixel has a place in the picture.
    mask.flat[mask.argmax()] = 1.0
    return mask


def _overlap(start: float, stop: float, num_cells: int) -> np.ndarray:
    """Share of each of `num_cells` equal cells of [0, 1] that lies in [start, stop]."""
    edges = np.arange(num_cells + 1) / num_cells
    return np.clip(np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start), 0, None) * num_cells


def _area_weights(num_in: int, num_out: int) -> torch.Tensor:
    """`(num_out, num_in)`: how much of each output cell every input cell covers; rows sum to 1."""
    edges_in = torch.arange(num_in + 1, dtype=torch.float64) / num_in
    edges_out = torch.arange(num_out + 1, dtype=torch.float64)[:, None] / num_out
    overlap = torch.minimum(edges_in[1:], edges_out[1:]) - torch.maximum(edges_in[:-1], edges_out[:-1])
    return (overlap.clamp(min=0) * num_out).float()


def _resize(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return mask if mask.shape == size else masks_at(torch.from_numpy(mask)[None], size)[0].numpy()


def _blur(mask: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur, `sigma` in pixels. Nothing leaks over the image's border and the peak stays."""

    def kernel(num_cells: int) -> np.ndarray:
        offsets = np.arange(num_cells)
        weights = np.exp(-0.5 * ((offsets[:, None] - offsets) / sigma) ** 2)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)

    blurred = kernel(mask.shape[0]) @ mask @ kernel(mask.shape[1]).T
    return blurred * (mask.max() / blurred.max())


# --- Overlaps ------------------------------------------------------------------------------------------------------


def _resolve_priorities(claims: Sequence[_Claim]) -> list[Region]:
    """Take from every region what those of higher priority claim; equal priorities both keep their claim."""
    regions = []
    for claim in claims:
        region = claim.region
        higher = [other for other in claims if other.priority > claim.priority]
        if higher:
            mask = np.clip(region.mask - sum(other.region.mask for other in higher), 0, 1)
            if mask.max() < MIN_PEAK and region.is_background:
                raise ValueError(
                    f"{region.place} has no place: the other regions cover the whole picture. Make them smaller, or"
                    " leave it out."
                )
            if mask.max() < MIN_PEAK:
                raise ValueError(
                    f"{region.place} is covered entirely by regions of higher priority: "
                    f"{', '.join(other.region.place for other in higher)}. Move or enlarge it, or raise its priority "
                    f"({claim.priority:g})."
                )
            region = replace(region, mask=mask)
        regions.append(region)
    return regions


def _merge(regions: Sequence[Region]) -> tuple[Region, ...]:
    """Join the parts of one subject, since its tokens belong to all of them at once."""
    merged: dict[tuple[str, int | None] | int, Region] = {}
    for number, region in enumerate(regions):
        # What names no words of the prompt, or is the background, stands for itself.
        address = (region.subject.casefold(), region.occurrence) if region.is_named else number
        first = merged.get(address)
        if first is None:
            merged[address] = region
            continue
        if first.weight != region.weight:
            raise ValueError(
                f"subject {region.subject!r} has regions of different weights, {first.weight:g} and {region.weight:g}, "
                "expected one weight for a subject. Give them the same, or an `occurrence` each if the prompt names it "
                "several times."
            )
        for key in CONTENT_KEYS:
            if digest_contents(_only(first, key)) != digest_contents(_only(region, key)):
                raise ValueError(
                    f"subject {region.subject!r} has regions with different `{key}`, expected the same in all parts of"
                    " a subject. Write it in each of them, or give each an `occurrence` if the prompt names it several"
                    " times."
                )
        merged[address] = replace(first, mask=np.minimum(first.mask + region.mask, 1))
    return tuple(merged.values())


def _only(region: Region, key: str) -> Region:
    """A region with one of its contents alone."""
    return Region(region.subject, region.mask, **{key: getattr(region, key)})
