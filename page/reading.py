"""Files that are dropped on the page -> a document and settings: our pictures, configs, zips of a config and its maps.

Nothing that such a file names is opened: subjects are those that the page has, pictures those in the same zip or of the
package's own `layouts/`.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

import multisubject
from multisubject.generation.base_model import BaseModel
from multisubject.generation.config_file import GenerationConfig, Report, parse_config
from multisubject.generation.picture_files import PNG_KEY
from multisubject.generation.places import texts_of_regions
from multisubject.generation.prompts import mark_subjects
from multisubject.layout_images import read_color_map
from multisubject.page.document import Document, read_document
from multisubject.page.entries import DEFAULTS, ENTRY_KEYS, Settings, read_settings
from multisubject.page.safety import MOST_BYTES, opaque, read_picture
from multisubject.pictures import data_url, is_data_url

_MOST_FILES = 32
_OWN_LAYOUTS = Path(multisubject.__file__).parent / "layouts"
_REGION_TEXTS = ("subject", "phrase", "prompt", "negative_prompt")
_REGION_NUMBERS = ("occurrence", "weight", "feather", "begin", "end", "strength")


def read_file(data: bytes, known: Collection[str], base: BaseModel) -> tuple[Document, Settings, list[str]]:
    """What a file brings back.

    Args:
        data: a PNG with settings in it, the JSON of a generation config, or a zip with one and its pictures.
        known: names of the page's subjects.
        base: the model, whose tokenizers say what a config's words mean.

    Returns:
        The document, the settings, and sentences about what could not be brought back.

    Raises:
        ValueError: it is none of these, or damaged.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"the file has {len(data):,} bytes, expected at most {MOST_BYTES:,}.")
    try:
        return _read(data, known, base)
    except RecursionError:
        raise ValueError("the file's JSON is nested too deeply, expected a generation config.") from None


def _read(data: bytes, known: Collection[str], base: BaseModel) -> tuple[Document, Settings, list[str]]:
    if data.startswith(b"\x89PNG"):
        return _read_png(data, known, base)
    if data.startswith(b"PK"):
        texts, of_zip = _unzip(data)
        if len(texts) != 1:
            raise ValueError(f"the zip has {len(texts)} JSON files, expected one config.")
        return _read_config(texts[0], _own_layouts() | of_zip, known, base)
    return _read_config(data, _own_layouts(), known, base)


def _own_layouts() -> dict[str, bytes]:
    """The package's colour maps, by the names under which its configs have them."""
    return {f"layouts/{path.name}": path.read_bytes() for path in _OWN_LAYOUTS.glob("*.png")}


def _read_png(data: bytes, known: Collection[str], base: BaseModel) -> tuple[Document, Settings, list[str]]:
    picture = opaque(read_picture(data, "the picture"))
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # a PNG's text may come after its pixels
            told = json.loads(getattr(image, "text", {})[PNG_KEY])
        made = told["settings"]
        if not isinstance(made, dict):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            "this picture has no settings in it, expected one that this page or generate_images.py has made. To draw "
            "over it, add it under the regions."
        ) from None
    if isinstance(page := told.get("page"), dict):
        document, settings = read_document(page.get("document")), read_settings(page.get("settings"))
        if document.underlay is None:
            document = replace(document, underlay=picture)
        return document, settings, _missing(document, known)
    # Of generate_images.py: settings of the call, with the prompt's subjects marked.
    entry = {
        key: made[key] for key in ("prompt", "negative_prompt", "seed", "layout", "color_context") if made.get(key)
    }
    entry |= {key: made[key] for key in (*ENTRY_KEYS, "moves") if made.get(key) is not None}
    subjects = made.get("subjects")
    if isinstance(subjects, dict) and subjects:
        entry["residual_dict"] = {name: str(said.get("source")) for name, said in subjects.items()}
    document, settings, notes = _read_entry(entry, _own_layouts(), known, base)
    steps = {key: made[key] for key in ("num_inference_steps", "guidance_scale") if made.get(key) is not None}
    document = read_document(document.plain() | {"size": [made.get("width"), made.get("height")]})
    settings = read_settings(asdict(settings) | steps | {"num_images": 1})
    return replace(document, underlay=picture), settings, notes


