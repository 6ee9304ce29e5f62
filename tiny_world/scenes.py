"""Drawn scenes with exact captions, boxes and masks: the world that the embedded base has seen.

A scene is data (`Scene`, frozen); `render` turns it into pixels and `describe` into words. Everything random comes
from a `random.Random` that the caller seeds, and drawing uses no other source, so the same seed gives the same bytes.

Boxes are `(xmin, ymin, xmax, ymax)` in fractions of the image; masks are `(height, width)`.
"""

from __future__ import annotations

import colorsys
import math
import random
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from multisubject.tiny_world import EMBEDDED_BASE, picture_size

Box = tuple[float, float, float, float]
RGB = tuple[int, int, int]

# Hue, saturation, value. Every hue is at least 0.06 away from its neighbour; drawing jitters it by 0.015.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.99, 0.88, 0.82),
    "orange": (0.07, 0.92, 0.98),
    "yellow": (0.145, 0.85, 0.98),
    "green": (0.34, 0.78, 0.60),
    "blue": (0.61, 0.85, 0.85),
    "purple": (0.77, 0.65, 0.66),
    "white": (0.0, 0.0, 0.97),
    "black": (0.0, 0.0, 0.10),
    "pink": (0.91, 0.42, 0.98),
    "teal": (0.49, 0.80, 0.68),
    "brown": (0.07, 0.65, 0.42),
    "gray": (0.0, 0.0, 0.55),
}
PATTERNS = ("plain", "striped", "dotted")
SETTINGS = ("on the beach", "in the snow", "on the grass", "at night", "in the desert", "in a room")
# Width over height of the drawing that fills an object's box.
ASPECT: dict[str, float] = {
    "person": 0.66,
    "guitar": 0.62,
    "dog": 1.12,
    "mug": 1.06,
    "ball": 1.0,
    "flower": 0.66,
    "hat": 1.25,
    "car": 1.7,
}
CATEGORIES = tuple(ASPECT)
# Second colours that stay readable on a first one: far enough apart in RGB (see `contrasts`).
MIN_CONTRAST = 0.50
# Stripe or dot period as a fraction of the object's height.
SCALES: dict[str, float] = {"coarse": 0.30, "fine": 0.17}
# Every word that `describe` puts before a noun to say how it looks.
ADJECTIVES = (*COLOURS, *PATTERNS, *SCALES, "trimmed")
SUPERSAMPLING = 4


@dataclass(frozen=True)
class World:
    """What a model trained on the scenes has to know. The recipe's YAML file holds one of these.

    `image_size` is the side of a picture in pixels, by default of those that the embedded base draws.
    """

    image_size: int = field(default_factory=lambda: picture_size(EMBEDDED_BASE))
    categories: tuple[str, ...] = ("person", "guitar", "dog", "mug", "ball")
    colours: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
    patterns: tuple[str, ...] = ("plain", "striped")
    settings: tuple[str, ...] = ("on the beach", "in the snow", "on the grass", "at night")
    # Relative frequency of scenes with 1, 2, 3, … objects.
    object_counts: tuple[float, ...] = (0.45, 0.33, 0.13, 0.09)
    # Share of scenes whose objects are smaller than usual, see `random_boxes`.
    smaller_objects: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (
            ("categories", CATEGORIES),
            ("colours", tuple(COLOURS)),
            ("patterns", PATTERNS),
            ("settings", SETTINGS),
        ):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            unknown = [value for value in values if value not in known]
            if unknown or not values:
                raise ValueError(f"world.{name}: {unknown or 'empty'}; expected some of {list(known)}.")
        object.__setattr__(self, "object_counts", tuple(self.object_counts))
        if not 1 <= len(self.object_counts) <= max(_HEIGHTS):
            raise ValueError(f"world.object_counts: {len(self.object_counts)} entries; expected 1 to {max(_HEIGHTS)}.")
        if not 0 <= self.smaller_objects <= 1:
            raise ValueError(f"world.smaller_objects: {self.smaller_objects}; expected a share from 0 to 1.")
        if self.image_size < 32 or self.image_size % 8:
            raise ValueError(f"world.image_size: {self.image_size}; expected a multiple of 8, at least 32.")


