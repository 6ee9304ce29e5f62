"""What is evaluated: pictures with what they were to show.

Pictures of `generate_images.py` say it themselves; others are told by the command line.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tqdm.auto import tqdm

from multisubject.evaluation.arguments import EvaluateArguments, EvaluationError, read_pairs
from multisubject.generation.picture_files import CONTACT_SHEET, read_settings
from multisubject.generation.places import resolve_paths
from multisubject.generation.prompts import subject_name
from multisubject.layout import Box, Region, layout_checksum, parse_layout
from multisubject.pictures import PICTURE_ERRORS, open_picture, split_alpha
from multisubject.subject_file import default_name, make_writable_folder, printable
from multisubject.training.pictures import PICTURE_SUFFIXES, is_picture


@dataclass(frozen=True)
class Crop:
    """A picture's file, or the part of it in `box`."""

    path: Path
    box: Box | None = None

    def load(self) -> Image.Image:
        """Upright RGB, as in training: transparent parts on white, 16 bits of grey made 8. A part is padded square.

        Encoders cut the middle square out of what they get: of a standing person they would not see the head. The grey
        is close to their mean, so that it says little.
        """
        image, _ = split_alpha(open_picture(self.path))
        if self.box is None:
            return image
        left, top = (math.floor(edge * side) for edge, side in zip(self.box[:2], image.size, strict=True))
        right, bottom = (math.ceil(edge * side) for edge, side in zip(self.box[2:], image.size, strict=True))
        part = image.crop((left, top, right, bottom))
        return ImageOps.pad(part, (max(part.size),) * 2, Image.Resampling.BICUBIC, color=(124, 116, 104))


@dataclass(frozen=True)
class Target:
    """One thing that a picture was to show.

    Args:
        name: what tables call it: its reference's name, or else the subject's or the phrase.
        phrase: what a detector looks for.
        reference: name of its reference pictures; None for plain words of a layout, and without references.
        region: where the layout wants it, if it says so.
    """

    name: str
    phrase: str
    reference: str | None = None
    region: Region | None = None


@dataclass(frozen=True)
class Picture:
    """A picture to score: its file, the folder that it is counted in, the prompt with class phrases for subjects."""

    path: Path
    folder: str
    prompt: str | None
    targets: tuple[Target, ...]


@dataclass
class Notes:
    """What does not stop an evaluation but has to be said with its results."""

    damaged: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        """Keep it for the results, and say it now, once."""
        if message not in self.warnings:
            self.warnings.append(message)
            tqdm.write(f"warning: {message}", file=sys.stderr)


def find_pictures(argument: str, folder: str, notes: Notes, *, recursive: bool) -> list[Path]:
    """Readable pictures of a folder, sorted; no masks, no sheets. Damaged ones are named in `notes`.

    Raises:
        EvaluationError: no such folder, or no picture in it that can be read.
    """
    if not Path(folder).is_dir():
        raise EvaluationError(f"{argument}: {folder!r} is not a folder; expected one with pictures.")
    files = Path(folder).rglob("*") if recursive else Path(folder).iterdir()
    paths = sorted(path for path in files if is_picture(path))
    attention = {path.with_name(f"{path.stem}_attention.png") for path in paths}
    sheets = {path for path in paths if path.suffix == ".png" and _is_evaluation(path.with_suffix(".json"))}
    paths = [path for path in paths if path.name != CONTACT_SHEET and path not in attention | sheets]
    readable = []
    for path in paths:
        try:
            Crop(path).load()
            readable.append(path)
        except PICTURE_ERRORS as error:
            notes.damaged.append(str(path))
            notes.warn(f"{path} cannot be read as a picture and is left out ({error}). Save it anew, as PNG or JPEG.")
    if not readable:
        raise EvaluationError(
            f"{argument}: no readable picture in {folder!r}, {len(paths)} damaged; expected files that end in "
            f"{', '.join(sorted(PICTURE_SUFFIXES))}{'' if recursive else ' (subfolders are not searched)'}."
        )
    return readable


