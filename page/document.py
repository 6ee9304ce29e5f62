"""What is drawn on the page <-> an entry of a generation config.

The *document* is the canvas's value, plain JSON: size, prompt, negative prompt and regions with their shapes. Whatever
comes from a browser is checked here for types, lengths and numbers; what the values may be, the library says itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from multisubject.generation.arguments import MOST_PIXELS
from multisubject.layout import BACKGROUND
from multisubject.page.safety import opaque, read_data_url
from multisubject.pictures import data_url, split_alpha

MOST_REGIONS = 24
MOST_POINTS = 20_000
MOST_LETTERS = 2000
MOST_LORAS = 8
MOST_ADAPTERS = 4

_TEXTS = ("subject", "phrase", "prompt", "negative_prompt")
_NUMBERS = ("weight", "feather", "begin", "end", "strength")
_SHAPES = ("box", "ellipse", "strokes", "mask")
_DRAWN_SIDE = 4096  # drawn shapes get soft edges: up to this, a mask's pixel is the mean of 4 x 4 drawn ones
_MOST_PAINT = 2000  # points times width², to which the time that strokes take is proportional


@dataclass(frozen=True)
class Document:
    """A document that has been checked.

    Args:
        size: `(width, height)` in pixels.
        prompt, negative_prompt: of the picture.
        regions: bottom to top, each with all its keys; pictures in them are re-encoded.
        underlay: the picture under the regions, `RGB`, or None.
    """

    size: tuple[int, int]
    prompt: str
    negative_prompt: str
    regions: tuple[Mapping[str, Any], ...]
    underlay: Image.Image | None

    def region(self, id: str | None) -> Mapping[str, Any] | None:
        """The region of this id, or None."""
        return next((region for region in self.regions if region["id"] == id), None)

    def names(self) -> list[str]:
        """Subjects that the texts mark as `<name>` or that have a region, each once, in that order."""
        texts = [self.prompt, self.negative_prompt]
        texts += [region[key] for region in self.regions for key in ("prompt", "negative_prompt") if region[key]]
        marked = [name for text in texts for name in re.findall(r"<\s*([^<>]+?)\s*>", text)]
        placed = [region["subject"] for region in self.regions if region["subject"]]
        return list({name.casefold(): name for name in reversed([*marked, *placed])}.values())[::-1]

    def loras(self) -> list[str]:
        """LoRAs that regions hold, each once."""
        return list(dict.fromkeys(name for region in self.regions for name in region["lora"] or ()))

    def layout(self) -> list[dict[str, Any]]:
        """The list layout of the regions, one dict for each of them, in their order."""
        return [self._entry(region, priority) for priority, region in enumerate(self.regions)]

    def _entry(self, region: Mapping[str, Any], priority: int) -> dict[str, Any]:
        keys = (*_TEXTS, *_NUMBERS, "occurrence", "lora", "ip_adapter_image")
        entry = {key: region[key] for key in keys if region[key] is not None}
        if region["off"]:
            entry["strength"] = 0
        if region["phrase"] == BACKGROUND and region["shape"] is None:
            return entry
        if priority:
            entry["priority"] = priority
        return entry | place_of(region["shape"], self.size)

    def plain(self) -> dict[str, Any]:
        """The document as the canvas takes it, as far as it is the user's."""
        return {
            "size": list(self.size),
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "regions": [dict(region) for region in self.regions],
            "underlay": None if self.underlay is None else data_url(self.underlay),
        }