@dataclass(frozen=True)
class Look:
    """How an object is painted. A caption often says `colour` and `pattern`, and seldom the rest."""

    colour: str
    pattern: str = "plain"
    second_colour: str | None = None  # of the stripes or dots; None for a plain object
    scale: str = "coarse"  # of the pattern, a key of SCALES
    accessory: str | None = None  # colour of hat, neck, collar, emblem …; None leaves the category's usual one


@dataclass(frozen=True)
class SceneObject:
    """One thing in a scene. Its drawing fills `box`."""

    category: str
    look: Look
    box: Box
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """A picture in words and numbers. Later objects stand in front of earlier ones; `seed` fixes every jitter."""

    setting: str
    objects: tuple[SceneObject, ...]
    seed: int = 0


@dataclass(frozen=True)
class Rendered:
    """What `render` returns.

    `boxes`: one per object, tight around what is visible (None when fully hidden); `masks`: boolean
    `(objects, height, width)`, the visible pixels of each object.
    """

    image: Image.Image
    boxes: tuple[Box | None, ...]
    masks: np.ndarray


# --- what may be drawn ---------------------------------------------------------------------------------------------


def rgb(colour: str, rng: random.Random | None = None) -> RGB:
    """A named colour, 0 to 255 per channel; `rng` adds the jitter of real paint."""
    hue, saturation, value = COLOURS[colour]
    if rng is not None:
        hue = (hue + rng.uniform(-0.015, 0.015)) % 1
        saturation = min(1.0, saturation + rng.uniform(-0.06, 0.06)) if saturation else 0.0
        value = min(1.0, max(0.0, value + rng.uniform(-0.05, 0.05)))
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)


@cache
def contrasts(colour: str, other: str) -> bool:
    """True when stripes of `other` can be told from `colour` (distance of at least MIN_CONTRAST in unit RGB)."""
    return math.dist(rgb(colour), rgb(other)) / 255 >= MIN_CONTRAST


def is_visible(colour: str, setting: str) -> bool:
    """False for pairs that nobody could see: white in the snow, black at night."""
    return (colour, setting) not in {("white", "in the snow"), ("black", "at night")}


def second_colours(colour: str, world: World) -> list[str]:
    """Colours that stripes, dots or accessories on `colour` may have."""
    return [other for other in world.colours if contrasts(colour, other)]


def random_look(rng: random.Random, world: World, setting: str) -> Look:
    """Any look that can be seen in `setting`."""
    colour = rng.choice([colour for colour in world.colours if is_visible(colour, setting)])
    pattern = rng.choice(world.patterns)
    second = None if pattern == "plain" else rng.choice(second_colours(colour, world))
    scale = rng.choice(list(SCALES))
    accessory = rng.choice(second_colours(colour, world)) if rng.random() < 0.6 else None
    return Look(colour, pattern, second, scale if pattern != "plain" else "coarse", accessory)


# Object heights by the number of objects in the scene, for an object of aspect 1.
_HEIGHTS = {1: (0.52, 0.86), 2: (0.42, 0.60), 3: (0.38, 0.48), 4: (0.36, 0.42), 5: (0.32, 0.38), 6: (0.28, 0.34)}
_LEAST_HEIGHT = 0.22
_MAX_OVERLAP = 0.06  # of the smaller box's area


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def intersection(a: Box, b: Box) -> Box:
    """The shared box; inverted where the two do not touch."""
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def iou(a: Box, b: Box) -> float:
    """Intersection over union, 0 to 1."""
    shared = _area(intersection(a, b))
    return shared / (_area(a) + _area(b) - shared) if shared else 0.0


