"""Pictures about pictures: contact sheets, regions drawn over an image, and attention maps over the steps.

Images are `PIL.Image`; arrays are `(height, width)`.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .layout import Region, parse_layout, region_names
from .region_contents import describe_contents

# Pictures narrower than this are enlarged, by whole factors and without smoothing, so that labels can be read.
READABLE_WIDTH = 256
_MARGIN = 6
_INK = (32, 32, 32)
_PAPER = (255, 255, 255)

RGB = tuple[int, int, int]


def contact_sheet(
    images: Sequence[Image.Image],
    columns: int | None = None,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Lay images out on a grid, in reading order.

    Args:
        images: at least one. Cells have the size of the largest; smaller images are centred.
        columns: images per row; by default the sheet is about square.
        captions: one line of text under each image; text that is wider than its cell is cut.

    Raises:
        ValueError, TypeError: no images, `columns` below 1, or another number of captions than of images.
    """
    if not isinstance(images, (list, tuple)):
        raise TypeError(f"images is of type {type(images).__name__}; expected a list of PIL images.")
    if not images:
        raise ValueError("images is empty; a contact sheet needs at least one image.")
    if columns is None:
        columns = int(np.ceil(np.sqrt(len(images))))
    if columns < 1:
        raise ValueError(f"columns is {columns}; expected at least 1.")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"captions has {len(captions)} entries for {len(images)} images; give one caption per image.")

    cells = [_readable(image) for image in images]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    font = _font(width)
    line = _line_height(font) if captions is not None else 0
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + _MARGIN) + _MARGIN, rows * (height + line + _MARGIN) + _MARGIN), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for index, cell in enumerate(cells):
        row, column = divmod(index, columns)
        x, y = _MARGIN + column * (width + _MARGIN), _MARGIN + row * (height + line + _MARGIN)
        sheet.paste(cell, (x + (width - cell.width) // 2, y + (height - cell.height) // 2))
        if captions is not None:
            draw.text((x, y + height), _fit(captions[index], font, width), fill=_INK, font=font)
    return sheet


def draw_regions(
    image: Image.Image, layout: Any, color_context: Mapping[str, Sequence[Any]] | None = None
) -> Image.Image:
    """Outline each region on a copy of `image` and write its subject, and what else it holds, in its corner.

    The outline follows the mask at half its peak, so it shows what guidance sees after overlaps are resolved. The same
    subjects have the same colours in every picture and run. Tiny images come back enlarged (see `READABLE_WIDTH`).

    Args:
        image: the picture.
        layout, color_context: as the pipeline takes them; or the regions that `parse_layout` makes of them.
    """
    canvas = _readable(image)
    regions = _regions(layout, color_context, image)
    names = region_names(regions)
    colours = _colours(names)
    line = max(2, canvas.width // 160)
    # All outlines first, so that no label is crossed by a later region's outline.
    edges = [
        _paint_outline(canvas, region.mask, colours[name], line) for name, region in zip(names, regions, strict=True)
    ]
    draw = ImageDraw.Draw(canvas)
    font = _font(canvas.width)
    for name, region, corner in zip(names, regions, edges, strict=True):
        if corner is None:
            continue
        for number, text in enumerate((name, *describe_contents(region))):
            _label(draw, (corner[0], corner[1] + number * _line_height(font)), text, colours[name], font, canvas.size)
    return canvas


def attention_sheet(
    image: Image.Image,
    attention_maps: Mapping[str, np.ndarray],
    layout: Any = None,
    steps: Sequence[int] | int = 6,
    color_context: Mapping[str, Sequence[Any]] | None = None,
) -> Image.Image:
    """Where each subject's tokens attended: one row per subject, one column per UNet call, regions drawn on top.

    The heat of a row is scaled by that row's own maximum over all steps, so that rows of weak and strong words can both
    be read and the columns of a row can be compared.

    Args:
        image: the finished picture, shown dimmed under the heat.
        attention_maps: subject -> `(UNet calls, h, w)`, as a pipeline's `output_attention_maps=True` gives them for one
            image. A denoising step is one call; with `recurrence` or a second-order scheduler, several.
        layout, color_context: as for `draw_regions`; outlined over every cell, the row's own region in full, the others
            thinner.
        steps: which calls to show, counted from 0, or how many, spread evenly from the first to the last.

    Raises:
        ValueError, TypeError: no maps, a map that is not `(steps, h, w)`, or a step that was not recorded.
    """
    if attention_maps and not isinstance(attention_maps, Mapping):
        raise TypeError(
            f"attention_maps is a {type(attention_maps).__name__}; expected the maps of one image, such as"
            " `output.attention_maps[0]`."
        )
    if not attention_maps:
        raise ValueError("attention_maps is empty; call the pipeline with a layout and output_attention_maps=True.")
    for subject, maps in attention_maps.items():
        if np.ndim(maps) != 3 or not len(maps):
            raise ValueError(f"attention_maps[{subject!r}] has shape {np.shape(maps)}; expected (steps, h, w).")
    recorded = min(len(maps) for maps in attention_maps.values())
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"steps is {steps}; expected at least 1, or a list of steps.")
        shown = sorted({round(step) for step in np.linspace(0, recorded - 1, steps)})
    else:
        shown = list(steps)
    missing = [step for step in shown if not 0 <= step < recorded]
    if missing or not shown:
        raise ValueError(f"steps names {missing or 'nothing'}; the recorded steps are 0 to {recorded - 1}.")

    picture = _readable(image)
    regions = _regions(layout, color_context, image)
    names = region_names(regions)
    colours = _colours([*names, *attention_maps])
    cells, captions = [], []
    for subject, maps in attention_maps.items():
        peak = max(float(np.nanmax(maps)), 1e-12)
        for step in shown:
            cell = _heat_overlay(picture, np.asarray(maps[step]) / peak)
            for name, region in sorted(zip(names, regions, strict=True), key=lambda pair: pair[0] == subject):
                thickness = max(2, cell.width // 100) if name == subject else 1
                _paint_outline(cell, region.mask, colours[name], thickness)
            cells.append(cell)
            captions.append(f"{subject}, call {step + 1}")
    return contact_sheet(cells, columns=len(shown), captions=captions)


def _regions(layout: Any, color_context: Mapping[str, Sequence[Any]] | None, image: Image.Image) -> Sequence[Region]:
    if layout is None:
        return ()
    # By name: a pipeline loaded through `custom_pipeline` has its own copy of that class.
    if isinstance(layout, (list, tuple)) and all(type(region).__name__ == Region.__name__ for region in layout):
        return layout
    return parse_layout(layout, height=image.height, width=image.width, color_context=color_context)


def _colours(names: Sequence[str]) -> dict[str, RGB]:
    """One strong colour per name: one of twelve hues, taken from the name and moved on where two would share it."""
    hues: dict[str, int] = {}
    for name in names:
        if name not in hues:
            wanted = zlib.crc32(name.encode()) % 12  # hash() differs from one process to the next
            taken = set(hues.values())
            hues[name] = next((hue % 12 for hue in range(wanted, wanted + 12) if hue % 12 not in taken), wanted)
    return {name: _rgb(hue / 12, 0.95, 0.95) for name, hue in hues.items()}


def _rgb(hue: float, saturation: float, value: float) -> RGB:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _readable(image: Image.Image) -> Image.Image:
    """An RGB copy, enlarged by a whole factor where it is narrower than READABLE_WIDTH."""
    if not isinstance(image, Image.Image):
        raise TypeError(f'an image is a {type(image).__name__}; expected a PIL image, as `output_type="pil"` gives.')
    factor = -(-READABLE_WIDTH // image.width)
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _paint_outline(canvas: Image.Image, mask: np.ndarray, colour: RGB, thickness: int) -> tuple[int, int] | None:
    """Outline where `mask` has half its peak, which is what guidance takes for inside; returns the region's top left
    corner, None when it is empty."""
    scaled = Image.fromarray(np.asarray(mask, np.float32)).resize(canvas.size, Image.Resampling.BILINEAR)
    level = np.asarray(scaled)
    inside = (level > 0) & (level >= level.max() / 2)
    if not inside.any():
        return None
    eroded = np.pad(inside, 1)  # the image's own border closes a region that touches it
    for _ in range(thickness):
        core = eroded.copy()
        core[1:] &= eroded[:-1]
        core[:-1] &= eroded[1:]
        core[:, 1:] &= eroded[:, :-1]
        core[:, :-1] &= eroded[:, 1:]
        eroded = core
    edge = inside & ~eroded[1:-1, 1:-1]
    canvas.paste(colour, (0, 0), Image.fromarray(edge))
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return int(columns[0]), int(rows[0])


def _heat_overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """`heat` in [0, 1], `(h, w)`, from clear over red to yellow, on a dimmed grey version of `image`."""
    scaled = Image.fromarray(np.asarray(np.nan_to_num(heat), np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    level = np.clip(np.asarray(scaled), 0.0, 1.0)[..., None]
    ground = 0.55 * np.asarray(image.convert("L").convert("RGB"), np.float32)
    fire = 255.0 * np.concatenate([np.minimum(1.0, 2 * level), np.maximum(0.0, 2 * level - 1), 0 * level], axis=-1)
    return Image.fromarray((ground * (1 - 0.85 * level) + 0.85 * level * fire).astype(np.uint8))


def _font(width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, about 24 letters across a picture of this width."""
    return ImageFont.load_default(size=max(11, width // 22))


def _line_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    top, bottom = font.getbbox("Agjq")[1::2]
    return round(bottom + top / 2) + 2


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _label(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    colour: RGB,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    text = _fit(text, font, size[0] - 4)
    width, height = round(font.getlength(text)) + 6, _line_height(font)
    x, y = min(corner[0], size[0] - width), min(corner[1], size[1] - height)
    draw.rectangle([x, y, x + width, y + height], fill=colour)
    dark_enough = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 140
    draw.text((x + 3, y), text, fill=_PAPER if dark_enough else _INK, font=font)
