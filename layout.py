"""Layouts: boxes, masks and colour maps -> regions -> maps at every attention resolution.

Boxes are `(xmin, ymin, xmax, ymax)` in fractions of the image; masks are `(height, width)` in [0, 1], 1 inside. A mask
or colour map of another size is stretched to the picture's.
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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

__multisubject_version__ = "0.1.0"

Box = tuple[float, float, float, float]

DEFAULT_WEIGHT = 2.5
# A claim weaker than one step of an 8-bit mask is none.
_MIN_PEAK = 1 / 255
# Colour maps. A colour is recognised within this RGB distance (of 441), which covers the noise of a JPEG, or within a
# third of the distance between two colours of the map.
_COLOR_NOISE = 60.0
# A grey's channels differ by no more than this.
_GRAY_SPREAD = 24
# Neighbouring pixels of one flat area differ by no more than this.
_FLAT_STEP = 4
# Shares of the image: an unlisted colour that is drawn, not an artefact of edges; a grey that is the background.
_DRAWN_AREA = 1e-3
_BACKGROUND_AREA = 1e-2
_REGION_KEYS = ("subject", "phrase", "occurrence", "box", "mask", "weight", "priority", "feather")
_COLOR_KEYS = tuple(key for key in _REGION_KEYS if key not in ("box", "mask"))


@dataclass(frozen=True, eq=False)
class Region:
    """Where one subject stands.

    Args:
        subject: a subject's name or a phrase of the prompt, without angle brackets.
        mask: `(height, width)` float32 in [0, 1], with priorities resolved; its peak is at least 1/255.
        weight: how strongly the subject's tokens are pulled inside the region.
        occurrence: 1-based, which of several equal phrases of the prompt; None where there is only one.
    """

    subject: str
    mask: np.ndarray
    weight: float = DEFAULT_WEIGHT
    occurrence: int | None = None


def region_names(regions: Sequence[Region]) -> list[str]:
    """One name per region: its subject, with the occurrence where several regions share one (`dog 1`, `dog 2`)."""
    subjects = [region.subject for region in regions]
    names = []
    for subject, region in zip(subjects, regions, strict=True):
        taken = {other.occurrence for other in regions if other.subject == subject}
        number = region.occurrence or next(count for count in itertools.count(1) if count not in taken)
        names.append(subject if subjects.count(subject) == 1 else f"{subject} {number}")
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
              side),
            - a colour map, with `color_context`,
            - None: no regions.
            Masks and colour maps are PIL images, paths, or arrays (NumPy or torch). A mask is boolean, 0/1, 8- or
            16-bit, or floats in [0, 1]; an image with transparency stands for its alpha channel.
        height: picture's height in pixels.
        width: picture's width in pixels.
        color_context: colour of the map (`"255,0,0"`, `(255, 0, 0)` or `"#ff0000"`) -> `[subject, weight]`, a subject,
            a dict with the keys above, or None for a colour that is background. Without a None the commonest grey of
            the map (black and white included) that is not listed is the background, and so is full transparency. A
            pixel on a blended edge is shared between the two colours it blends.

    Returns:
        One region for each `(subject, occurrence)`, in the order of the layout: parts with the same address are joined.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a box, mask, colour, key or number that cannot be used; the message names it and the remedy.
    """
    for name, size in (("height", height), ("width", width)):
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
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
        entries = _color_map_entries(layout, color_context)
    else:
        raise TypeError(
            f"layout is of type {type(layout).__name__}, expected a dict of boxes or masks, a list of dicts, or a "
            "colour-map image with color_context."
        )
    claims = [_read_entry(entry, place, (height, width)) for place, entry in entries.items()]
    return _merge(_resolve_priorities(claims))