def random_boxes(rng: random.Random, categories: list[str], smaller: bool = False) -> list[Box]:
    """One box per category, of its own proportions, inside the image and hardly overlapping; smaller ones have at most
    the usual least height for so many objects."""
    low, high = _HEIGHTS[len(categories)]
    if smaller:
        low, high = _LEAST_HEIGHT, low
    while True:
        boxes: list[Box] = []
        for category in categories:
            side = rng.uniform(low, high)
            stretch = math.sqrt(ASPECT[category])
            width, height = min(0.94, side * stretch), min(0.94, side / stretch)
            for _ in range(12):
                x, y = rng.uniform(0.02, 0.98 - width), rng.uniform(0.03, 0.98 - height)
                box = (x, y, x + width, y + height)
                if all(
                    _area(intersection(box, other)) <= _MAX_OVERLAP * min(_area(box), _area(other)) for other in boxes
                ):
                    boxes.append(box)
                    break
            else:
                break
        if len(boxes) == len(categories):
            return boxes


def random_scene(rng: random.Random, world: World, count: int | None = None) -> Scene:
    """A scene of `count` objects (drawn by `world.object_counts` when None); the same category may come twice."""
    if count is None:
        count = rng.choices(range(1, len(world.object_counts) + 1), world.object_counts)[0]
    setting = rng.choice(world.settings)
    categories = [rng.choice(world.categories) for _ in range(count)]
    smaller = world.smaller_objects > 0 and rng.random() < world.smaller_objects
    objects = tuple(
        SceneObject(category, random_look(rng, world, setting), box, rng.random() < 0.5)
        for category, box in zip(categories, random_boxes(rng, categories, smaller), strict=True)
    )
    return Scene(setting, objects, rng.getrandbits(32))


# --- words ---------------------------------------------------------------------------------------------------------


def phrase(category: str, look: Look, say_colour: bool = True, say_pattern: bool = True) -> str:
    """`red striped guitar`, or fewer words."""
    return " ".join(([look.colour] if say_colour else []) + ([look.pattern] if say_pattern else []) + [category])


def full_phrase(category: str, look: Look) -> str:
    """Everything there is to say, before the noun: `yellow trimmed blue fine orange striped person`."""
    trim = f"{look.accessory} trimmed " if look.accessory else ""
    pattern = f"{look.scale} {look.second_colour} {look.pattern}" if look.second_colour else look.pattern
    return f"{trim}{look.colour} {pattern} {category}"


def article(words: str) -> str:
    """`a` or `an`, for what follows."""
    return "an" if words[0] in "aeiou" else "a"


def describe(scene: Scene, rng: random.Random) -> str:
    """A caption that is true of the scene. Objects come in a random order; most are described in full, of the others
    colour and pattern are left out now and then, as are article, opening and setting, so that `a photo of person and
    guitar on the beach` is ordinary."""
    objects = list(scene.objects)
    rng.shuffle(objects)
    caption = rng.choice(("a photo of ", "a photo of ", "a photo of ", "a picture of ", "an image of ", ""))
    for index, item in enumerate(objects):
        if index:
            caption += rng.choice((" and ", " and ", " and ", " and ", ", ", " next to ", " with "))
        if rng.random() < 0.65:
            words = full_phrase(item.category, item.look)
        else:
            words = phrase(item.category, item.look, rng.random() < 0.75, rng.random() < 0.7)
        indefinite = f"{article(words)} "
        caption += rng.choice((indefinite, indefinite, indefinite, "", "", "the ", "my ")) + words
    return caption + (f" {scene.setting}" if rng.random() < 0.9 else "")


# --- pixels --------------------------------------------------------------------------------------------------------