def _is_evaluation(scores: Path) -> bool:
    if not scores.is_file():
        return False
    with scores.open("rb") as file:
        return b'"multisubject-evaluate"' in file.read(99)


def check_output(output: Path) -> None:
    """Raise `EvaluationError` for a file that cannot be written, or that would replace what is no evaluation."""
    try:
        taken = [path for path in (output, output.with_suffix(".png")) if path.exists()]
        if taken and not _is_evaluation(output):
            raise EvaluationError(
                f"--output is {str(output)!r}, and there is already {str(taken[0])!r}, which is not of an evaluation; "
                "expected a name that is free, also with .png for the contact sheet. Give another, or move that away."
            )
        make_writable_folder(output.parent)
    except OSError as error:
        raise EvaluationError(
            f"--output is {str(output)!r}; expected a file in a folder that can be made and written. Give another. "
            f"{error}"
        ) from error


def read_pictures(args: EvaluateArguments, references: Iterable[str], notes: Notes) -> list[Picture]:
    """Every picture of `--pictures` with what it was to show.

    Raises:
        EvaluationError: an empty folder, settings or references that are missing, references that no picture shows.
    """
    references, phrases = set(references), read_pairs("--class_phrases", args.class_phrases)
    if unknown := sorted(phrases.keys() - references):
        raise EvaluationError(f"--class_phrases names {unknown}; expected names of --references: {sorted(references)}.")
    plain = [Target(name, phrases.get(name, name), name) for name in sorted(references)]
    pictures = []
    for folder in args.pictures:
        for path in tqdm(find_pictures("--pictures", folder, notes, recursive=True), "settings", disable=None):
            settings = read_settings(path)
            prompt, targets = args.prompt and _fill_in(args.prompt, {one.name: one for one in plain}), plain
            if settings is not None:
                prompt, targets = _read_settings(settings, path, references, args, notes)
            elif args.clip_model and prompt is None:
                raise EvaluationError(
                    f"--prompt is not given, and {path} does not carry its own as those of multisubject-generate do; "
                    "expected one of both. Give --prompt, or name other models only (--dino_model, --detector)."
                )
            elif args.detector and (missing := sorted(references - phrases.keys())):
                raise EvaluationError(
                    f"--class_phrases has none for {missing}, and {path} does not carry its own; expected what to look "
                    f"for, such as {missing[0]}=person."
                )
            group = path.parent if len(args.pictures) > 1 else path.parent.relative_to(folder)
            pictures.append(Picture(path, str(group), prompt, tuple(targets)))
    shown = {target.reference for picture in pictures for target in picture.targets}
    if unused := sorted(references - shown):
        names = sorted({target.name for picture in pictures for target in picture.targets})
        raise EvaluationError(f"--references names {unused}, which no picture shows; the pictures show {names}.")
    return pictures


def _read_settings(
    settings: Any, path: Path, references: set[str], args: EvaluateArguments, notes: Notes
) -> tuple[str, list[Target]]:
    """Prompt and targets of a picture that carries its settings; they may be a stranger's, so they are checked."""
    try:
        prompt = settings["prompt"]
        subjects = {name: (one["class_phrase"], one["source"]) for name, one in settings["subjects"].items()}
        if not all(isinstance(text, str) and text for text in [prompt, *sum(subjects.values(), ())]):
            raise TypeError
    except (AttributeError, KeyError, TypeError):
        raise EvaluationError(
            f"--pictures: the settings in {path} are not those of multisubject-generate; expected `prompt` and "
            "`subjects`. Make the picture again, or save it without metadata and give --prompt."
        ) from None
    targets: dict[str, Target] = {}
    for name, (phrase, source) in subjects.items():
        # Configs may call a subject by its class, `person`; its file has its name.
        found = references & {name, default_name(Path(source.partition("@")[0]))}
        if references and len(found) != 1:
            raise EvaluationError(
                f"--references has {sorted(found) or 'nothing'} for the subject {name!r} ({source!r}) of {path}; "
                f"expected one {name}=FOLDER with its pictures. Give it, or narrow --pictures down."
            )
        targets[name] = Target(min(found, default=printable(name)), phrase, min(found, default=None))
    placed: list[tuple[str, Target]] = []
    for region in _read_regions(settings, path, args, notes) if args.detector else ():
        if region.is_background or not (region.is_named or region.prompt):
            continue  # nothing that could be found there
        key = _subject_of(region, prompt, targets)
        words = _fill_in(region.subject, targets)
        target = targets.get(key, Target(printable(words), words))
        placed.append((key, replace(target, region=region)))
    return _fill_in(prompt, targets), [target for key, target in targets.items() if key not in dict(placed)] + [
        one for _, one in placed
    ]