def layout_checksum(regions: Iterable[Region]) -> str:
    """SHA-256 of all that regions hold, as hexadecimal text: to tell whether the files of a layout have changed."""
    checksum = hashlib.sha256()
    for region in regions:
        checksum.update(json.dumps([region.subject, region.occurrence, region.weight]).encode())
        checksum.update(region.mask.tobytes())
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
    """A region before overlaps are resolved. `place` is where it came from, for messages."""

    region: Region
    priority: float
    place: str


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
        raise ValueError(f"{place} has the unknown key {unknown[0]!r}; expected {', '.join(_REGION_KEYS)}.")
    subject = _read_subject(entry, place)
    place = place if repr(subject) in place else f"{place} ({subject!r})"
    if (entry.get("box") is None) == (entry.get("mask") is None):
        raise ValueError(f"{place} needs exactly one of `box` and `mask`.")
    occurrence = entry.get("occurrence")
    if occurrence is not None and (
        isinstance(occurrence, bool) or not isinstance(occurrence, numbers.Integral) or occurrence < 1
    ):
        raise ValueError(f"{place}: occurrence is {occurrence!r}, expected 1 for the first such phrase, 2, 3, …")
    weight = _read_number(entry.get("weight", DEFAULT_WEIGHT), f"{place}: weight", low=0)
    priority = _read_number(entry.get("priority", 0), f"{place}: priority")
    feather = _read_number(entry.get("feather", 0), f"{place}: feather", low=0, high=0.5)

    if entry.get("box") is not None:
        mask = _box_mask(_read_box(entry["box"], place, size), size)
    else:
        mask = _resize(_read_mask(entry["mask"], place), size)
    if feather:
        mask = _blur(mask, max(feather * min(size), 0.1))  # a blur of a tenth of a pixel changes nothing
    region = Region(subject, mask, weight, None if occurrence is None else int(occurrence))
    return _Claim(region, priority, place)


def _read_subject(entry: Mapping[str, Any], place: str) -> str:
    given = [entry[key] for key in ("subject", "phrase") if entry.get(key) is not None]
    if len(given) != 1:
        raise ValueError(f"{place} needs exactly one of `subject` and `phrase`.")
    if not isinstance(given[0], str):
        raise TypeError(f"{place}: subject is {given[0]!r}, expected a subject's name or words of the prompt.")
    subject = given[0].strip()
    if name := re.fullmatch(r"<([^<>]*)>", subject):
        subject = name[1].strip()
    if not subject:
        raise ValueError(f"{place}: subject is {given[0]!r}, expected a subject's name or words of the prompt.")
    return subject


