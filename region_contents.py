"""What a region of a layout holds beside its place: words, LoRAs and reference pictures of its own, and its time."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from .pictures import picture_file, picture_name

__multisubject_version__ = "0.1.0"

HELD_KEYS = ("prompt", "negative_prompt", "lora", "ip_adapter_image")
"""What a region may hold; one that holds something needs no words in the prompt."""

TIME_KEYS = ("begin", "end", "strength")
"""When and how strongly a region guides."""

CONTENT_KEYS = (*HELD_KEYS, *TIME_KEYS)


def read_contents(entry: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The fields of a `Region` that a dict of a layout gives by these keys; None counts as not given.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: an empty value or a number out of its range; the message names key, value and remedy.
    """
    given = {key: entry[key] for key in CONTENT_KEYS if entry.get(key) is not None}
    contents: dict[str, Any] = {}
    for key in ("prompt", "negative_prompt"):
        if key in given:
            contents[key] = _read_text(given[key], f"{place}: {key}")
    if "lora" in given:
        contents["lora"] = _read_lora(given["lora"], f"{place}: lora")
    if "ip_adapter_image" in given:
        contents["ip_adapter_image"] = _read_references(given["ip_adapter_image"], f"{place}: ip_adapter_image")
    for key in ("begin", "end"):
        if key in given:
            contents[key] = read_number(given[key], f"{place}: {key}", low=0, high=1)
    begin, end = contents.get("begin", 0.0), contents.get("end", 1.0)
    if begin >= end:
        raise ValueError(
            f"{place}: begin is {begin:g} and end is {end:g}, expected begin < end: the fractions of the steps between"
            " which the region guides. For a region that never does, write strength 0."
        )
    if "strength" in given:
        contents["strength"] = read_number(given["strength"], f"{place}: strength", low=0)
    has_words = any(entry.get(key) is not None for key in ("subject", "phrase", "prompt", "negative_prompt"))
    timed = [key for key in TIME_KEYS if key in given]
    if timed and not has_words and contents.get("strength") != 0:
        raise ValueError(
            f"{place} has `{timed[0]}`, but no words that it could guide: LoRAs and reference pictures act at every"
            " step, with a scale of their own. Leave it out."
        )
    return contents


def read_number(value: Any, place: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number between two limits. Raises `ValueError` for anything else."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max or not low <= value <= high:
        limits = f" from {low:g} to {high:g}" if math.isfinite(high) else f" of at least {low:g}" if low == 0 else ""
        raise ValueError(f"{place} is {value!r}, expected a finite number{limits}.")
    return float(value)


def name_of_contents(contents: Mapping[str, Any]) -> str:
    """What to call a region that names no words of the prompt, after what it holds."""
    if contents.get("prompt"):
        return contents["prompt"]
    if contents.get("lora"):
        return " + ".join(contents["lora"])
    if contents.get("ip_adapter_image") is not None:
        return "reference picture"
    return f"no {contents['negative_prompt']}"


def describe_contents(region: Any) -> list[str]:
    """Short lines about what a region holds and when it guides, for whoever looks at a layout; mostly none."""
    lines = []
    if region.prompt is not None and region.prompt != region.subject:
        lines.append(f"“{region.prompt}”")
    if region.negative_prompt is not None:
        lines.append(f"not “{region.negative_prompt}”")
    if region.lora:
        names = (name if scale == 1 else f"{name} {scale:g}" for name, scale in region.lora.items())
        lines.append(f"LoRA {', '.join(names)}")
    if region.ip_adapter_image is not None:
        lines.append("reference picture")
    if (region.begin, region.end) != (0, 1):
        lines.append(f"steps {region.begin:.0%} to {region.end:.0%}")
    if region.strength != 1:
        lines.append(f"strength {region.strength:g}")
    return lines


def digest_contents(region: Any) -> bytes:
    """What tells a region's contents from others'; empty for a region with none."""
    plain = {
        "prompt": region.prompt,
        "negative_prompt": region.negative_prompt,
        "lora": dict(region.lora) if region.lora else None,
        "begin": region.begin or None,
        "end": None if region.end == 1 else region.end,
        "strength": None if region.strength == 1 else region.strength,
    }
    plain = {key: value for key, value in plain.items() if value is not None}
    if region.ip_adapter_image is not None:
        plain["ip_adapter_image"] = _digest(region.ip_adapter_image)
    return json.dumps(plain, sort_keys=True).encode() if plain else b""


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{place} is {value!r}, expected text.")
    if not value.strip():
        raise ValueError(f"{place} is {value!r}, expected words. Leave it out where there are none.")
    return value.strip()


def _read_lora(value: Any, place: str) -> dict[str, float]:
    """Names and scales of loaded LoRAs; whether they are loaded, the pipeline knows."""
    expected = "expected the name of a loaded LoRA, a list of names, or {name: scale}"
    if isinstance(value, str):
        value = [value]
    if isinstance(value, Mapping):
        scales = dict(value)
    elif isinstance(value, Sequence):
        if len({*map(str, value)}) < len(value):
            raise ValueError(f"{place} is {value!r}, expected every LoRA once.")
        scales = {name if isinstance(name, str) else repr(name): 1.0 for name in value}
        if not all(isinstance(name, str) for name in value):
            raise TypeError(f"{place} is {value!r}, {expected}.")
    else:
        raise TypeError(f"{place} is {value!r}, {expected}.")
    if not all(isinstance(name, str) for name in scales):
        raise TypeError(f"{place} is {value!r}, {expected}.")
    if not scales or not all(name.strip() for name in scales):
        raise ValueError(f"{place} is {value!r}, {expected}. Leave it out where there is none.")
    return {name: read_number(scale, f"{place}: the scale of {name!r}") for name, scale in scales.items()}


def _read_references(value: Any, place: str) -> Any:
    """A picture, embeddings, several of them, or those of each adapter by its name; paths become pictures."""
    expected = (
        "expected a picture (PIL image, path or array), embeddings (torch tensor), a list of these, or"
        " {the adapter's number, '0' first: these}"
    )
    if isinstance(value, Mapping):
        if not value:
            raise ValueError(f"{place} is empty, {expected}.")
        if not all(isinstance(name, str) for name in value) or any(
            isinstance(part, Mapping) for part in value.values()
        ):
            raise TypeError(f"{place} is {value!r}, {expected}.")
        return {name: _read_references(part, f"{place}[{name!r}]") for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError(f"{place} is empty, {expected}.")
        if any(isinstance(part, (Mapping, list, tuple)) for part in value):
            raise TypeError(f"{place} is {value!r}, {expected}.")
        return [_read_references(part, f"{place}[{index}]") for index, part in enumerate(value)]
    if isinstance(value, (str, os.PathLike)):
        try:
            with Image.open(picture_file(value)) as image:
                return image.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{place}: the file {picture_name(value)!r} cannot be read: {error}.") from error
    if not isinstance(value, (Image.Image, np.ndarray, torch.Tensor)):
        raise TypeError(f"{place} is of type {type(value).__name__}, {expected}.")
    return value


def _digest(value: Any) -> Any:
    """Plain data that differs where pictures or embeddings do."""
    if isinstance(value, Mapping):
        return {name: _digest(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_digest(part) for part in value]
    if isinstance(value, torch.Tensor):
        array = value.detach().cpu().to(torch.float32).numpy()
    else:
        array = np.asarray(value.convert("RGBA") if isinstance(value, Image.Image) else value)  # palettes differ
    return [list(array.shape), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()]
