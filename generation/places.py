"""Where files are: those that a configuration names, and the folders that its pictures go to."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from multisubject.pictures import is_data_url


def _search_folders(config_path: Path) -> list[Path]:
    folder = config_path.resolve().parent
    return [Path.cwd(), folder, folder.parent]


def _find_file(name: str, config_path: Path) -> str:
    """The path of a file or folder. Raises `ValueError` if it is in none of the search folders."""
    folders = _search_folders(config_path)
    for folder in folders:
        if (path := folder / Path(name).expanduser()).exists():
            return str(path)
    raise ValueError(f"{name!r} does not exist; looked in {', '.join(dict.fromkeys(map(str, folders)))}.")


def find_source(name: str, config_path: Path) -> str:
    """A subject's file or folder; what cannot be one is passed on as a Hub id."""
    owner, *rest = name.split("/")
    is_local = name.startswith((".", "/", "~")) or (name.endswith((".pt", ".safetensors")) and len(rest) < 2)
    is_local = is_local or not rest or any((folder / owner).exists() for folder in _search_folders(config_path))
    return _find_file(name, config_path) if is_local else name


def resolve_paths(layout: Any, config_path: Path) -> Any:
    """The layout with its JSON file read, if it is one, and with the paths of colour map, masks and reference pictures
    found."""

    def find(name: str) -> str:
        return name if is_data_url(name) else _find_file(name, config_path)

    if isinstance(layout, str):
        layout = find(layout)
        if not layout.lower().endswith(".json"):
            return layout
        try:
            layout = json.loads(Path(layout).read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{layout}:{error.lineno}: this is not JSON: {error.msg}.") from None
        if not isinstance(layout, (dict, list)):
            raise ValueError(f"the layout's file holds {layout!r}, expected a dictionary or a list of dictionaries.")
    if isinstance(layout, dict):
        return {subject: find(value) if isinstance(value, str) else value for subject, value in layout.items()}
    return [_with_paths(part, find) if isinstance(part, dict) else part for part in layout]


def resolve_color_paths(color_context: Mapping[str, Any], config_path: Path) -> dict[str, Any]:
    """The contents of a colour map's regions with the paths of their pictures found."""
    find = partial(_find_file, config_path=config_path)
    return {color: _with_paths(part, find) if isinstance(part, dict) else part for color, part in color_context.items()}


def _with_paths(part: dict[str, Any], find: Callable[[str], str]) -> dict[str, Any]:
    """A dict of a list layout with the paths of its pictures found."""

    def found(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: found(one) for name, one in value.items()}
        if isinstance(value, list):
            return [found(one) for one in value]
        return find(value) if isinstance(value, str) else value

    return {key: found(value) if key in ("mask", "ip_adapter_image") else value for key, value in part.items()}


def texts_of_regions(layout: Any) -> list[str]:
    """What the dicts of a list layout say of their own, in prompts and negative prompts."""
    parts = [part for part in layout if isinstance(part, dict)] if isinstance(layout, list) else []
    texts = [part.get(key) for part in parts for key in ("prompt", "negative_prompt")]
    return [text for text in texts if isinstance(text, str)]


def picture_folder(subjects: Sequence[str], prompt: str) -> Path:
    """`guitar_person/a_photo_of_person_and_guitar_on_the_beach`."""
    return Path(_slug("_".join(sorted(set(subjects)))) or "no_subject") / (_slug(prompt) or "prompt")


# Names that Windows keeps for devices, whatever follows a dot.
_DEVICE = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)


def _slug(text: str, limit: int = 160) -> str:
    """Text as a folder's name, on any system. One that had to be cut ends in a checksum of the whole."""
    slug = re.sub(r"[^\w.-]+", "_", text).strip("_.")
    if _DEVICE.fullmatch(slug):
        slug = f"_{slug}"  # as no other text's name begins
    if len(slug.encode()) <= limit:
        return slug
    return f"{slug.encode()[:limit].decode(errors='ignore')}_{zlib.crc32(text.encode()):08x}"