def _read_number(value: Any, place: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max or not low <= value <= high:
        limits = f" from {low:g} to {high:g}" if math.isfinite(high) else f" of at least {low:g}" if low == 0 else ""
        raise ValueError(f"{place} is {value!r}, expected a finite number{limits}.")
    return float(value)


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


# --- Masks ---------------------------------------------------------------------------------------------------------


def _read_mask(value: Any, place: str) -> np.ndarray:
    """Any kind of mask -> `(h, w)` float32 in [0, 1] at its own size."""
    place = f"{place}: mask"
    array = _as_array(value, place)
    if array.ndim == 3 and array.shape[-1] in (2, 3, 4):
        array = _flatten_channels(array, place)
    array = array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array
    array = array.squeeze(0) if array.ndim == 3 and array.shape[0] == 1 else array
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{place} has shape {array.shape}, expected (height, width).")
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{place} has dtype {array.dtype}, expected bool, uint8, uint16 or floats from 0 to 1.")
    low, high = array.min(), array.max()
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError(f"{place} has values that are not finite, expected 0 (outside) to 1 (inside).")
    # Integers: 0/1 is a common way to write a boolean mask; else the full scale is that of 8 or 16 bits.
    scale = 1 if array.dtype.kind in "bf" or high <= 1 else 255 if high <= 255 else 65535
    if low < 0 or high > scale:
        raise ValueError(
            f"{place} has values from {low} to {high}, expected bool, integers from 0 to 255 (or 0/1), or floats from "
            "0 to 1. Rescale it."
        )
    mask = array.astype(np.float32) / scale
    if mask.max() < _MIN_PEAK:
        raise ValueError(
            f"{place} is empty: its largest value is {mask.max():g}, expected some above 0. Draw the region."
        )
    return mask


def _flatten_channels(array: np.ndarray, place: str) -> np.ndarray:
    """Channels last -> one channel: alpha where there is transparency, else the grey value."""
    if array.shape[-1] in (2, 4):
        alpha, array = array[..., -1], array[..., :-1]
        if alpha.min() < (1 if alpha.dtype.kind in "bf" else 255 if alpha.max() <= 255 else 65535):
            return alpha
    spread = array.max(-1).astype(np.float32) - array.min(-1)
    if spread.max() > _GRAY_SPREAD / (255 if array.dtype.kind == "f" else 1):
        raise ValueError(
            f"{place} is a colour image, expected a black-and-white one, or one with transparency. To give several "
            "subjects by colour, pass the image as `layout` together with `color_context`."
        )
    return array[..., 0]


def _as_array(value: Any, place: str) -> np.ndarray:
    """An image, path, array or tensor -> array, `(h, w)` or `(h, w, channels)`."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, str | os.PathLike):
        try:
            with Image.open(value) as image:
                value = ImageOps.exif_transpose(image)  # as viewers show it
                value.load()
        except FileNotFoundError:
            raise ValueError(
                f"{place}: file {os.fspath(value)!r} does not exist. Check the path and working folder."
            ) from None
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{place}: file {os.fspath(value)!r} is not a readable image ({error}). Save it as PNG."
            ) from error
    if not isinstance(value, Image.Image):
        raise TypeError(f"{place} is of type {type(value).__name__}, expected a PIL image, a path or an array.")
    if "transparency" in value.info:
        return np.asarray(value.convert("RGBA"))
    return np.asarray(value.convert("RGB") if value.mode in ("P", "CMYK", "YCbCr", "HSV", "LAB") else value)


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


# --- Colour maps ---------------------------------------------------------------------------------------------------


def _color_map_entries(image: Any, color_context: Mapping[Any, Any] | None) -> dict[str, dict[str, Any]]:
    """Split a colour map into the entries of a list layout, one for each colour that stands for a subject."""
    rgb, alpha = _read_color_map(image)
    if not color_context:
        raise ValueError(
            "layout is an image without a color_context, expected one such as {'255,0,0': ['person', 2.5]}. For a mask "
            "of one subject pass layout={'person': image}."
        )
    colors: dict[tuple[int, ...], str] = {}
    entries: dict[str, dict[str, Any] | None] = {}
    for key, value in color_context.items():
        place = f"color_context[{key!r}]"
        color = _read_color(key, place)
        if color in colors:
            raise ValueError(f"{place} is the same colour as {colors[color]}; expected each colour once.")
        colors[color] = place
        entries[place] = _read_color_value(value, place)
    palette = np.array(list(colors), np.float32)
    masks = _share_colors(rgb, alpha, palette, list(colors.values()), [entry is None for entry in entries.values()])
    return {
        place: {**entry, "mask": mask}
        for (place, entry), mask in zip(entries.items(), masks, strict=True)
        if entry is not None
    }


def _read_color_map(image: Any) -> tuple[np.ndarray, np.ndarray]:
    """A colour map -> RGB `(h, w, 3)` from 0 to 255 and alpha `(h, w)` from 0 to 1, float32."""
    array = _as_array(image, "layout")
    if isinstance(image, torch.Tensor) and array.ndim == 3 and array.shape[0] in (3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 2, 3, 4) or array.size == 0 or array.dtype.kind not in "biuf":
        raise ValueError(
            f"layout has shape {array.shape} and dtype {array.dtype}, expected a colour map (height, width, 3) of "
            "uint8 or of floats from 0 to 1."
        )
    scale = 1.0 if array.dtype.kind in "bf" else 255.0 if array.max() <= 255 else 65535.0
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > scale:
        raise ValueError(
            f"layout has values from {array.min()} to {array.max()}, expected uint8 or floats from 0 to 1. Rescale it."
        )
    array = array.astype(np.float32) / scale
    if array.shape[-1] in (2, 4):
        array, alpha = array[..., :-1], array[..., -1]
    else:
        alpha = np.ones(array.shape[:2], np.float32)
    return np.broadcast_to(array * 255, (*array.shape[:2], 3)), alpha


def _read_color(key: Any, place: str) -> tuple[int, ...]:
    parts: Any = key
    if isinstance(key, str):
        try:
            parts = [int(part) for part in key.split(",")] if "," in key else ImageColor.getrgb(key.strip())
        except ValueError:
            parts = None
    is_rgb = isinstance(parts, Sequence) and len(parts) == 3
    if not is_rgb or not all(isinstance(part, numbers.Integral) and 0 <= int(part) <= 255 for part in parts):
        raise ValueError(
            f"{place}: expected a colour such as '255,0,0' or '#ff0000', three whole numbers from 0 to 255."
        )
    return tuple(int(part) for part in parts)


def _read_color_value(value: Any, place: str) -> dict[str, Any] | None:
    """What a colour stands for -> the entry of a list layout but for its mask; None for background."""
    if value is None:
        return None
    if isinstance(value, str):
        return {"subject": value}
    if isinstance(value, Mapping):
        if unknown := [key for key in value if key not in _COLOR_KEYS]:
            raise ValueError(f"{place} has the unknown key {unknown[0]!r}; expected {', '.join(_COLOR_KEYS)}.")
        return dict(value)
    if isinstance(value, Sequence) and 1 <= len(value) <= 2:
        return dict(zip(("subject", "weight"), value, strict=False))
    raise ValueError(
        f"{place} is {value!r}, expected [subject, weight] such as ['person', 2.5], a dict, or None for background."
    )


def _share_colors(
    rgb: np.ndarray, alpha: np.ndarray, palette: np.ndarray, places: Sequence[str], is_background: Sequence[bool]
) -> list[np.ndarray]:
    """How much of every pixel belongs to each colour of the palette: one `(h, w)` float32 map in [0, 1] per colour.

    A pixel near a colour is that colour's. Any other pixel should be a blend of two colours that are drawn nearby, and
    is shared between them in the proportion of the blend; what no blend explains is an unlisted colour.
    """
    num_listed, visible = len(palette), alpha > 0
    noise = _color_noise(palette)
    label, distance = _nearest_color(rgb, palette)
    if not any(is_background):
        background = _find_background(rgb, visible & (distance > noise))
        if background is not None:
            palette = np.concatenate([palette, background[None]])
            noise = _color_noise(palette)
            label, distance = _nearest_color(rgb, palette)

    label = np.where(visible & (distance <= noise), label, -1)  # -1: not settled
    between = visible & (label < 0)
    blends = _disguised_blends(rgb, label, palette, noise)
    between |= blends
    label[blends] = -1
    ys, xs = np.nonzero(between)
    nearby = _drawn_nearby(label, len(palette), ys, xs)
    first, second, share, explained = _fit_blends(rgb[ys, xs], palette, nearby, noise)

    unexplained = np.zeros_like(between)
    unexplained[ys, xs] = ~explained
    absent = [place for index, place in enumerate(places) if not is_background[index] and not (label == index).any()]
    _check_colors(rgb, unexplained, absent)

    masks = []
    for index in range(num_listed):
        mask = (label == index).astype(np.float32)
        mask[ys, xs] += np.where(first == index, 1 - share, 0) + np.where(second == index, share, 0)
        masks.append(mask * alpha)
    return masks


def _color_noise(palette: np.ndarray) -> float:
    gaps = np.linalg.norm(palette[:, None] - palette, axis=-1)[np.triu_indices(len(palette), 1)]
    return min(_COLOR_NOISE, gaps.min(initial=np.inf) / 3)


def _nearest_color(rgb: np.ndarray, palette: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of every pixel's nearest colour, and the distance to it."""
    label = np.zeros(rgb.shape[:2], np.int16)
    nearest = np.full(rgb.shape[:2], np.inf, np.float32)
    for index, color in enumerate(palette):
        # |p - c|² without the |p|² that all colours share: a matrix product, much faster than the differences.
        distance = color @ color - 2 * (rgb @ color)
        label[distance < nearest] = index
        np.minimum(nearest, distance, out=nearest)
    nearest += np.einsum("...c,...c->...", rgb, rgb)
    return label, np.sqrt(np.clip(nearest, 0, None))


def _find_background(rgb: np.ndarray, unlisted: np.ndarray) -> np.ndarray | None:
    """The commonest grey among the pixels of no listed colour, if it covers enough of the image."""
    pixels = rgb[unlisted]
    gray = pixels[np.ptp(pixels, axis=-1) <= _GRAY_SPREAD] @ np.full(3, 1 / 3, np.float32)
    counts = np.convolve(np.bincount(gray.astype(np.int64), minlength=256), np.ones(17), mode="same")
    if counts.max() < _BACKGROUND_AREA * unlisted.size:
        return None
    level = gray[np.abs(gray - counts.argmax()) <= 9].mean()
    return np.full(3, level, np.float32)


def _disguised_blends(rgb: np.ndarray, label: np.ndarray, palette: np.ndarray, noise: float) -> np.ndarray:
    """Pixels that look like a colour but are the edge between two others, as grey is between black and white.

    Such a pixel lies among blends of the other two, with flat areas of these nearby and none of its own.
    """
    triples = [
        (index, i, j)
        for index, color in enumerate(palette)
        for i, j in itertools.combinations(range(len(palette)), 2)
        if index not in (i, j) and _fit_segment(color, palette[i], palette[j])[1] <= noise
    ]
    blends = np.zeros(label.shape, bool)
    if triples:
        flat_label = np.where(_flat(rgb), label, -1)
        for index, i, j in triples:
            ys, xs = np.nonzero((label == index) & _erode(_fit_segment(rgb, palette[i], palette[j])[1] <= noise))
            nearby = _drawn_nearby(flat_label, len(palette), ys, xs)
            blends[ys, xs] |= ~nearby[:, index] & nearby[:, i] & nearby[:, j]
    return blends


def _flat(rgb: np.ndarray) -> np.ndarray:
    """Pixels that differ from none of their four neighbours by more than compression does within an area."""
    flat = np.ones(rgb.shape[:2], bool)
    level_x = np.abs(np.diff(rgb, axis=1)).max(-1) <= _FLAT_STEP
    level_y = np.abs(np.diff(rgb, axis=0)).max(-1) <= _FLAT_STEP
    flat[:, 1:] &= level_x
    flat[:, :-1] &= level_x
    flat[1:] &= level_y
    flat[:-1] &= level_y
    return flat


def _drawn_nearby(label: np.ndarray, num_colors: int, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """`(pixels, colours)`: is the colour drawn in the block of that pixel or in one of the eight blocks around it?"""
    block = max(8, min(label.shape) // 32)
    rows, columns = np.arange(0, label.shape[0], block), np.arange(0, label.shape[1], block)
    nearby = np.zeros((len(ys), num_colors), bool)
    for index in range(num_colors):
        blocks = np.logical_or.reduceat(np.logical_or.reduceat(label == index, rows, axis=0), columns, axis=1)
        nearby[:, index] = _dilate(blocks)[ys // block, xs // block]
    return nearby


def _fit_blends(
    pixels: np.ndarray, palette: np.ndarray, nearby: np.ndarray, noise: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each pixel's best blend of two nearby colours: their indices, the second one's share, and whether it explains it.

    Pixels that no blend explains are all of the nearest colour.
    """
    num_pixels = len(pixels)
    first, second = np.zeros(num_pixels, np.int16), np.zeros(num_pixels, np.int16)
    share, residual = np.zeros(num_pixels, np.float32), np.full(num_pixels, np.inf, np.float32)
    for i, j in itertools.combinations(range(len(palette)), 2):
        pair_share, pair_residual = _fit_segment(pixels, palette[i], palette[j])
        better = nearby[:, i] & nearby[:, j] & (pair_residual < residual)
        first[better], second[better] = i, j
        share[better], residual[better] = pair_share[better], pair_residual[better]
    explained = residual <= noise
    label, _ = _nearest_color(pixels[~explained][None], palette)
    first[~explained] = second[~explained] = label[0]
    return first, second, share, explained


def _fit_segment(pixels: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where on the way from one colour to another each pixel lies (0 to 1), and how far beside it."""
    way = stop - start
    share = np.clip((pixels - start) @ way / (way @ way), 0, 1)
    return share, np.linalg.norm(pixels - start - share[..., None] * way, axis=-1)


def _check_colors(rgb: np.ndarray, unexplained: np.ndarray, absent: Sequence[str]) -> None:
    """Every subject's colour must be drawn, and every colour that is drawn must be listed or background."""
    problems = [f"{place} is not in the colour map" for place in absent]
    # Compression leaves stray pixels, a drawing leaves areas (or, in a small map, a large share of it).
    core = _erode(unexplained)
    area = _DRAWN_AREA * unexplained.size
    if core.sum() > area or unexplained.sum() > 10 * area:
        pixels = rgb[core if core.any() else unexplained]
        bins, counts = np.unique(pixels // 32, axis=0, return_counts=True)
        for rank, index in enumerate(np.argsort(-counts)[:3]):
            if rank == 0 or counts[index] >= 0.1 * len(pixels):
                color = np.median(pixels[(pixels // 32 == bins[index]).all(-1)], axis=0).round().astype(int)
                name = ",".join(map(str, color))
                percent = f"{counts[index] / unexplained.size:.2%}"
                problems.append(f"the colour map has the colour '{name}' ({percent} of it), which is not listed")
    if problems:
        raise ValueError(
            f"layout and color_context disagree: {'; '.join(problems)}. List each colour of the map with its subject, "
            "or with None (null in JSON) if it is background."
        )


def _erode(area: np.ndarray) -> np.ndarray:
    """Pixels whose whole 3x3 neighbourhood is in the area; the image's border does not count against them."""
    return ~_dilate(~area)


def _dilate(area: np.ndarray) -> np.ndarray:
    """The area and the 3x3 neighbourhood of all its pixels."""
    for axis in range(2):
        before, after = np.moveaxis(area, axis, 0), np.moveaxis(area.copy(), axis, 0)
        after[1:] |= before[:-1]
        after[:-1] |= before[1:]
        area = np.moveaxis(after, 0, axis)
    return area


# --- Overlaps ------------------------------------------------------------------------------------------------------


def _resolve_priorities(claims: Sequence[_Claim]) -> list[Region]:
    """Take from every region what those of higher priority claim; equal priorities both keep their claim."""
    regions = []
    for claim in claims:
        region = claim.region
        higher = [other for other in claims if other.priority > claim.priority]
        if higher:
            mask = np.clip(region.mask - sum(other.region.mask for other in higher), 0, 1)
            if mask.max() < _MIN_PEAK:
                raise ValueError(
                    f"{claim.place} is covered entirely by regions of higher priority: "
                    f"{', '.join(other.place for other in higher)}. Move or enlarge it, or raise its priority "
                    f"({claim.priority:g})."
                )
            region = replace(region, mask=mask)
        regions.append(region)
    return regions


def _merge(regions: Sequence[Region]) -> tuple[Region, ...]:
    """Join the parts of one subject, since its tokens belong to all of them at once."""
    merged: dict[tuple[str, int | None], Region] = {}
    for region in regions:
        address = (region.subject.casefold(), region.occurrence)
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
        merged[address] = replace(first, mask=np.minimum(first.mask + region.mask, 1))
    return tuple(merged.values())