def _read_config(
    text: bytes, pictures: Mapping[str, bytes], known: Collection[str], base: BaseModel
) -> tuple[Document, Settings, list[str]]:
    """The first entry of a config."""
    try:
        entries = json.loads(text.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"this is neither a picture nor JSON: {str(error)[:200]}.") from None
    entry = entries[0] if isinstance(entries, list) and entries else entries
    if not isinstance(entry, dict):
        raise ValueError('expected a generation config: [{"prompt": …}, …].')
    document, settings, notes = _read_entry(entry, pictures, known, base)
    if isinstance(entries, list) and len(entries) > 1:
        notes.append(f"The file has {len(entries)} entries; this is the first.")
    return document, settings, notes


def _read_entry(
    entry: dict[str, Any], pictures: Mapping[str, bytes], known: Collection[str], base: BaseModel
) -> tuple[Document, Settings, list[str]]:
    text = json.dumps([entry])
    report = Report(Path("file"), text)
    config = parse_config(report).entries[0]
    if config is None or report.problems:
        raise ValueError(" ".join(problem.partition(": ")[2] for problem in report.problems))
    layout = _list_layout(config, pictures)
    prompt, places = mark_subjects(config, 0, report, base, texts_of_regions(layout))
    if report.problems:
        raise ValueError(" ".join(problem.partition(": ")[2] for problem in report.problems))
    # The page's own names for the config's keys: the same name, or that of the file.
    names = {name.casefold(): name for name in known}
    renamed = {}
    for name, (key, _) in places.items():
        stem = PurePosixPath(config.residual_dict[key].replace("\\", "/")).stem
        own = names.get(name.casefold()) or names.get(stem.casefold())
        renamed[name.casefold()] = renamed[key.casefold()] = own or name
    regions = [_region(part, number, renamed, names) for number, part in enumerate(layout, 1)]
    document = read_document(
        {
            "size": base.size[::-1],
            "prompt": _renamed(prompt, renamed),
            "negative_prompt": _renamed(config.negative_prompt or "", renamed),
            "regions": sorted(regions, key=lambda region: region.pop("priority")),
        }
    )
    given = {key: getattr(config, key) for key in (*ENTRY_KEYS, "seed") if getattr(config, key) is not None}
    given["move_objects"] = config.moves is None or len(config.moves) > 0
    notes = _missing(document, known)
    if config.moves:
        notes.append("Objects are moved at the method's own steps, not at those of the file.")
    return document, read_settings(asdict(DEFAULTS) | given), notes