def _fill_in(prompt: str, targets: Mapping[str, Target]) -> str:
    """A prompt with class phrases for its `<names>`."""
    return re.sub(r"<([^<>]+)>", lambda name: targets[name[1]].phrase if name[1] in targets else name[1], prompt)


def _renamed(text: str | None, names: Iterable[str]) -> str | None:
    """A region's own words with subjects under the names that the pipeline knew them by."""
    known = {name.casefold(): name for name in names}
    return text and re.sub(
        r"<([^<>]+)>", lambda match: f"<{known.get(subject_name(match[1].strip()).casefold(), match[1])}>", text
    )


def _subject_of(region: Region, prompt: str, targets: Mapping[str, Target]) -> str:
    """The subject that a region is about, in any case; it may address it by its class phrase: `dog`, occurrence 2."""
    names = {name.casefold(): name for name in targets}
    if (name := subject_name(region.subject).casefold()) in names:
        return names[name]
    wanted = region.subject.casefold()
    found = re.findall(rf"<[^<>]+>|\b{re.escape(region.subject)}\b", prompt, re.IGNORECASE)
    hits = [names.get(hit.strip("<>").casefold(), hit.strip("<>")) for hit in found]
    hits = [hit for hit in hits if wanted in (hit.casefold(), hit in targets and targets[hit].phrase.casefold())]
    return dict(enumerate(hits, 1)).get(region.occurrence or 1, region.subject)


def _read_regions(settings: Mapping[str, Any], path: Path, args: EvaluateArguments, notes: Notes) -> tuple[Region, ...]:
    """The picture's layout, if it has one and that is still what it was when the picture was made."""
    if settings.get("layout") is None:
        return ()
    with Image.open(path) as image:
        width, height = image.size
    try:
        layout = resolve_paths(settings["layout"], Path(args.generation_config or path))
        regions = parse_layout(layout, height=height, width=width, color_context=settings.get("color_context"))
    except (OSError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # `~nobody`, too deep a JSON
        notes.warn(
            f"no layout scores in {path.parent}: {error} Go to another working folder, or use --generation_config."
        )
        return ()
    names = [
        name if (name := subject_name(region.subject)) in settings["subjects"] else region.subject for region in regions
    ]
    marked = {
        key: [_renamed(getattr(region, key), settings["subjects"]) for region in regions]
        for key in ("prompt", "negative_prompt")
    }
    texts = [dict(zip(marked, of_region, strict=True)) for of_region in zip(*marked.values(), strict=True)]
    checksum = layout_checksum(
        replace(region, subject=of_region["prompt"] if region.subject == region.prompt else name, **of_region)
        for region, name, of_region in zip(regions, names, texts, strict=True)
    )
    size_is_kept = (settings.get("height"), settings.get("width")) == (height, width)
    if size_is_kept and settings.get("layout_sha256") != checksum:
        notes.warn(
            f"no layout scores in {path.parent}: the layout's files have changed since. Make the pictures again."
        )
        return ()
    return regions
