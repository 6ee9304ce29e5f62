"""People's pictures as they look: upright, 16 bits of grey as 8, transparency apart."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

__multisubject_version__ = "0.1.0"

# Pillow reports a damaged file by any of these, according to the format.
PICTURE_ERRORS = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)


_DATA_URL = re.compile(r"data:image/(png|jpeg|webp);base64,")


def is_data_url(value: Any) -> bool:
    """Whether a value is a picture written as text, `data:image/png;base64,…` (PNG, JPEG or WebP)."""
    return isinstance(value, str) and _DATA_URL.match(value) is not None


def picture_file(value: str | os.PathLike[str]) -> Any:
    """What `Image.open` takes for a path or a picture written as text. Raises `OSError` for text that is no base64."""
    if not is_data_url(value):
        return value
    try:
        return io.BytesIO(base64.b64decode(str(value).partition(",")[2], validate=True))
    except binascii.Error as error:
        raise OSError(f"what follows `base64,` is none: {error}") from None


def picture_name(value: str | os.PathLike[str]) -> str:
    """What messages call a path or a picture written as text."""
    return f"{str(value).partition(',')[0]},…" if is_data_url(value) else os.fspath(value)


def data_url(image: Image.Image) -> str:
    """A picture as text, which layouts take for a mask or a reference picture."""
    return png_url(png_bytes(image))


def png_url(data: bytes) -> str:
    """A PNG file's bytes as such text."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def open_picture(path: Path) -> Image.Image:
    """A picture file, `upright`. Raises one of `PICTURE_ERRORS` for a file that cannot be read."""
    with Image.open(path) as file:
        return upright(file)


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data says; 16 bits of grey become 8, where Pillow's own conversion would cut everything bright
    off. ValueError for floating-point values, whose range nobody knows."""
    image = ImageOps.exif_transpose(image)
    image.load()
    if image.mode == "F":
        raise ValueError("it has floating-point values; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode != "I" or values.max() > 255:  # 32-bit files may hold 8-bit values
            values = values // 257
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """RGB with its transparent parts on white, and the transparency where the picture has any."""
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image, alpha if any(alpha.histogram()[:255]) else None


def picture_digests(images: Iterable[Image.Image]) -> list[str]:
    """What tells a set of pictures from others by their pixels, and nothing of what is to be seen: 16 hexadecimal
    digits for each of them. Of more than 100 the smallest, so that sets that have much in common share some."""
    digests = {hashlib.sha256(f"{i.mode} {i.size} ".encode() + i.tobytes()).hexdigest()[:16] for i in images}
    return sorted(digests)[:100]


def anonymous_png(image: Image.Image | str | os.PathLike[str]) -> bytes:
    """A picture as PNG bytes, without the metadata that it may carry (settings, camera, place)."""
    picture, _ = split_alpha(open_picture(Path(image)) if isinstance(image, (str, os.PathLike)) else upright(image))
    picture.info = {}
    return png_bytes(picture)


def png_bytes(image: Image.Image, texts: PngInfo | None = None) -> bytes:
    """The bytes of a PNG file, for `write_atomically`; with `texts` inside."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=texts)
    return buffer.getvalue()