def _list_layout(config: GenerationConfig, pictures: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """The layout of an entry as a list of dicts, its pictures as text."""
    layout = config.layout or []
    if config.guidance_steps == 0:  # then it is not even read
        return []
    if isinstance(layout, str):
        entries = read_color_map(_picture(layout, pictures), config.color_context)
        masked = [{**part, "mask": _mask_text(part["mask"])} for part in entries.values()]
        return [_with_references(part, pictures) for part in masked]
    if isinstance(layout, dict):
        layout = [{"subject": name, "mask" if isinstance(at, str) else "box": at} for name, at in layout.items()]
    parts = [_with_references(part, pictures) for part in layout if isinstance(part, dict)]
    return [{**part, "mask": _as_text(part["mask"], pictures)} if "mask" in part else part for part in parts]


def _with_references(part: dict[str, Any], pictures: Mapping[str, bytes]) -> dict[str, Any]:
    """A dict of a list layout with its reference pictures as text, by the number of their IP-Adapter."""
    held = part.get("ip_adapter_image")
    if held is None:
        return part
    if not isinstance(held, dict):
        held = {str(number): one for number, one in enumerate(held if isinstance(held, list) else [held])}
    return {**part, "ip_adapter_image": {number: _as_text(one, pictures) for number, one in held.items()}}


def _as_text(picture: Any, pictures: Mapping[str, bytes]) -> Any:
    """The text of a picture that a layout names; what is no name stays as it is."""
    if not isinstance(picture, str) or is_data_url(picture):
        return picture
    return data_url(_picture(picture, pictures))


def _picture(name: str, pictures: Mapping[str, bytes]) -> Image.Image:
    found = pictures.get(name) or pictures.get(PurePosixPath(name).name)
    if found is None:
        raise ValueError(
            f"the layout names the file {name[:200]!r}, which the page does not open: put the config and its pictures "
            "into one zip."
        )
    return read_picture(found, name[:200])


def _mask_text(mask: Any) -> str:
    return data_url(Image.fromarray((255 * np.asarray(mask, np.float32)).round().astype(np.uint8)))


def _region(part: dict[str, Any], number: int, renamed: Mapping[str, str], names: Mapping[str, str]) -> dict[str, Any]:
    """A dict of a list layout as a region of a document; `priority` is left in it to sort by."""
    region = {key: part[key] for key in (*_REGION_TEXTS, *_REGION_NUMBERS) if part.get(key) is not None}
    region = {key: _renamed(text, renamed) if isinstance(text, str) else text for key, text in region.items()}
    addressed = region.pop("subject", None) or region.pop("phrase", None)
    if isinstance(addressed, str):
        name = addressed.strip().removeprefix("<").removesuffix(">").strip().casefold()
        own = renamed.get(name) or names.get(name)
        region |= {"subject": own} if own else {"phrase": addressed}
    if isinstance(lora := part.get("lora"), (str, list)):
        region["lora"] = dict.fromkeys([lora] if isinstance(lora, str) else lora, 1.0)
    elif lora:
        region["lora"] = lora
    if region.get("strength") == 0:
        region |= {"off": True, "strength": None}
    shapes = {key: part[key] for key in ("box", "mask") if part.get(key) is not None}
    priority = part.get("priority", 0)
    return region | {
        "id": f"r{number}",
        "ip_adapter_image": part.get("ip_adapter_image"),
        "shape": shapes or None,
        "priority": priority if isinstance(priority, (int, float)) else 0,
    }


def _renamed(text: str, renamed: Mapping[str, str]) -> str:
    for name, own in renamed.items():
        start = 0
        while (at := text.casefold().find(f"<{name}>", start)) >= 0:
            text = f"{text[:at]}<{own}>{text[at + len(name) + 2 :]}"
            start = at + len(own) + 2
    return text


def _missing(document: Document, known: Collection[str]) -> list[str]:
    names = {name.casefold() for name in known}
    missing = [f"<{name}>" for name in document.names() if name.casefold() not in names]
    return [f"Not among the subjects here: {', '.join(missing)}."] if missing else []


def _unzip(data: bytes) -> tuple[list[bytes], dict[str, bytes]]:
    """JSON texts, and the other files by their path and their name."""
    texts, others, total = list[bytes](), dict[str, bytes](), 0
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            total = sum(member.file_size for member in members)
            if len(members) > _MOST_FILES or total > MOST_BYTES:
                raise ValueError(
                    f"the zip has {len(members)} files of {total:,} bytes in all, expected at most {_MOST_FILES} and "
                    f"{MOST_BYTES:,}."
                )
            for member in members:
                with archive.open(member) as file:
                    content = file.read(member.file_size + 1)  # no more than it has said
                if member.filename.lower().endswith(".json"):
                    texts.append(content)
                else:
                    others[member.filename] = others[PurePosixPath(member.filename).name] = content
    except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError, EOFError) as error:
        raise ValueError(f"the zip cannot be read: {error}.") from None
    return texts, others