def place_of(shape: Mapping[str, Any] | None, size: tuple[int, int]) -> dict[str, Any]:
    """`box` or `mask` of a list layout for a shape; drawn shapes become masks of the picture's size."""
    if shape is None:
        return {}
    if "box" in shape or "mask" in shape:
        return dict(shape)
    factor = max(1, min(4, _DRAWN_SIDE // max(size)))
    width, height = (side * factor for side in size)
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    if "ellipse" in shape:
        xmin, ymin, xmax, ymax = shape["ellipse"]
        draw.ellipse((xmin * width, ymin * height, xmax * width - 1, ymax * height - 1), fill=255)
    for stroke in shape.get("strokes", ()):
        points = [(x * width, y * height) for x, y in stroke["points"]]
        radius = max(stroke["width"] * min(width, height) / 2, factor / 2)
        colour = 0 if stroke["erase"] else 255
        draw.line(points, fill=colour, width=round(2 * radius))
        for x, y in points:  # round ends and joints
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return {"mask": data_url(mask.resize(size, Image.Resampling.BOX))}


# --- reading ---------------------------------------------------------------------------------------------------------


def read_document(value: Any) -> Document:
    """Check what a browser sent.

    Args:
        value: a document; keys that the page itself fills in are not looked at.

    Raises:
        ValueError: naming the place, what came and what was expected.
    """
    if not isinstance(value, dict):
        raise ValueError(f"the document is of type {type(value).__name__}, expected a dictionary.")
    size = _numbers(value.get("size"), 2, "size")
    if any(side != int(side) or not 8 <= side <= MOST_PIXELS or side % 8 for side in size):
        raise ValueError(f"size is {size}, expected width and height in pixels, multiples of 8 up to {MOST_PIXELS}.")
    width, height = int(size[0]), int(size[1])
    regions = value.get("regions", [])
    if not isinstance(regions, list) or len(regions) > MOST_REGIONS:
        raise ValueError(f"regions: expected a list of at most {MOST_REGIONS}.")
    checked = tuple(_read_region(region, f"region {number}") for number, region in enumerate(regions, 1))
    if len({region["id"] for region in checked}) < len(checked):
        raise ValueError("regions: two of them have one id, expected each once.")
    strokes = [stroke for region in checked for stroke in (region["shape"] or {}).get("strokes", ())]
    points = sum(len(stroke["points"]) for stroke in strokes)
    if points > MOST_POINTS:
        raise ValueError(f"the brush strokes have {points:,} points, expected at most {MOST_POINTS:,}.")
    if sum(len(stroke["points"]) * stroke["width"] ** 2 for stroke in strokes) > _MOST_PAINT:
        raise ValueError("the brush strokes go over too much too often. Use a narrower brush, or a mask.")
    underlay = value.get("underlay")
    return Document(
        size=(width, height),
        prompt=_text(value.get("prompt"), "prompt") or "",
        negative_prompt=_text(value.get("negative_prompt"), "negative_prompt") or "",
        regions=checked,
        underlay=None if underlay is None else opaque(read_data_url(underlay, "the picture under the regions")),
    )


def _read_region(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is of type {type(value).__name__}, expected a dictionary.")
    given = value.get("id", place)
    if not isinstance(given, str) or not 0 < len(given) <= 64:
        raise ValueError(f"{place}: id is {str(given)[:80]!r}, expected a text of up to 64 letters.")
    region: dict[str, Any] = {"id": given, "off": bool(value.get("off"))}
    for key in _TEXTS:
        region[key] = _text(value.get(key), f"{place}: {key}") or None
    for key in _NUMBERS:
        region[key] = None if value.get(key) is None else _number(value[key], f"{place}: {key}")
    occurrence = value.get("occurrence")
    if occurrence is not None and (type(occurrence) is not int or not 0 < occurrence < 1000):
        raise ValueError(f"{place}: occurrence is {str(occurrence)[:80]!r}, expected a whole number from 1.")
    region["occurrence"] = occurrence
    region["lora"] = _read_loras(value.get("lora"), f"{place}: lora")
    region["ip_adapter_image"] = _read_references(value.get("ip_adapter_image"), f"{place}: ip_adapter_image")
    region["shape"] = _read_shape(value.get("shape"), f"{place}: shape")
    return region


def _read_loras(value: Any, place: str) -> dict[str, float] | None:
    if not value:
        return None
    if not isinstance(value, dict) or len(value) > MOST_LORAS:
        raise ValueError(f"{place}: expected at most {MOST_LORAS} names with their scales.")
    return {_text(name, place): _number(scale, f"{place} {name[:80]!r}") for name, scale in value.items()}


def _read_references(value: Any, place: str) -> dict[str, str] | None:
    """Number of an IP-Adapter, `"0"` first -> the region's picture for it."""
    if not value:
        return None
    if not isinstance(value, dict):
        value = {"0": value}
    if len(value) > MOST_ADAPTERS or not all(key in map(str, range(MOST_ADAPTERS)) for key in value):
        raise ValueError(
            f"{place}: expected a picture, or a dictionary of them by the number of their IP-Adapter, '0' to "
            f"'{MOST_ADAPTERS - 1}'."
        )
    return {number: data_url(opaque(read_data_url(value[number], place))) for number in sorted(value)}


def _read_shape(value: Any, place: str) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in _SHAPES:
        raise ValueError(f"{place}: expected a dictionary with one of {', '.join(_SHAPES)}.")
    kind, held = next(iter(value.items()))
    place = f"{place}: {kind}"
    if kind in ("box", "ellipse"):
        edges = _numbers(held, 4, place)
        if kind == "ellipse" and not (0 <= edges[0] < edges[2] <= 1 and 0 <= edges[1] < edges[3] <= 1):
            raise ValueError(f"{place} is {edges}, expected xmin, ymin, xmax, ymax in fractions, from 0 to 1.")
        return {kind: edges}
    if kind == "mask":
        picture, alpha = split_alpha(read_data_url(held, place))
        return {"mask": data_url(alpha or picture.convert("L"))}
    if not isinstance(held, list) or len(held) > MOST_POINTS:
        raise ValueError(f"{place}: expected a list of at most {MOST_POINTS:,}.")
    return {"strokes": [_read_stroke(stroke, f"{place} {number}") for number, stroke in enumerate(held, 1)]}


def _read_stroke(value: Any, place: str) -> dict[str, Any]:
    points = value.get("points") if isinstance(value, dict) else None
    if not isinstance(points, list) or not 0 < len(points) <= MOST_POINTS:
        raise ValueError(f"{place}: expected `points`, 1 to {MOST_POINTS:,} of them.")
    width = _number(value.get("width"), f"{place}: width")
    if not 0 < width <= 1:
        raise ValueError(f"{place}: width is {width}, expected a fraction of the picture's shorter side, up to 1.")
    points = [_numbers(point, 2, place) for point in points]
    if not all(-1 <= edge <= 2 for point in points for edge in point):
        raise ValueError(f"{place}: a point lies far outside the picture, expected fractions from 0 to 1.")
    return {"erase": bool(value.get("erase")), "width": width, "points": points}


def _text(value: Any, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{place} is of type {type(value).__name__}, expected text.")
    if len(value) > MOST_LETTERS:
        raise ValueError(f"{place} has {len(value):,} letters, expected at most {MOST_LETTERS:,}.")
    return value.strip()


def _number(value: Any, place: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= 1e9 or math.isnan(value):
        raise ValueError(f"{place} is {str(value)[:80]!r}, expected a number.")
    return value


def _numbers(value: Any, count: int, place: str) -> list[float]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        raise ValueError(f"{place} is {str(value)[:80]!r}, expected {count} numbers.")
    return [_number(one, place) for one in value]
