"""The pictures of a layout: a mask is the share of each pixel that is inside, a colour map that of several subjects.

Both are PIL images, paths, or arrays (NumPy or torch), and keep their own size here.
"""

from __future__ import annotations

import itertools
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from .pictures import picture_file, picture_name
from .region_contents import CONTENT_KEYS
from .unknown_names import did_you_mean

__multisubject_version__ = "0.1.0"

# What may be said of a colour of a map, and of any other region beside its box or mask.
COLOR_KEYS = ("subject", "phrase", "occurrence", "weight", "priority", "feather", *CONTENT_KEYS)
# A claim weaker than one step of an 8-bit mask is none.
MIN_PEAK = 1 / 255
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


# --- Masks ---------------------------------------------------------------------------------------------------------


def read_mask(value: Any, place: str) -> np.ndarray:
    """Any kind of mask -> `(h, w)` float32 in [0, 1] at its own size."""
    place = f"{place}: mask"
    array = _read_image(value, place)
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
    if mask.max() < MIN_PEAK:
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


def _read_image(value: Any, place: str) -> np.ndarray:
    """An image, path, array or tensor -> array, `(h, w)` or `(h, w, channels)`."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, str | os.PathLike):
        try:
            with Image.open(picture_file(value)) as image:
                value = ImageOps.exif_transpose(image)  # as viewers show it
                value.load()
        except FileNotFoundError:
            raise ValueError(
                f"{place}: file {picture_name(value)!r} does not exist. Check the path and working folder."
            ) from None
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{place}: file {picture_name(value)!r} is not a readable image ({error}). Save it as PNG."
            ) from error
    if not isinstance(value, Image.Image):
        raise TypeError(f"{place} is of type {type(value).__name__}, expected a PIL image, a path or an array.")
    if "transparency" in value.info:
        return np.asarray(value.convert("RGBA"))
    return np.asarray(value.convert("RGB") if value.mode in ("P", "CMYK", "YCbCr", "HSV", "LAB") else value)


# --- Colour maps ---------------------------------------------------------------------------------------------------


def read_color_map(image: Any, color_context: Mapping[Any, Any] | None) -> dict[str, dict[str, Any]]:
    """Split a colour map into the entries of a list layout, one for each colour that stands for a subject."""
    rgb, alpha = _colors_and_alpha(image)
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


def _colors_and_alpha(image: Any) -> tuple[np.ndarray, np.ndarray]:
    """A colour map -> RGB `(h, w, 3)` from 0 to 255 and alpha `(h, w)` from 0 to 1, float32."""
    array = _read_image(image, "layout")
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
        if unknown := [key for key in value if key not in COLOR_KEYS]:
            raise ValueError(f"{place} has the unknown key {unknown[0]!r}; {did_you_mean(unknown[0], COLOR_KEYS)}")
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