def render(scene: Scene, size: int) -> Rendered:
    """Draw `scene` at `size` × `size` pixels, supersampled by SUPERSAMPLING."""
    rng = random.Random(scene.seed)
    canvas = _background(scene.setting, size * SUPERSAMPLING, rng)
    coverage = []
    for item in scene.objects:
        coverage.append(_draw_object(canvas, item, rng))
    image = canvas.resize((size, size), Image.Resampling.BOX)
    masks = np.zeros((len(coverage), size, size), bool)
    hidden = np.zeros((size, size), bool)
    for index in reversed(range(len(coverage))):  # front to back
        shape = np.asarray(coverage[index].resize((size, size), Image.Resampling.BOX)) >= 128
        masks[index] = shape & ~hidden
        hidden |= shape
    return Rendered(image, tuple(_tight_box(mask) for mask in masks), masks)


def _tight_box(mask: np.ndarray) -> Box | None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    height, width = mask.shape
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height


def _shade(colour: RGB, rng: random.Random) -> RGB:
    red, green, blue = (max(0, min(255, channel + rng.randint(-8, 8))) for channel in colour)
    return red, green, blue


def _gradient(draw: ImageDraw.ImageDraw, width: int, top: RGB, bottom: RGB, y0: int, y1: int) -> None:
    for y in range(y0, y1):
        t = (y - y0) / max(1, y1 - y0)
        draw.line([(0, y), (width, y)], fill=tuple(round(a + (b - a) * t) for a, b in zip(top, bottom, strict=True)))


