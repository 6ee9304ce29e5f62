"""A folder of pictures -> what a trainer needs: upright RGB pictures, where the subject is in them, and their captions.

A folder may hold, beside `dog.jpg`:

- `dog.txt`, its caption; or one `metadata.jsonl` with lines like `{"file_name": "dog.jpg", "text": "a dog"}`;
- `dog_mask.png` (or another format), white where the subject is. A picture with transparency is its own mask.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image

from multisubject.pictures import PICTURE_ERRORS, open_picture, split_alpha

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# Pillow reads these with a plugin alone; they are tried, so that none is passed over in silence.
PLUGINS = {  # suffix -> the module that teaches Pillow to read it, and what to install for it
    ".heic": ("pillow_heif.HeifImagePlugin", "pillow-heif"),
    ".heif": ("pillow_heif.HeifImagePlugin", "pillow-heif"),
    ".jxl": ("pillow_jxl", "pillow-jxl-plugin"),
}
MASK_ENDING = "_mask"
METADATA_FILE = "metadata.jsonl"
# The channels of a grey pixel differ by no more than this, even in a JPEG.
GREY_SPREAD = 24
# A random crop keeps at least this share of each side.
SMALLEST_CROP = 0.8
# Of a picture's area, the largest crop of the training size's proportions keeps at least this share.
SMALLEST_SHARE = 0.25


@dataclass(frozen=True)
class Picture:
    """One training picture.

    Args:
        path: where it came from.
        image: upright (EXIF orientation applied) and RGB; transparent parts are on white.
        mask: mode `L`, of the image's size, white where the subject is; None when the whole picture counts.
        caption: the user's words for it; None when there are none.
    """

    path: Path
    image: Image.Image
    mask: Image.Image | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Crop:
    """A view of a picture at the training size.

    Args:
        image: of that size.
        mask: of that size; None when the whole picture counts.
        top, left, right: what was cut off there, in pixels of the picture after it was resized as its crop is.
    """

    image: Image.Image
    mask: Image.Image | None
    top: int
    left: int
    right: int


def load_pictures(
    folder: str | Path,
    *,
    strict: bool = False,
    use_masks: bool = True,
    flag: str = "instance_data_dir",
    check: Callable[[Picture], None] | None = None,
) -> list[Picture]:
    """Every picture of `folder` in the order of the file names (subfolders are not searched).

    What is named as a picture and cannot be read is named in a warning and skipped, or refused when `strict`. So is a
    picture for which `check` raises ValueError, and a mask of no picture. Without `use_masks` mask files are not looked
    at, and pictures have none. Errors name the folder by its `flag`.

    Raises:
        FileNotFoundError: `folder` does not exist.
        PermissionError: it may not be read.
        ValueError: it holds no picture that can be used, a damaged one and `strict`, a broken `metadata.jsonl`, or
            folders of pictures and at most one picture itself.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--{flag}: {str(folder)!r} is not a folder; expected one with the pictures.")
    files = _list(folder, flag)
    captions = _read_metadata(folder)
    paths = [path for path in files if _is_named_as_picture(path)]
    count = sum(map(is_picture, paths))
    inner = [path for path in files if count <= 1 and _holds_pictures(path)]
    if inner:
        raise ValueError(
            f"--{flag}: {str(folder)!r} holds {count} picture(s) and folders of pictures; expected the "
            f"folder of one subject, such as {str(inner[0])!r} (subfolders are not searched)."
        )
    masks = {path.stem.removesuffix(MASK_ENDING): path for path in files if use_masks and _is_mask(path)}
    if unknown := sorted(set(captions) - {path.name for path in paths}):
        raise ValueError(f"{folder / METADATA_FILE}: names {unknown}, which are not pictures of {str(folder)!r}.")

    def skip(problem: str, error: Exception | None = None) -> None:
        if strict:
            raise ValueError(f"{problem}; mend or remove it, or leave out --strict to skip it.") from error
        logger.warning("%s; skipped.", problem)

    pictures = []
    for path in paths:
        try:
            picture = _load_picture(path, masks.get(path.stem), captions.get(path.name))
            if check is not None:
                check(picture)
            pictures.append(picture if use_masks else replace(picture, mask=None))
        except PICTURE_ERRORS as error:
            skip(f"{path}: cannot be used: {error}", error)
    for stem in masks.keys() - {path.stem for path in paths}:
        skip(f"{masks[stem]}: is the mask of no picture; one of a subject that is a mask needs another name")
    if paths and not pictures:
        raise ValueError(
            f"--{flag}: none of the {len(paths)} picture(s) in {str(folder)!r} can be used; see the warnings."
        )
    if not pictures:
        raise ValueError(
            f"--{flag}: no readable picture in {str(folder)!r}; expected files that end in "
            f"{', '.join(sorted(PICTURE_SUFFIXES))} (subfolders are not searched)."
        )
    return pictures


