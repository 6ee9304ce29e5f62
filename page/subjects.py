"""The subjects of the page: each has a name, a file that the page itself chose, a class phrase and a thumbnail."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from multisubject.base_models import check_class_phrase_fits, check_subject_fits
from multisubject.generation.base_model import BaseModel
from multisubject.hub_client import parse_hub_source
from multisubject.hub_utils import inspect_subject, load_subject, pull_subject, save_subject
from multisubject.page.safety import opaque, read_picture
from multisubject.pictures import data_url, png_bytes
from multisubject.shared_models import in_turn
from multisubject.subject_file import check_class_phrase, check_subject_name, some_of, write_atomically

if TYPE_CHECKING:
    from multisubject.residual_embeddings import ResidualEmbedding

MOST_SUBJECTS = 500
"""That one page holds."""

THUMBNAIL_SIZE = 128
"""Longer side of a thumbnail, in pixels."""

_COLOURS = 64

THUMBNAILS = "thumbnails"
"""Folder beside subject files: `rex.png` in it shows the subject of `rex.safetensors`."""


@dataclass(frozen=True)
class LibrarySubject:
    """One subject of the page.

    Args:
        name: as prompts call it, `<name>`.
        file: what the pipeline loads.
        class_phrase: what it is.
        thumbnail: a PNG as a data URL, or None.
        is_own: whether it was added on the page and can be removed there.
    """

    name: str
    file: Path
    class_phrase: str
    thumbnail: str | None = None
    is_own: bool = False


class SubjectLibrary:
    """The subjects of one base, for all tabs and threads. It has a lock of its own, in which nothing is downloaded.

    Args:
        base: the model that they are for; subjects of another one are refused.
        text_encoders: its text encoders by their names, of which their own fingerprints are taken.
        folder: where subjects are kept that are added here; those that lie there and fit are there again.
    """

    def __init__(self, base: BaseModel, text_encoders: Mapping[str, Any], folder: Path):
        self.base, self.folder, self._text_encoders = base, folder, dict(text_encoders)
        self._subjects: dict[str, LibrarySubject] = {}  # by casefolded name: prompts know no capital letters
        self._lock = threading.Lock()
        for file in sorted(folder.glob("*.safetensors")):
            try:
                self._take(self._fitting(load_subject(file)), file)
            except (ValueError, OSError):  # another base's, or not of this program
                continue

    # --- what there is -----------------------------------------------------------------------------------------------

    def sources(self) -> dict[str, str]:
        """Name -> file."""
        with self._lock:
            return {subject.name: str(subject.file) for subject in self._subjects.values()}

    def listing(self) -> list[dict[str, Any]]:
        """The subjects as the canvas shows them: `name`, `class_phrase`, `thumbnail`."""
        return [
            {"name": one.name, "class_phrase": one.class_phrase, "thumbnail": one.thumbnail} for one in self.subjects()
        ]

    def subjects(self) -> list[LibrarySubject]:
        """All of them, in the order in which they came, those that were added here last."""
        with self._lock:
            return sorted(self._subjects.values(), key=lambda subject: subject.is_own)

    def check_free(self, name: str) -> str:
        """Return `name` if it can name a new subject. Raises `ValueError`."""
        check_subject_name(name)
        with self._lock:
            self._check_new([name])
        return name

    # --- adding and removing -----------------------------------------------------------------------------------------

    def read(self, source: str) -> list[str]:
        """Take subjects from where they are: what the one who starts the server says. Those of the same name that were
        kept here give way.

        Args:
            source: a file, a folder or a Hub id, as for `load_subject`.

        Returns:
            Their names.

        Raises:
            ValueError, OSError: as `load_subject`; or they do not fit the base, or a name is taken.
        """
        subjects = self._fitting(load_subject(source))
        files = {name: Path(entry["file"]).absolute() for name, entry in inspect_subject(source).items()}
        with self._lock:
            self._check_new([name for name in subjects if not self._is_own(name)])
            for name, subject in subjects.items():
                self._subjects[name.casefold()] = self._entry(name, subject, files[name], is_own=False)
        return [*subjects]

    def add_file(self, path: Path, *, name: str | None = None, class_phrase: str | None = None) -> list[str]:
        """Keep a copy of the subjects in a file that somebody sent.

        Args:
            path: a `.safetensors`, or a `.pt` of Cones 2, which knows neither its name nor its class phrase.
            name: what to call the subject, where the file holds one; which to take, where it holds several.
            class_phrase: what it is. Default: what the file says.

        Returns:
            The new names.

        Raises:
            ValueError: the file is damaged or no subject's, does not fit the base, or a name is taken or missing.
        """
        if path.suffix == ".pt" and (not name or not class_phrase):
            raise ValueError("a .pt file knows neither its subject's name nor what it is: fill in both.")
        if class_phrase:
            check_class_phrase(class_phrase)
        try:
            subjects = load_subject(path, name=name or None, class_phrase=class_phrase or None)
        except (ValueError, OSError) as error:  # without the folder, which is nobody's business
            raise ValueError(str(error).replace(str(path), path.name)) from None
        return self._keep(self._fitting(subjects))

    def add_from_hub(self, source: str, *, name: str | None = None) -> list[str]:
        """Keep a copy of a Hub repository's subjects. It downloads, which may take a while.

        Args:
            source: `user/repo[/path][@revision]`; never a path of this machine.
            name: as for `add_file`.

        Returns:
            The new names.

        Raises:
            ValueError, OSError: as `add_file`, or the Hub has nothing there or does not answer.
        """
        try:
            parse_hub_source(source)
        except FileNotFoundError:
            raise ValueError(f"{source!r} is no Hub id; expected one such as user/petrucci.") from None
        files = pull_subject(source, name=name or None)
        subjects = dict[str, Any]()
        for file in files:
            for key, subject in load_subject(file, name=name if name and len(files) == 1 else None).items():
                if name and key.casefold() != name.casefold():
                    continue
                subjects[key] = subject
        if not subjects:
            raise ValueError(f"{source} has no subject {name!r}.")
        if nameless := [key for key, subject in subjects.items() if not subject.class_phrase]:
            raise ValueError(
                f"{source} does not say what {some_of(nameless)} is. Download its file and add it from there."
            )
        return self._keep(self._fitting(subjects))

    def add_trained(self, file: Path, thumbnail: Image.Image | None) -> list[str]:
        """Keep a copy of what was trained here, and of its picture."""
        return self._keep(self._fitting(load_subject(file)), thumbnail)

    def remove(self, name: str) -> None:
        """Forget a subject that was added here, its file and its thumbnail. Raises `ValueError` for others."""
        with self._lock:
            subject = self._subjects.get(name.casefold()) if isinstance(name, str) else None
            if subject is None or not subject.is_own:
                raise ValueError(f"{name!r} was not added on this page, so it is not removed here.")
            subject.file.unlink(missing_ok=True)
            _thumbnail_file(subject.file).unlink(missing_ok=True)
            del self._subjects[name.casefold()]

    # --- how ---------------------------------------------------------------------------------------------------------

    def _fitting(self, subjects: dict[str, ResidualEmbedding]) -> dict[str, ResidualEmbedding]:
        learned = {word.casefold() for word in self.base.learned}
        for name, subject in subjects.items():
            if f"<{name}>".casefold() in learned:
                raise ValueError(f"the base has learned a token <{name}> already. Choose another name.")
            if not subject.class_phrase:
                raise ValueError(
                    f"the file of <{name}> does not say what it is; `multisubject convert --class-phrase` adds that."
                )
            check_subject_fits(subject, self._text_encoders, name=name, base_model=self.base.name)
            with in_turn(*self.base.tokenizers.values()):
                check_class_phrase_fits(subject, self.base.tokenizers, name=name)
        return subjects

    def _is_own(self, name: str) -> bool:
        subject = self._subjects.get(name.casefold())
        return subject is not None and subject.is_own

    def _check_new(self, names: Any) -> None:
        if taken := [name for name in names if name.casefold() in self._subjects]:
            raise ValueError(f"there is a subject {some_of(taken)} already. Choose another name.")
        if len(self._subjects) + len(names) > MOST_SUBJECTS:
            raise ValueError(f"there are {len(self._subjects)} subjects, the most is {MOST_SUBJECTS}. Remove some.")

    def _keep(self, subjects: dict[str, ResidualEmbedding], thumbnail: Image.Image | None = None) -> list[str]:
        with self._lock:
            self._check_new(subjects)
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, subject in subjects.items():
                file = free_path(self.folder / f"{name}.safetensors")
                if thumbnail is not None:
                    write_atomically(_thumbnail_file(file), png_bytes(as_thumbnail(thumbnail)))
                self._take({name: subject}, save_subject(subject, file, name=name))
        return [*subjects]

    def _take(self, subjects: dict[str, ResidualEmbedding], file: Path) -> None:
        for name, subject in subjects.items():
            self._subjects.setdefault(name.casefold(), self._entry(name, subject, file, is_own=True))

    def _entry(self, name: str, subject: ResidualEmbedding, file: Path, *, is_own: bool) -> LibrarySubject:
        return LibrarySubject(name, file.absolute(), subject.class_phrase, _read_thumbnail(file), is_own)


def free_path(path: Path) -> Path:
    """`rex.safetensors`, or `rex-2.safetensors` where that is taken, as by another base's subject."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found


def as_thumbnail(picture: Image.Image) -> Image.Image:
    """A small picture of few colours: some KB, since every tab gets that of every subject."""
    picture = opaque(picture)
    picture.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    return picture.quantize(_COLOURS)


def _thumbnail_file(file: Path) -> Path:
    return file.parent / THUMBNAILS / f"{file.stem}.png"


def _read_thumbnail(file: Path) -> str | None:
    """The thumbnail of a subject's file as a data URL."""
    try:
        return data_url(as_thumbnail(read_picture(_thumbnail_file(file).read_bytes(), "the thumbnail")))
    except (OSError, ValueError):
        return None