def _background(setting: str, n: int, rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (n, n))
    draw = ImageDraw.Draw(image)
    horizon = int(n * rng.uniform(0.45, 0.6))
    unit = n / 256
    if setting == "on the beach":
        _gradient(draw, n, _shade((120, 190, 240), rng), _shade((200, 230, 250), rng), 0, horizon - n // 8)
        draw.rectangle([0, horizon - n // 8, n, horizon], fill=_shade((40, 120, 190), rng))
        _gradient(draw, n, _shade((240, 220, 160), rng), _shade((220, 195, 130), rng), horizon, n)
    elif setting == "in the snow":
        _gradient(draw, n, _shade((176, 194, 214), rng), _shade((214, 224, 236), rng), 0, horizon)
        draw.rectangle([0, horizon, n, n], fill=_shade((243, 246, 250), rng))
    elif setting == "on the grass":
        _gradient(draw, n, _shade((110, 180, 235), rng), _shade((190, 225, 245), rng), 0, horizon)
        _gradient(draw, n, _shade((120, 190, 90), rng), _shade((85, 150, 65), rng), horizon, n)
    elif setting == "at night":
        _gradient(draw, n, _shade((14, 16, 52), rng), _shade((38, 38, 88), rng), 0, horizon)
        draw.rectangle([0, horizon, n, n], fill=_shade((26, 34, 44), rng))
        x, radius = rng.randint(n // 8, n - n // 8), 15 * unit
        draw.ellipse([x - radius, 14 * unit, x + radius, 14 * unit + 2 * radius], fill=(245, 240, 200))
    elif setting == "in the desert":
        _gradient(draw, n, _shade((245, 190, 120), rng), _shade((250, 225, 170), rng), 0, horizon)
        dune = [
            (0, horizon),
            (n // 3, horizon - n // 10),
            (2 * n // 3, horizon),
            (n, horizon - n // 14),
            (n, n),
            (0, n),
        ]
        draw.polygon(dune, fill=_shade((215, 150, 85), rng))
    elif setting == "in a room":
        draw.rectangle([0, 0, n, horizon], fill=_shade((205, 190, 175), rng))
        draw.rectangle([0, horizon, n, n], fill=_shade((150, 105, 70), rng))
    else:
        raise ValueError(f"setting {setting!r} is not one of {list(SETTINGS)}.")
    return image


# A part is (kind, unit box or points, paint); `body` takes the pattern, `accessory` the accessory's colour or the one
# given after the colon (`accessory:none` leaves it out). Parts are painted in order.
_SKIN, _TROUSERS, _WOOD, _INK = (235, 190, 155), (52, 56, 84), (96, 62, 36), (24, 22, 22)
_PETALS = [
    (x - 0.22, y - 0.13, x + 0.22, y + 0.13)
    for x, y in ((0.5 + 0.3 * math.cos(k * math.pi / 3), 0.3 + 0.19 * math.sin(k * math.pi / 3)) for k in range(6))
]
_PARTS: dict[str, list[tuple[str, tuple, str | RGB]]] = {
    "person": [
        ("rect", (0.22, 0.70, 0.46, 1.0), _TROUSERS),
        ("rect", (0.54, 0.70, 0.78, 1.0), _TROUSERS),
        ("rect", (0.0, 0.36, 0.18, 0.72), _SKIN),
        ("rect", (0.82, 0.36, 1.0, 0.72), _SKIN),
        ("round", (0.14, 0.33, 0.86, 0.76), "body"),
        ("ellipse", (0.27, 0.03, 0.73, 0.35), _SKIN),
        ("chord", (0.22, 0.0, 0.78, 0.28), "accessory:hair"),
    ],
    "guitar": [
        ("rect", (0.42, 0.05, 0.58, 0.55), "accessory:wood"),
        ("rect", (0.34, 0.0, 0.66, 0.11), "accessory:wood"),
        ("ellipse", (0.12, 0.38, 0.88, 0.74), "body"),
        ("ellipse", (0.0, 0.54, 1.0, 1.0), "body"),
        ("ellipse", (0.36, 0.56, 0.64, 0.73), _INK),
    ],
    "dog": [
        ("polygon", ((0.10, 0.52), (0.0, 0.16), (0.10, 0.14), (0.24, 0.46)), "body"),
        ("rect", (0.13, 0.62, 0.27, 1.0), "body"),
        ("rect", (0.53, 0.62, 0.67, 1.0), "body"),
        ("ellipse", (0.05, 0.36, 0.74, 0.80), "body"),
        ("ellipse", (0.52, 0.04, 0.96, 0.52), "body"),
        ("polygon", ((0.52, 0.44), (0.60, 0.36), (0.80, 0.56), (0.70, 0.64)), "accessory:none"),
        ("ellipse", (0.50, 0.06, 0.66, 0.38), _WOOD),
        ("ellipse", (0.88, 0.26, 1.0, 0.38), _INK),
        ("ellipse", (0.74, 0.16, 0.82, 0.25), _INK),
    ],
    "mug": [
        ("ring", (0.56, 0.24, 1.0, 0.76), "body"),
        ("round", (0.0, 0.0, 0.76, 1.0), "body"),
        ("ellipse", (0.20, 0.32, 0.56, 0.68), "accessory:none"),
        ("rect", (0.07, 0.0, 0.69, 0.09), _INK),
    ],
    "ball": [
        ("ellipse", (0.0, 0.0, 1.0, 1.0), "body"),
        ("ellipse", (0.30, 0.30, 0.70, 0.70), "accessory:none"),
    ],
    "flower": [
        ("rect", (0.44, 0.45, 0.56, 1.0), (50, 130, 50)),
        ("ellipse", (0.52, 0.70, 0.96, 0.84), (50, 130, 50)),
        *[("ellipse", petal, "body") for petal in _PETALS],
        ("ellipse", (0.33, 0.19, 0.67, 0.41), "accessory:pollen"),
    ],
    "hat": [
        ("round", (0.22, 0.0, 0.78, 0.86), "body"),
        ("ellipse", (0.0, 0.66, 1.0, 1.0), "body"),
        ("rect", (0.22, 0.50, 0.78, 0.66), "accessory:ink"),
    ],
    "car": [
        ("polygon", ((0.18, 0.46), (0.32, 0.0), (0.68, 0.0), (0.84, 0.46)), "body"),
        ("round", (0.0, 0.40, 1.0, 0.86), "body"),
        ("rect", (0.36, 0.10, 0.49, 0.40), (190, 220, 240)),
        ("rect", (0.54, 0.10, 0.66, 0.40), (190, 220, 240)),
        ("ellipse", (0.12, 0.64, 0.34, 1.0), _INK),
        ("ellipse", (0.66, 0.64, 0.88, 1.0), _INK),
        ("rect", (0.40, 0.50, 0.62, 0.74), "accessory:none"),
    ],
}
_USUAL_ACCESSORY: dict[str, RGB | None] = {
    "none": None,
    "hair": (80, 50, 30),
    "wood": _WOOD,
    "pollen": (250, 210, 70),
    "ink": _INK,
}


def _draw_object(canvas: Image.Image, item: SceneObject, rng: random.Random) -> Image.Image:
    """Paint one object on the supersampled canvas; returns its silhouette, mode `L`, of the canvas's size."""
    if item.category not in _PARTS:
        raise ValueError(f"category {item.category!r} is not one of {list(CATEGORIES)}.")
    n = canvas.size[0]
    x0, y0, x1, y1 = (round(v * n) for v in item.box)
    width, height = max(4, x1 - x0), max(4, y1 - y0)
    look = item.look
    first = rgb(look.colour, rng)
    second = rgb(look.second_colour, rng) if look.second_colour else None
    body = _texture(width, height, look, first, second)
    accessory = rgb(look.accessory, rng) if look.accessory else None
    picture = Image.new("RGB", (width, height))
    silhouette = Image.new("L", (width, height), 0)
    for kind, shape, paint in _PARTS[item.category]:
        if paint == "body":
            paper = body
        else:
            colour = paint if isinstance(paint, tuple) else accessory or _USUAL_ACCESSORY[paint.split(":")[1]]
            if colour is None:
                continue
            paper = Image.new("RGB", (width, height), colour)
        part = _part_mask(kind, shape, width, height)
        picture.paste(paper, (0, 0), part)
        silhouette.paste(255, (0, 0, width, height), part)
    if item.mirrored:
        picture, silhouette = (layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for layer in (picture, silhouette))
    canvas.paste(picture, (x0, y0), silhouette)
    placed = Image.new("L", canvas.size, 0)
    placed.paste(silhouette, (x0, y0))
    return placed


def _part_mask(kind: str, shape: tuple, width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    if kind == "polygon":
        draw.polygon([(x * width, y * height) for x, y in shape], fill=255)
        return mask
    box = [shape[0] * width, shape[1] * height, shape[2] * width - 1, shape[3] * height - 1]
    if kind == "rect":
        draw.rectangle(box, fill=255)
    elif kind == "round":
        draw.rounded_rectangle(box, radius=0.1 * min(width, height), fill=255)
    elif kind == "ellipse":
        draw.ellipse(box, fill=255)
    elif kind == "chord":
        draw.chord(box, 180, 360, fill=255)
    elif kind == "ring":
        draw.ellipse(box, outline=255, width=max(2, round(0.10 * width)))
    return mask


def _texture(width: int, height: int, look: Look, first: RGB, second: RGB | None) -> Image.Image:
    """The body's paint: the first colour, with stripes (40 % of the area) or dots of the second."""
    texture = Image.new("RGB", (width, height), first)
    if second is None or look.pattern == "plain":
        return texture
    draw = ImageDraw.Draw(texture)
    period = max(4.0, SCALES[look.scale] * height)
    if look.pattern == "striped":
        for k in range(int(height / period) + 2):
            top = (k + 0.15) * period
            draw.rectangle([0, top, width, top + 0.4 * period], fill=second)
    else:
        radius = 0.26 * period
        for row in range(int(height / period) + 2):
            for column in range(int(width / period) + 2):
                x, y = (column + (0.5 if row % 2 else 0.0)) * period, row * period
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=second)
    return texture
