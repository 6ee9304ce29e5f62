"""The page's subjects: where their files are, how they look in a list, and how new ones come in."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from multisubject.base_models import check_class_phrase_fits, check_subject_fits
from multisubject.generation.base_model import BaseModel
from multisubject.hub_utils import load_subject, pull_subject, save_subject
from multisubject.pictures import PICTURE_ERRORS, data_url, open_picture, png_bytes, split_alpha
from multisubject.residual_embeddings import ResidualEmbedding
from multisubject.shared_models import in_turn
from multisubject.subject_file import MAX_FILE_BYTES, check_class_phrase, check_subject_name, write_atomically

THUMBNAIL_SIDE = 96
"""Of a thumbnail, which is a square, in pixels."""

MOST_SUBJECTS = 500
"""Of a page."""


@dataclass(frozen=True)
class _Entry:
    """A subject of the library.

    Args:
        file: where it is read from.
        class_phrase: the words that it stands for.
        thumbnail: as text, `data:image/png;base64,…`; None where there is none.
    """

    file: Path
    class_phrase: str
    thumbnail: str | None


class SubjectLibrary:
    """Names -> subjects that fit one base, for all tabs. Any thread may call it, and none waits for the model.

    A subject that is uploaded, pulled or trained is written anew to a file of `folder`, under its name. So no name and
    no path that somebody else chose is ever opened, and the folder can be given to `--subjects` later. Beside a
    subject's file may lie its thumbnail, `thumbnails/<the file's stem>.png`.

    Args:
        folder: for the files of subjects that are added. What is there already is added; what does not fit the base
            stays where it is.
        base: the model that they are for.
        text_encoders: its text encoders by their names; only looked at.
    """

    def __init__(self, folder: Path, base: BaseModel, text_encoders: Mapping[str, Any]):
        self.folder, self.base, self._text_encoders = folder.resolve(), base, dict(text_encoders)
        self._entries: dict[str, _Entry] = {}
        self.version = 0  # rises with every change
        self._lock = threading.Lock()  # of the entries, held for a moment
        self._adding = threading.RLock()  # of the folder, and of the order in which subjects come
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                self.add_source(file)
            except (ValueError, OSError):  # of another base, which the same folder may serve
                continue

    # --- what is there -----------------------------------------------------------------------------------------------

    def sources(self) -> dict[str, str]:
        """Name -> file."""
        with self._lock:
            return {name: str(entry.file) for name, entry in self._entries.items()}

    def listing(self) -> list[dict[str, Any]]:
        """The subjects in the order of their coming, as `{"name", "class_phrase", "thumbnail"}`; the thumbnail is a PNG
        as text (`data:image/png;base64,…`) or None."""
        with self._lock:
            return [
                {"name": name, "class_phrase": entry.class_phrase, "thumbnail": entry.thumbnail}
                for name, entry in self._entries.items()
            ]

    def is_own(self, name: str) -> bool:
        """Whether a subject was added here, so that it can be removed."""
        with self._lock:
            return name in self._entries and self._entries[name].file.parent == self.folder

    def check_new_name(self, name: str) -> str:
        """Return a name that a new subject can have. Raises `ValueError` for any other."""
        check_subject_name(name)
        with self._lock:
            taken = next((other for other in self._entries if other.casefold() == name.casefold()), None)
        if taken is not None:
            raise ValueError(f"There is a subject <{taken}> already; expected a name of its own.")
        if f"<{name}>".casefold() in map(str.casefold, self.base.learned):
            raise ValueError(f"The base has learned a token <{name}> already; expected another name.")
        return name

    # --- how subjects come in ----------------------------------------------------------------------------------------

    def add_source(self, source: str | Path, name: str | None = None) -> list[str]:
        """Add the subjects of a file, a folder or a Hub id that this machine's user chose; files stay where they are.

        Returns:
            Their names.

        Raises:
            ValueError: a name is taken, or a subject does not fit the base; then none is added.
            OSError: it cannot be read.
        """
        path = Path(source)
        if path.is_dir():
            files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pt"))
            if not files:
                raise ValueError(f"{str(source)!r} has no subject in it; expected files ending in .safetensors.")
        else:
            files = [path] if path.exists() else pull_subject(str(source), name=name)
        found: dict[str, tuple[Path, ResidualEmbedding]] = {}
        for file in files:
            for key, subject in load_subject(file, name=name if len(files) == 1 else None).items():
                found[key] = (file.resolve(), subject)
        return self._add(found)

    def add_file(self, file: Path, name: str | None = None, class_phrase: str | None = None) -> list[str]:
        """Add the subjects of a file that somebody sent.

        Args:
            file: the file, wherever the server put it.
            name: the subject's name, where it is one; default: what the file says.
            class_phrase: the words that it stands for; needed by a `.pt`, which does not say.

        Returns:
            Their names.

        Raises:
            ValueError: it is no subject, does not fit the base, or a name is taken.
        """
        if file.suffix not in (".safetensors", ".pt"):
            raise ValueError(f"The file ends in {file.suffix[:20]!r}; expected .safetensors, or .pt from Cones 2.")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"The file is too large for a subject, which has a few KB (at most {MAX_FILE_BYTES:,}).")
        if class_phrase:
            check_class_phrase(class_phrase)
        return self._keep(load_subject(file, name=name or None, class_phrase=class_phrase or None))

    def add_from_hub(self, source: str, name: str | None = None) -> list[str]:
        """Ask the Hub for a repository's subjects and add them.

        Args:
            source: `user/repo`, `user/repo/subfolder` or `user/repo/file.safetensors`, with `@revision` if need be.
                Never a path of this machine.
            name: which one to take of several, or what to call the only one.

        Raises:
            ValueError: as `add_file`.
            OSError: the Hub has no such repository, or cannot be reached.
        """
        files = pull_subject(source.strip(), name=name or None)
        subjects: dict[str, ResidualEmbedding] = {}
        for file in files:
            subjects |= load_subject(file, name=(name or None) if len(files) == 1 else None)
        if name and name not in subjects:
            raise ValueError(f"{source} holds {', '.join(sorted(subjects)[:8])}; expected one of these names.")
        return self._keep({name: subjects[name]} if name else subjects)

    def add_trained(self, file: Path, name: str, picture: Image.Image | None = None) -> None:
        """Add a subject that a training left in `file`, with a picture of it. Raises as `add_file`."""
        self._keep({name: load_subject(file, name=name)[name]}, picture)

    def remove(self, name: str) -> None:
        """Forget a subject that was added here, and its file. Raises `ValueError` for any other."""
        with self._adding, self._lock:
            entry = self._entries.get(name)
            if entry is None or entry.file.parent != self.folder:
                raise ValueError(f"<{name}> was not added here; expected a subject that was.")
            del self._entries[name]
            self.version += 1
            if all(entry.file != other.file for other in self._entries.values()):
                entry.file.unlink(missing_ok=True)
                _thumbnail_file(entry.file).unlink(missing_ok=True)

    def _keep(self, subjects: Mapping[str, ResidualEmbedding], picture: Image.Image | None = None) -> list[str]:
        """Write subjects to the folder, each to a file of its own, and add them; a picture is of the only one."""
        with self._adding:
            self._check(subjects)
            found = {}
            for name, subject in subjects.items():
                file = self._free_file(name)
                if picture is not None:
                    write_atomically(_thumbnail_file(file), png_bytes(thumbnail_of(picture)))
                found[name] = (save_subject(subject, file, name=name), subject)
            return self._add(found)

    def _free_file(self, name: str) -> Path:
        """Where nothing is yet: the folder may hold a subject of that name which is another base's."""
        names = (name if number == 1 else f"{name}.{number}" for number in count(1))
        return next(file for each in names if not (file := self.folder / f"{each}.safetensors").exists())

    def _add(self, found: Mapping[str, tuple[Path, ResidualEmbedding]]) -> list[str]:
        with self._adding:
            self._check({name: subject for name, (_, subject) in found.items()})
            files = [file for file, _ in found.values()]
            entries = {
                name: _Entry(file, subject.class_phrase, _read_thumbnail(file) if files.count(file) == 1 else None)
                for name, (file, subject) in found.items()
            }
            with self._lock:
                self._entries |= entries
                self.version += 1
            return list(entries)

    def _check(self, subjects: Mapping[str, ResidualEmbedding]) -> None:
        """Raise `ValueError` unless subjects fit the base, under their names."""
        if len(self.sources()) + len(subjects) > MOST_SUBJECTS:
            raise ValueError(f"There would be more than {MOST_SUBJECTS} subjects here; remove some.")
        for name, subject in subjects.items():
            self.check_new_name(name)
            if not subject.class_phrase:
                raise ValueError(
                    f"The file of <{name}> does not say which words it stands for, as no .pt does. Write them as its "
                    "class phrase, such as `person`."
                )
            check_subject_fits(subject, self._text_encoders, name=name, base_model=self.base.name)
            with in_turn(*self.base.tokenizers.values()):
                check_class_phrase_fits(subject, self.base.tokenizers, name=name)


def thumbnail_of(picture: Image.Image) -> Image.Image:
    """The middle of a picture as a small square of few colours: a few KB, which every tab gets of every subject."""
    picture = split_alpha(picture)[0]
    side = min(THUMBNAIL_SIDE, *picture.size)
    return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS).quantize(64)


def _thumbnail_file(file: Path) -> Path:
    return file.parent / "thumbnails" / f"{file.stem}.png"


def _read_thumbnail(file: Path) -> str | None:
    try:
        return data_url(thumbnail_of(open_picture(_thumbnail_file(file))))
    except PICTURE_ERRORS:
        return None
