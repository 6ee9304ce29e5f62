"""Pictures on disk: where each one goes, what it says about how it was made, which ones are there already."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image, PngImagePlugin

import multisubject
from multisubject.generation.arguments import GenerateArguments
from multisubject.generation.tasks import GenerationTask
from multisubject.pictures import png_bytes
from multisubject.subject_file import clear_leftovers, make_writable_folder, write_atomically
from multisubject.training.run_lock import locked
from multisubject.visualization import contact_sheet, draw_regions

CONTACT_SHEET = "contact_sheet.png"
PNG_KEY = "multisubject"


@dataclass(frozen=True)
class WantedPicture:
    """A picture that is to be there in the end.

    Args:
        task: what it shows.
        seed: of its noise.
        path: its file.
        has_attention: whether an attention sheet goes beside it.
        settings: all that decides what it looks like, as plain JSON data; they are saved in the file.
    """

    task: GenerationTask
    seed: int
    path: Path
    has_attention: bool
    settings: Mapping[str, Any]

    @property
    def attention_path(self) -> Path:
        """Where its attention sheet goes."""
        return self.path.with_name(f"{self.path.stem}_attention.png")

    def other_settings(self) -> list[str] | None:
        """The names of the settings that differ from those of the picture that is there; None if there is none, or none
        that is whole."""
        files = [self.path, self.attention_path] if self.has_attention else [self.path]
        found = [settings for file in files if isinstance(settings := read_settings(file), dict)]
        if len(found) < len(files):
            return None
        names = dict.fromkeys(itertools.chain(self.settings, *found))
        return [name for name in names if any(of.get(name, ...) != self.settings.get(name, ...) for of in found)]


def resumed(work: Sequence[WantedPicture]) -> tuple[list[WantedPicture], str]:
    """The pictures that are still to be made, and a line that says why."""
    others = [picture.other_settings() for picture in work]
    missing = [picture for picture, names in zip(work, others, strict=True) if names != []]
    said = f"{len(work) - len(missing)} of {len(work)} pictures are there already."
    if replaced := [names for names in others if names]:
        keys = ", ".join(dict.fromkeys(itertools.chain(*replaced)))
        said += f" To be made again, as their settings differ ({keys}): {len(replaced)}."
    return missing, said


def wanted_pictures(task: GenerationTask, settings: Mapping[str, Any], args: GenerateArguments) -> list[WantedPicture]:
    """All pictures of a task, whose `settings` are common to them but for the seed."""
    folder = Path(args.output_dir) / task.folder
    first = args.seed if task.config.seed is None else task.config.seed
    has_attention = args.save_attention_maps and bool(task.subjects or task.layout)  # else there is nothing to map
    return [
        WantedPicture(
            task, first + index, folder / f"{index:04d}.png", has_attention, {**settings, "seed": first + index}
        )
        for index in range(args.num_images)
    ]


@contextmanager
def claimed_folders(
    wanted: Sequence[Sequence[WantedPicture]], args: GenerateArguments, state: PartialState
) -> Iterator[None]:
    """While entered the pictures' folders are this run's: made, writable, cleared of what killed runs left half
    written, and with no other run in them.

    Ends the program where that cannot be, before any picture is made.

    Args:
        wanted: the pictures, one list for each folder.
        args: the command line.
        state: this process's part in the run; the main process claims the folders for all.
    """
    problem: list[str | None] = [None]
    with ExitStack() as claims:
        if state.is_main_process:
            _allow_open_files(len(wanted))
            try:
                for pictures in wanted:
                    claims.enter_context(_claimed(pictures))
            except (OSError, ValueError) as error:
                problem = [f"error: --output_dir {args.output_dir!r}: {error}"]
                print(problem[0], file=sys.stderr)
        broadcast_object_list(problem)  # else the other processes would wait for one that is gone
        if problem[0] is not None:
            sys.exit(2)
        yield


@contextmanager
def _claimed(pictures: Sequence[WantedPicture]) -> Iterator[None]:
    folder = pictures[0].path.parent
    with ExitStack() as claim:
        try:
            make_writable_folder(folder)
            claim.enter_context(locked(folder))
            clear_leftovers(folder)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder}: another run is writing here ({error}); wait for its end, or choose another folder."
            ) from None
        except OSError as error:
            raise OSError(f"cannot write to {folder}: {error}.") from error
        files = (file for picture in pictures for file in (picture.path, picture.attention_path))
        for file in (*files, folder / CONTACT_SHEET):
            if file.is_dir():
                raise ValueError(f"{file} is a folder, where a picture is to go; move it, or choose another folder.")
        for picture in pictures:
            other = (read_settings(picture.path) or picture.settings).get("model")
            if other != picture.settings["model"]:
                raise ValueError(
                    f"{picture.path} is a picture of the base {other!r}, which one of {picture.settings['model']!r}"
                    " would replace; choose another folder, or delete it."
                )
        yield


def _allow_open_files(count: int) -> None:
    """Let this process keep that many files open, one for each lock, besides its own: a shell of macOS allows 256."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count + 256 if hard == resource.RLIM_INFINITY else min(count + 256, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with suppress(OSError, ValueError):  # then the first file too many says so
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def save_picture(image: Image.Image, path: Path, settings: Mapping[str, Any], **more: Any) -> None:
    """Write a PNG with its settings inside, and `more` plain JSON data beside them, whole or not at all."""
    versions = {module.__name__: module.__version__ for module in (multisubject, torch, transformers)}
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PNG_KEY, json.dumps({"settings": settings, "versions": versions, **more}, ensure_ascii=False))
    write_atomically(path, png_bytes(image, info))


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The settings in a picture that `generate_images` made; None for any other file and for none at all."""
    try:
        with Image.open(path) as image:
            image.load()  # a PNG's text may come after its pixels
            return json.loads(getattr(image, "text", {})[PNG_KEY])["settings"]
    except (OSError, KeyError, TypeError, ValueError, SyntaxError, RecursionError):
        return None


def save_contact_sheet(pictures: Sequence[WantedPicture]) -> Path:
    """One sheet of all pictures of a task, beside them; with a layout, each has a copy with the regions drawn in."""
    regions = pictures[0].task.regions()
    cells, captions = [], []
    for picture in pictures:
        with Image.open(picture.path) as image:
            cells.append(image.convert("RGB"))
        captions.append(f"seed {picture.seed}")
        if regions:
            cells.append(draw_regions(cells[-1], regions))
            captions.append("layout")
    columns = math.ceil(math.sqrt(len(pictures))) * (2 if regions else 1)
    path = pictures[0].path.with_name(CONTACT_SHEET)
    write_atomically(path, png_bytes(contact_sheet(cells, columns=columns, captions=captions)))
    return path