def is_picture(path: Path) -> bool:
    """Whether that is a file whose name is a picture's, and not a mask's."""
    return _is_named_as_picture(path) and path.is_file()


def _is_named_as_picture(path: Path) -> bool:
    return _has_picture_suffix(path) and not path.stem.endswith(MASK_ENDING)


def _is_mask(path: Path) -> bool:
    return _has_picture_suffix(path) and path.stem.endswith(MASK_ENDING)


def _has_picture_suffix(path: Path) -> bool:
    hidden = path.name.startswith(".")  # also the "._name.jpg" that macOS leaves on other disks
    return not hidden and path.suffix.lower() in PICTURE_SUFFIXES | PLUGINS.keys()


def _list(folder: Path, flag: str) -> list[Path]:
    """What is in the folder, by name."""
    try:
        files = sorted(folder.iterdir())
        for path in files[:1]:
            path.lstat()  # which a folder that can be listed may still refuse
    except PermissionError as error:
        raise PermissionError(
            f"--{flag}: {str(folder)!r} cannot be read ({error.strerror}); allow it (chmod u+rx), or choose another "
            "folder."
        ) from error
    return files


def _holds_pictures(path: Path) -> bool:
    try:
        return path.is_dir() and any(map(is_picture, path.iterdir()))
    except PermissionError:  # then it is not the folder that was meant
        return False


def _read_metadata(folder: Path) -> dict[str, str]:
    file = folder / METADATA_FILE
    captions = {}
    if file.exists():
        for number, line in enumerate(_read_text(file).split("\n"), start=1):  # `splitlines` knows more line ends
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, caption = row["file_name"], row["text"]
                if not isinstance(name, str) or not isinstance(caption, str):
                    raise TypeError("not text")
                captions[name] = caption
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}, line {number}: {line[:80]!r}; expected a JSON object, `file_name` and `text` both text."
                ) from error
    return captions


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows' editors put a mark before the first letter
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text: {error}") from error


def _open_picture(path: Path) -> Image.Image:
    """`open_picture`, with the plugin that reads this kind where it is installed; where it is not, errors name it."""
    if not path.is_file():  # opening a pipe would wait for ever
        kind = "a folder" if path.is_dir() else "no file" if path.exists() else "a link to what is not there"
        raise ValueError(f"{path.name} is {kind}, not a picture")
    module, package = PLUGINS.get(path.suffix.lower(), (None, None))
    if module is None:
        return open_picture(path)
    try:
        import_module(module)
        hint = ""
    except ImportError:
        hint = f"; `pip install {package}` lets Pillow read such files"
    try:
        return open_picture(path)
    except PICTURE_ERRORS as error:
        raise ValueError(f"{error}{hint}") from error


def _open_mask(path: Path) -> Image.Image:
    """A mask file as grey. What is transparent is outside; a black cut-out counts by its transparency alone."""
    mask = _open_picture(path)
    if not mask.has_transparency_data:
        channels = np.asarray(mask.convert("RGB"), dtype=np.int16)
        if np.ptp(channels, axis=-1).max() > GREY_SPREAD:
            raise ValueError(f"{path.name} is a colour picture; expected a mask, white where the subject is")
        return mask.convert("L")
    mask = mask.convert("RGBA")
    grey = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask).convert("L")
    return grey if grey.getbbox() else mask.getchannel("A")


