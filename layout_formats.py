"""Layouts that other programs write, as list layouts: the boxes of Ideogram 4, of Omost and of COCO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .region_contents import read_number

LAYOUT_FORMATS = ("ideogram", "omost", "coco")

# Omost's `lib_omost/canvas.py` (https://github.com/lllyasviel/Omost, commit 3524828), in its grid of 90 x 90 cells:
_OMOST_GRID = 90
_OMOST_THIRDS = {"left": (-30, 0), "right": (30, 0), "top": (0, -30), "bottom": (0, 30)}
_OMOST_STEPS = {"left": (-10, 0), "right": (10, 0), "upper": (0, -10), "lower": (0, 10)}
_OMOST_AREAS = {  # width, height
    ("small", "square"): (50, 50), ("small", "vertical"): (40, 60), ("small", "horizontal"): (60, 40),
    ("medium-sized", "square"): (60, 60), ("medium-sized", "vertical"): (50, 80),
    ("medium-sized", "horizontal"): (80, 50), ("large", "square"): (70, 70), ("large", "vertical"): (60, 90),
    ("large", "horizontal"): (90, 60),
}  # fmt: skip


def layout_from(data: Any, format: str, *, image: int | str | None = None) -> list[dict[str, Any]]:
    """A list layout of what another program says about a picture; every region holds its words as its own `prompt`.

    What such programs say besides (styles, colours, texts to be written) has no place in a layout and is left out, and
    so is what has no box. Boxes are clipped to the picture.

    Args:
        data: JSON as Python reads it. In the formats
            - `"ideogram"`: Ideogram 4's caption, whose `compositional_deconstruction` has `elements` with a `desc` and
              a `bbox` of `[ymin, xmin, ymax, xmax]` from 0 to 1000, and a `background`
              (https://docs.ideogram.ai/prompting/json-prompting.md); or that object alone, or its `elements`,
            - `"omost"`: a list of the arguments of Omost's `add_local_description`: `location`, `offset`, `area` and
              `description` in its fixed words, or a `rect` of `[ymin, ymax, xmin, xmax]` from 0 to 90, as its canvas
              has it, with `prefixes`; what is nearer (`distance_to_viewer`) takes the place of what is behind,
            - `"coco"`: `images`, `annotations` and `categories` with a `bbox` of `[x, y, width, height]` in pixels of
              its image (https://cocodataset.org/#format-data).
        format: one of `LAYOUT_FORMATS`.
        image: `id` or `file_name` of COCO's image; may be left out where there is one.

    Returns:
        Dicts with `prompt` and `box`, of Omost `priority` too, of Ideogram's background `subject` and `prompt`.

    Raises:
        ValueError: an unknown format, or data that is not of it: the message names the place and what is expected.
    """
    readers: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "ideogram": lambda: _from_ideogram(data),
        "omost": lambda: _from_omost(data),
        "coco": lambda: _from_coco(data, image),
    }
    if format not in readers:
        raise ValueError(f"`format` is {format!r}, expected one of {', '.join(LAYOUT_FORMATS)}.")
    if image is not None and format != "coco":
        raise ValueError(f"`image` is {image!r}, which chooses one of COCO's images; leave it out for {format}.")
    layout = readers[format]()
    if not any("box" in entry for entry in layout):
        raise ValueError(f"`data` has no region with a box in the format {format!r}; is it of another format?")
    return layout


def _from_ideogram(data: Any) -> list[dict[str, Any]]:
    place = "`data`"
    if isinstance(data, Mapping) and "compositional_deconstruction" in data:
        data, place = data["compositional_deconstruction"], "compositional_deconstruction"
    background = None
    if isinstance(data, Mapping):
        background = data.get("background")
        data, place = _get(data, "elements", place), f"{place}['elements']" if place != "`data`" else "elements"
    layout = []
    for number, element in enumerate(_list(data, place)):
        where = f"{place}[{number}]"
        element = _mapping(element, where)
        if element.get("bbox") is None:
            continue
        words = _text(element, "desc", where)
        ymin, xmin, ymax, xmax = _numbers(
            element["bbox"], f"{where}['bbox']", "[ymin, xmin, ymax, xmax] from 0 to 1000"
        )
        box = _box((xmin, ymin, xmax, ymax), (1000, 1000), f"{where}['bbox']")
        layout.append({"prompt": words, "box": box})
    if isinstance(background, str) and background.strip():
        layout.append({"subject": "background", "prompt": background.strip()})
    return layout


def _from_omost(data: Any) -> list[dict[str, Any]]:
    regions = []
    for number, region in enumerate(_list(data, "`data`")):
        where = f"`data`[{number}]"
        region = _mapping(region, where)
        if region.get("rect") is not None:
            expected = f"[ymin, ymax, xmin, xmax] from 0 to {_OMOST_GRID}"
            ymin, ymax, xmin, xmax = _numbers(region["rect"], f"{where}['rect']", expected)
            place = f"{where}['rect']"
        else:
            x, y, width, height = _omost_place(region, where)
            xmin, xmax, ymin, ymax = x - width / 2, x + width / 2, y - height / 2, y + height / 2
            place = where
        if region.get("description") is None and isinstance(region.get("prefixes"), list) and region["prefixes"]:
            region = {**region, "description": region["prefixes"][-1]}  # those before it are of the whole picture
        words = _text(region, "description", where).rstrip(". ")
        distance = read_number(region.get("distance_to_viewer", 1), f"{where}['distance_to_viewer']", low=0)
        regions.append((distance, words, _box((xmin, ymin, xmax, ymax), (_OMOST_GRID, _OMOST_GRID), place)))
    order = sorted({distance for distance, _, _ in regions}, reverse=True)
    return [{"prompt": words, "box": box, "priority": order.index(distance)} for distance, words, box in regions]


def _omost_place(region: Mapping[str, Any], where: str) -> tuple[float, float, float, float]:
    """Centre and size in cells of the words that Omost has for places and sizes."""
    location, offset, area = (_text(region, key, where).casefold() for key in ("location", "offset", "area"))
    centre = [_OMOST_GRID / 2] * 2
    for key, text, opening, none, moves in (
        ("location", location, "on the ", "in the center", _OMOST_THIRDS),
        ("offset", offset, "slightly to the ", "no offset", _OMOST_STEPS),
    ):
        words = [] if text == none else text.removeprefix(opening).split("-")
        if text != none and (
            not text.startswith(opening) or len(words) > 2 or any(word not in moves for word in words)
        ):
            example = f"{none!r} or such as {opening + next(iter(moves))!r}"
            raise ValueError(f"{where}[{key!r}] is {region[key]!r}, expected {example}, as Omost writes it.")
        for word in words:
            centre = [at + by for at, by in zip(centre, moves[word], strict=True)]
    kind, _, shape = area.removeprefix("a ").removesuffix(" area").partition(" ")
    size = _OMOST_AREAS.get((kind, shape))
    if size is None:
        raise ValueError(
            f"{where}['area'] is {region['area']!r}, expected such as 'a small square area': small, medium-sized or"
            " large, and square, vertical or horizontal."
        )
    return centre[0], centre[1], size[0], size[1]


def _from_coco(data: Any, image: int | str | None) -> list[dict[str, Any]]:
    data = _mapping(data, "`data`")
    images, annotations, categories = (
        [_mapping(part, f"{key}[{number}]") for number, part in enumerate(_list(_get(data, key, "`data`"), key))]
        for key in ("images", "annotations", "categories")
    )
    fitting = [
        number
        for number, entry in enumerate(images)
        if image is None or image in (entry.get("id"), str(entry.get("id")), entry.get("file_name"))
        or (isinstance(image, str) and Path(str(entry.get("file_name"))).name == image)
    ]  # fmt: skip
    if len(fitting) != 1:
        there = ", ".join(str(entry.get("file_name", entry.get("id"))) for entry in images[:5])
        more = f" and {len(images) - 5} more" if len(images) > 5 else ""
        raise ValueError(
            f"`image` is {image!r}, which {len(fitting)} of the {len(images)} images are ({there}{more}); expected the"
            " `id` or `file_name` of one."
        )
    chosen, where = images[fitting[0]], f"images[{fitting[0]}]"
    size = tuple(read_number(_get(chosen, key, where), f"{where}[{key!r}]", low=0) for key in ("width", "height"))
    if not all(size):
        raise ValueError(f"{where} is {size[0]:g} x {size[1]:g} pixels, expected its `width` and `height`.")
    names = {category.get("id"): category.get("name") for category in categories}
    layout = []
    for number, annotation in enumerate(annotations):
        if annotation.get("image_id") != chosen.get("id") or annotation.get("bbox") is None:
            continue
        where = f"annotations[{number}]"
        name = names.get(annotation.get("category_id"))
        if not isinstance(name, str):
            raise ValueError(
                f"{where}: category_id is {annotation.get('category_id')!r}, expected one of `categories`, which have"
                f" {', '.join(map(repr, list(names)[:10])) or 'none'}."
            )
        x, y, width, height = _numbers(annotation["bbox"], f"{where}['bbox']", "[x, y, width, height] in pixels")
        layout.append({"prompt": name, "box": _box((x, y, x + width, y + height), size, f"{where}['bbox']")})
    return layout


# --- values ----------------------------------------------------------------------------------------------------------


def _get(data: Mapping[str, Any], key: str, place: str) -> Any:
    if key not in data:
        raise ValueError(f"{place} has no {key!r}, only {', '.join(map(repr, list(data)[:8])) or 'nothing'}.")
    return data[key]


def _mapping(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} is of type {type(value).__name__}, expected a dictionary.")
    return value


def _list(value: Any, place: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{place} is of type {type(value).__name__}, expected a list.")
    return value


def _text(data: Mapping[str, Any], key: str, place: str) -> str:
    value = _get(data, key, place)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}[{key!r}] is {value!r}, expected text.")
    return value.strip()


def _numbers(value: Any, place: str, expected: str) -> list[float]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 4:
        raise ValueError(f"{place} is {value!r}, expected {expected}.")
    return [read_number(number, f"{place}[{index}]") for index, number in enumerate(value)]


def _box(
    edges: tuple[float, float, float, float], size: Sequence[float], place: str
) -> tuple[float, float, float, float]:
    """`(xmin, ymin, xmax, ymax)` in units of which the picture has `size` (width, height), in fractions of it."""
    box = tuple(min(1.0, max(0.0, edge / side)) for edge, side in zip(edges, (*size, *size), strict=True))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(
            f"{place} spans {edges[0]:g} to {edges[2]:g} across and {edges[1]:g} to {edges[3]:g} down in a picture of"
            f" {size[0]:g} x {size[1]:g}: expected some of the picture. Is the order of the numbers another, or the"
            " format?"
        )
    return tuple(round(edge, 6) for edge in box)  # type: ignore[return-value]