def _load_picture(path: Path, mask_file: Path | None, caption: str | None) -> Picture:
    image, mask = split_alpha(_open_picture(path))
    if mask_file is not None:
        mask = _open_mask(mask_file)
        if mask.size != image.size:
            raise ValueError(
                f"{mask_file.name} is {mask.size[0]} x {mask.size[1]}, the picture {image.size[0]} x {image.size[1]}"
            )
    if mask is not None and mask.getbbox() is None:
        raise ValueError(f"{mask_file.name if mask_file else 'its alpha'} is empty: no pixel belongs to the subject")
    text_file = path.with_suffix(".txt")
    if text_file.exists():
        caption = _read_text(text_file)
    caption = " ".join(caption.split()) if caption else None
    return Picture(path, image, mask, caption or None)


def check_size(picture: Picture, size: tuple[int, int], downscale: int) -> None:
    """Raise ValueError where a picture has next to nothing to learn at the training size `(width, height)`.

    A crop has to have a pixel at least for each latent, which stands for `downscale` x `downscale` pixels: what is
    enlarged more than that shows the base its own blur. And it has to keep SMALLEST_SHARE of the picture.
    """
    width, height = picture.image.size
    scale = max(size[0] / width, size[1] / height)  # of the largest crop to the training size
    if scale > downscale:
        raise ValueError(
            f"it is {width} x {height}, too small to be enlarged {scale:.0f} times to {size[0]} x {size[1]}; "
            f"expected at least {math.ceil(size[0] / downscale)} x {math.ceil(size[1] / downscale)}"
        )
    share = (size[0] / scale) * (size[1] / scale) / (width * height)
    if share < SMALLEST_SHARE:
        raise ValueError(
            f"it is {width} x {height}, of which a crop of {size[0]} : {size[1]} would keep {share:.0%}; crop it "
            "around the subject"
        )


def bucket_size(width: int, height: int, *, resolution: int, multiple: int) -> tuple[int, int]:
    """The training size `(width, height)` for a picture: its own proportions, about `resolution`² pixels.

    Both sides are multiples of `multiple`, what the VAE and UNet can halve all the way down. Extreme proportions are
    held to 4 : 1.
    """
    ratio = min(4.0, max(0.25, width / height))
    sides = (resolution * ratio**0.5, resolution / ratio**0.5)
    bucket_width, bucket_height = (max(multiple, round(side / multiple) * multiple) for side in sides)
    return bucket_width, bucket_height


def crops(picture: Picture, size: tuple[int, int], count: int, rng: random.Random) -> Iterator[Crop]:
    """`count` views of `picture` at `size` = (width, height): the largest centred crop of those proportions, then
    random ones of at least SMALLEST_CROP of its sides. One that would hold nothing of the subject is replaced by the
    first."""
    width, height = picture.image.size
    largest = min(width / size[0], height / size[1])
    for index in range(count):
        attempts = [(1.0, 0.5, 0.5)]
        if index:
            attempts.insert(0, (rng.uniform(SMALLEST_CROP, 1.0), rng.random(), rng.random()))
        for scale, x, y in attempts:
            crop_width, crop_height = size[0] * largest * scale, size[1] * largest * scale
            left, top = (width - crop_width) * x, (height - crop_height) * y
            # Rounding may put a border a hair outside, which Pillow refuses.
            box = (max(0.0, left), max(0.0, top), min(width, left + crop_width), min(height, top + crop_height))
            mask = picture.mask.resize(size, Image.Resampling.BOX, box=box) if picture.mask is not None else None
            if mask is None or np.asarray(mask).any():
                break
        yield Crop(
            picture.image.resize(size, Image.Resampling.LANCZOS, box=box),
            mask,
            *(round(cut / (largest * scale)) for cut in (box[1], box[0], width - box[2])),
        )
