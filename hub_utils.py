"""Where subjects live: files, folders and the Hugging Face Hub. Load and save them, pull and push them, with a card.

    save_subject(subject, "petrucci.safetensors")
    push_subject_to_hub(subject, "user/petrucci", samples=[("a photo of <petrucci>", image)])
    load_subject("user/petrucci")  # or "user/band/petrucci.safetensors@v1", or a file, or a folder

What a file looks like, and why a stranger's file can be opened safely, is in `subject_file.py` and `subject_pickle.py`.
A pipeline's own code is published by `saved_pipeline.push_pipeline_to_hub`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from .base_models import (
    BASE_MODEL_MIRRORS,
    check_class_phrase_fits,
    check_subject_fits,
    load_text_encoders,
    load_tokenizers,
    trained_on_same_base,
)
from .hub_client import (
    HubOptions,
    HubRepo,
    HubUnreachableError,
    PushOptions,
    RepoState,
    check_options,
    commit_files,
    parse_hub_source,
)
from .subject_file import (
    MAX_FILE_BYTES,
    SubjectFileError,
    check_class_phrase,
    check_subject_name,
    default_name,
    header_entries,
    is_subject_file,
    naming,
    read_bytes,
    read_safetensors,
    refuse_secrets,
    some_of,
    write_atomically,
    write_safetensors,
)
from .subject_pickle import check_pickle, read_pickle, write_pickle

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from PIL import Image

    from .residual_embeddings import ResidualEmbedding

__multisubject_version__ = "0.1.0"

MAX_REPOSITORY_FILES = 1000

_T = TypeVar("_T")


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders
# ---------------------------------------------------------------------------------------------------------------------


def save_subject(
    subject: ResidualEmbedding | Mapping[str, ResidualEmbedding],
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
) -> Path:
    """Write one subject, or several by name, to one file; whole or not at all.

    Args:
        subject: a subject, or a mapping from names to subjects.
        path: the file; `.safetensors` keeps everything, `.pt` is what Cones 2 reads: one subject's tensor
            `(num_tokens, dim)` and nothing else.
        name: the subject's name inside the file. Default: the file's stem.

    Returns:
        The path.

    Raises:
        ValueError: for another ending, a bad name, numbers that are not finite, metadata that is not JSON or that
            holds an access token.
    """
    path = Path(path)
    if isinstance(subject, Mapping):
        if name is not None:
            raise ValueError(f"name={name!r}: several subjects bring their own names.")
        if not subject:
            raise ValueError("subject={}: nothing to save.")
        subjects = dict(subject)
    else:
        subjects = {default_name(path) if name is None else name: subject}
    if path.suffix == ".safetensors":
        write_atomically(path, write_safetensors(subjects))
    elif path.suffix == ".pt":
        if len(subjects) != 1:
            raise ValueError(f"path={str(path)!r}: a .pt file holds one subject, got {some_of(sorted(subjects))}.")
        write_atomically(path, write_pickle(next(iter(subjects.values()))))
    else:
        raise ValueError(f"path={str(path)!r}: a subject file ends in .safetensors or .pt.")
    return path


def _load_file(path: Path, name: str | None) -> dict[str, ResidualEmbedding]:
    """The subjects in one file."""
    data = read_bytes(path)
    with naming(path):
        if path.suffix == ".safetensors":
            return read_safetensors(data)
        if path.suffix == ".pt":
            return read_pickle(data, default_name(path) if name is None else name)
        raise SubjectFileError("a subject file ends in .safetensors or .pt.")


def _subject_files(folder: Path) -> list[Path]:
    """The subject files of a folder: its `.safetensors`, or else its one `.pt`."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file() and is_subject_file(path))
    files = files or sorted(path for path in folder.glob("*.pt") if path.is_file())
    if not files:
        raise SubjectFileError(f"{folder}: no subject in this folder (a .safetensors file of ours, or a residual.pt).")
    return files


def _merge(files: Iterable[tuple[Path, Mapping[str, _T]]], name: str | None, source: object) -> dict[str, _T]:
    """The subjects of several files, or the one that `name` names; of these, none may be in two files."""
    merged: dict[str, _T] = {}
    twice: dict[str, Path] = {}
    for path, subjects in files:
        twice |= dict.fromkeys(subjects.keys() & merged.keys(), path)
        merged |= subjects
    selected = _select(merged, name, source)
    for key in twice.keys() & (merged if len(selected) == len(merged) else selected).keys():
        raise ValueError(
            f"{source}: two files hold a subject {key!r}, one is {twice[key].name}. Load one of them by its path."
        )
    return selected


def _select(subjects: Mapping[str, _T], name: str | None, source: object) -> dict[str, _T]:
    """All subjects, or the one that `name` names; a single subject takes whatever name it is given."""
    if name is None:
        return dict(subjects)
    check_subject_name(name)
    if name in subjects:
        return {name: subjects[name]}
    if len(subjects) == 1:
        return {name: next(iter(subjects.values()))}
    raise ValueError(f"name={name!r}: {source} holds {some_of(sorted(subjects))}; choose one of them.")


def load_subject(
    source: str | os.PathLike[str],
    *,
    name: str | None = None,
    class_phrase: str | None = None,
    **hub_options: Unpack[HubOptions],
) -> dict[str, ResidualEmbedding]:
    """Read the subjects of a file, a folder or a Hub repository.

    Args:
        source: a `.safetensors` or Cones 2 `.pt` file, a folder of them, or a Hub id: `user/repo`,
            `user/repo/subfolder`, `user/repo/file.safetensors`, each with `@revision` behind it if need be.
        name: what to call the subject, where the source holds one; which to take, where it holds several.
        class_phrase: the words that stand for the subject in a prompt. Default: what the file says; a `.pt` says
            nothing, which leaves them empty.
        hub_options: for a Hub repository, as `HubOptions` explains: `revision` (branch, tag or commit), `token`,
            `cache_dir`, `force_download`, `local_files_only`.

    Returns:
        Name -> subject, with float32 tensors on the CPU.

    Raises:
        SubjectFileError: a file is damaged, hostile, newer than this package, or no subject at all.
        FileNotFoundError: nothing at `source`.
        TypeError: an option that there is not.
        huggingface_hub.errors.HfHubHTTPError: what the Hub answers for unknown, private or gated repositories.
    """
    if class_phrase is not None:
        check_class_phrase(class_phrase)
    files = _resolve(source, name, hub_options)
    subjects = _merge(((file, _load_file(file, name if len(files) == 1 else None)) for file in files), name, source)
    if class_phrase is not None:
        if len(subjects) > 1:
            names = some_of(sorted(subjects))
            raise ValueError(f"class_phrase={class_phrase!r}: {source} holds {names}; choose by `name`.")
        subjects = {key: replace(subject, class_phrase=class_phrase) for key, subject in subjects.items()}
    return subjects


def inspect_subject(
    source: str | os.PathLike[str], *, name: str | None = None, **hub_options: Unpack[HubOptions]
) -> dict[str, dict[str, Any]]:
    """What a source holds, from the headers alone: no torch, no tensor is made, nothing in it is trusted.

    Args:
        source: as for `load_subject`.
        name: only this subject.
        hub_options: as for `load_subject`.

    Returns:
        Name -> the header's entry (`class_phrase`, `num_tokens`, `embed_dim`, `base_model` …) with `file`, `bytes` and
        `sha256` added. Of a `.pt` no more is known than `storage_bytes`, the size of its numbers.
    """
    files = _resolve(source, name, hub_options)
    return _merge(((file, _inspect_file(file)) for file in files), name, source)


def _inspect_file(path: Path) -> dict[str, dict[str, Any]]:
    data = read_bytes(path)
    common = {"file": str(path), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with naming(path):
        if path.suffix == ".safetensors":
            return header_entries(data, **common)
        return {default_name(path): {"storage_bytes": sum(check_pickle(data).values()), **common}}


def convert_subject(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    class_phrase: str | None = None,
    **metadata: Any,
) -> Path:
    """Cones 2 / seed `.pt` to `.safetensors`, or back (then the metadata is lost).

    Args:
        source: as for `load_subject`.
        path: the file to write; its ending says which form.
        name: the subject's name. Default: for `.safetensors` the stem of `path`.
        class_phrase: the words that it stands for, which a `.pt` does not say.
        metadata: `base_model`, `license` … to add, which a `.pt` does not say either.

    Returns:
        The path.
    """
    stem = Path(path).stem if Path(path).suffix == ".safetensors" else None
    subjects = load_subject(source, name=name or stem, class_phrase=class_phrase)
    return save_subject(
        {key: replace(subject, metadata={**subject.metadata, **metadata}) for key, subject in subjects.items()}, path
    )


def verify_subject(
    source: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None, **hub_options: Unpack[HubOptions]
) -> dict[str, ResidualEmbedding]:
    """Raise unless every subject of a source is sound and, given a base, fits it.

    Args:
        source: as for `load_subject`.
        base: base model, a Hub id or a folder in diffusers format; its text encoders and tokenizers are
            loaded.
        hub_options: as for `load_subject`.

    Returns:
        The subjects.

    Raises:
        ValueError: a file is not sound, or the subject was not made for this base.
    """
    subjects = load_subject(source, **hub_options)
    if base is not None:
        text_encoders, tokenizers = load_text_encoders(base), load_tokenizers(base)
        for name, subject in subjects.items():
            check_subject_fits(subject, text_encoders, name=name, base_model=str(base))
            check_class_phrase_fits(subject, tokenizers, name=name)
    return subjects


# ---------------------------------------------------------------------------------------------------------------------
# From the Hub
# ---------------------------------------------------------------------------------------------------------------------


def _resolve(source: str | os.PathLike[str], name: str | None, hub_options: HubOptions) -> list[Path]:
    """The local files behind a source; downloads those of a Hub source that are not in the cache."""
    check_options(hub_options, HubOptions)
    if not str(source).strip():
        raise ValueError("`source` is empty; expected a file, a folder or a Hub id such as 'user/petrucci'.")
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise ValueError(f"`source` is {str(source)!r}: {error}") from None
    if path.is_dir():
        files = _subject_files(path)
        named = [file for file in files if file.stem == name]
        return named or files
    if path.exists():
        return [path]
    looks_local = isinstance(source, os.PathLike) or str(source).startswith((".", "/", "~"))
    if looks_local or (path.suffix in (".safetensors", ".pt") and len(path.parts) < 3):
        raise FileNotFoundError(f"source={str(source)!r}: no such file or folder.")
    return pull_subject(str(source), name=name, **hub_options)


def pull_subject(source: str, *, name: str | None = None, **hub_options: Unpack[HubOptions]) -> list[Path]:
    """Bring a repository's subject files, and nothing else of it, into the Hub cache.

    With `name`, where the repository has a file `<name>.safetensors`, only that file travels.

    Args:
        source: `user/repo`, `user/repo/subfolder` or `user/repo/file.safetensors`, each with `@revision` if need be.
        name: the one subject that is wanted.
        hub_options: as for `load_subject`.

    Returns:
        The files in the cache.

    Raises:
        SubjectFileError: the repository has no subject there.
        TypeError: an option that there is not.
        huggingface_hub.errors.HfHubHTTPError: what the Hub answers for unknown, private or gated repositories.
        huggingface_hub.errors.LocalEntryNotFoundError: offline, and the cache does not have it.
    """
    from huggingface_hub.errors import EntryNotFoundError

    check_options(hub_options, HubOptions)
    where = parse_hub_source(source, hub_options.get("revision"))
    repo = HubRepo(where.repo_id, {**hub_options, "revision": where.revision})
    if where.path.endswith((".safetensors", ".pt")):
        return [repo.download(where.path)]
    if name is not None:
        with suppress(EntryNotFoundError):
            return [repo.download(f"{where.path}/{check_subject_name(name)}.safetensors".lstrip("/"))]
    try:
        sizes = repo.sizes(where.path)
    except HubUnreachableError as error:
        return _subject_files(repo.cached_folder(where.path, ["*.safetensors", "*.pt"], error))

    # What is too large for a subject, such as the weights of a whole model, is not even downloaded.
    small = [path for path in sorted(sizes) if 0 < sizes[path] <= MAX_FILE_BYTES]
    small = [path for path in small if path.endswith((".safetensors", ".pt"))]
    if len(small) > MAX_REPOSITORY_FILES:
        raise SubjectFileError(
            f"source={source!r}: {len(small):,} files are too many to look through (at most {MAX_REPOSITORY_FILES}). "
            "Name the subject, its file or its subfolder."
        )
    ours = {path: sizes[path] for path in small if repo.may_be_subject(path, sizes[path])}
    files = [
        file
        for path, size in ours.items()
        if path.endswith(".safetensors") and is_subject_file(file := repo.download(path, size))
    ]
    files = files or [repo.download(path, size) for path, size in ours.items() if path.endswith(".pt")]
    if not files:
        raise SubjectFileError(f"source={source!r}: this Hub repository holds no subject there.")
    return files


# ---------------------------------------------------------------------------------------------------------------------
# To the Hub
# ---------------------------------------------------------------------------------------------------------------------


def push_subject_to_hub(
    subject: ResidualEmbedding | Mapping[str, ResidualEmbedding] | str | os.PathLike[str],
    repo_id: str,
    *,
    name: str | None = None,
    samples: Sequence[tuple[str, Image.Image | str | os.PathLike[str]]] = (),
    license: str | None = None,
    overwrite: bool = False,
    **push_options: Unpack[PushOptions],
) -> CommitInfo:
    """Publish subjects: one file each, sample pictures and the model card, in one commit (all of it or nothing).

    The repository is created if need be; subjects that it holds already stay, and so does what their author wrote in
    the card. Pushing what is there already makes no commit. Two pushes at once both arrive.

    A file of the same name is replaced if it is an earlier version of the same subject: it has the same numbers (and a
    new licence, say), or else the same class phrase and base model, and at least half of the pictures that one of the
    two was trained on are among the other's (`training_pictures` in the files, which the trainer writes). Anything
    else, such as another dog that is called rex too, is replaced with `overwrite` alone.

    Args:
        subject: a subject, several by name, or a file or folder of them.
        repo_id: `user/repo`.
        name: a single subject's name. Default: the file's own, else the repository's.
        samples: `(prompt, picture)` pairs for the gallery, for a single subject; metadata in the pictures is dropped.
        license: a licence id of the Hub, such as `"cc-by-4.0"`, for subjects that do not say.
        overwrite: replace files of the same name whatever they are.
        push_options: as `PushOptions` explains: `private`, `token`, `revision` (a branch), `create_pr`, `tag`,
            `commit_message`.

    Returns:
        The commit: `oid`, `commit_url`, `pr_url`.

    Raises:
        ValueError: a bad name, a licence that contradicts the subject's, an access token in the metadata or the card;
            a file that is there already and is no earlier version.
        TypeError: an option that there is not.
        huggingface_hub.errors.HfHubHTTPError: what the Hub answers.
    """
    from .model_card import is_sample_path, sample_path, subject_card
    from .pictures import anonymous_png

    check_options(push_options, PushOptions)
    if isinstance(subject, (str, os.PathLike)):
        if not Path(subject).exists():
            raise FileNotFoundError(f"subject={str(subject)!r}: no such file or folder.")
        subjects = load_subject(subject, name=name)
    elif isinstance(subject, Mapping):
        subjects = _select(subject, name, "subject")
    else:
        subjects = {check_subject_name(repo_id.rpartition("/")[2] if name is None else name): subject}
    if samples and len(subjects) != 1:
        raise ValueError(
            f"samples: sample pictures show one subject, got {some_of(sorted(subjects))}. Push them one by one."
        )
    if license is not None:
        subjects = {key: _with_license(key, value, license) for key, value in subjects.items()}

    adapters = {f"{key}.safetensors": write_safetensors({key: value}) for key, value in sorted(subjects.items())}
    files = dict(adapters)
    pushed: dict[str, dict[str, Any]] = {}
    for file, data in adapters.items():
        pushed |= header_entries(data, file=file)
    prompts = {key: [prompt for prompt, _ in samples] for key in subjects} if samples else {}
    for key in prompts:
        files |= {sample_path(key, index): anonymous_png(image) for index, (_, image) in enumerate(samples)}

    def prepare(state: RepoState) -> dict[str, bytes | None]:
        present = _published_subjects(state)
        for key in pushed.keys() & present.keys():
            if present[key]["file"] != pushed[key]["file"]:
                raise ValueError(
                    f"subject {key!r} is in {present[key]['file']!r} of {repo_id!r} already, and a second file would "
                    "hide both. Pass another `name`, push to another repository, or delete that file first."
                )
        for file, data in adapters.items():
            if file in state.sizes and not overwrite and (reason := _why_no_update(_subject_bytes(state, file), data)):
                raise ValueError(
                    f"{file!r} is in {repo_id!r} already, and is no earlier version of this subject: {reason}. Pass "
                    "another `name`, push to another repository, or replace it with `overwrite=True` (`--overwrite`)."
                )
        kept = {key: info for key, info in present.items() if info["file"] not in adapters}
        card = subject_card(repo_id, kept | pushed, prompts, state.read_text("README.md"), BASE_MODEL_MIRRORS)
        refuse_secrets(card, "the model card", push_options.get("token"))
        former = [path for path in state.sizes for key in prompts if is_sample_path(path, key)]
        return {**dict.fromkeys(former), **files, "README.md": card.encode()}

    title = ", ".join(sorted(subjects)) if len(subjects) < 9 else f"{len(subjects)} subjects"
    return commit_files(repo_id, prepare, f"Upload {title}", push_options)


def _published_subjects(state: RepoState) -> dict[str, dict[str, Any]]:
    """The header entries of the subject files at a repository's root, each with its `file`."""
    infos: dict[str, dict[str, Any]] = {}
    for path in state.sizes:
        data = None if "/" in path else _subject_bytes(state, path)
        if data is not None:
            with suppress(SubjectFileError):  # somebody else's file
                infos |= header_entries(data, file=path)
    return infos


def _subject_bytes(state: RepoState, path: str) -> bytes | None:
    """What a repository's file holds, if it may be a subject."""
    size = state.sizes[path]
    if path.endswith(".safetensors") and size <= MAX_FILE_BYTES and state.repo.may_be_subject(path, size):
        return read_bytes(state.repo.download(path, size))
    return None


def _why_no_update(old: bytes | None, new: bytes) -> str | None:
    """What speaks against one file being an earlier version of another of one subject, as a clause; or None."""
    try:
        subjects = read_safetensors(old or b"")
    except SubjectFileError:
        return "it is no subject, or damaged"
    [(name, ours)] = read_safetensors(new).items()
    if [*subjects] != [name]:
        return f"it holds {some_of(subjects)}"
    theirs = subjects[name]
    same_encoders = ours.deltas.keys() == theirs.deltas.keys()
    if same_encoders and all(ours.deltas[encoder].equal(delta) for encoder, delta in theirs.deltas.items()):
        return None
    if ours.class_phrase.casefold() != theirs.class_phrase.casefold():
        return f"its class phrase is {theirs.class_phrase!r} instead of {ours.class_phrase!r}"
    if not trained_on_same_base(ours, theirs):
        return "it was trained on another base model"
    first, second = (
        {digest for digest in subject.metadata.get("training_pictures") or () if isinstance(digest, str)}
        for subject in (ours, theirs)
    )
    if not first or not second:
        return "which pictures they were trained on is not known"
    is_same = 2 * len(first & second) >= min(len(first), len(second))  # one alone may show two dogs together
    return None if is_same else "it was trained on other pictures"


def _with_license(name: str, subject: ResidualEmbedding, license: str) -> ResidualEmbedding:
    own = subject.metadata.get("license")
    if own not in (None, license):
        raise ValueError(f"license={license!r}: subject {name!r} is under {own!r} already.")
    return replace(subject, metadata={**subject.metadata, "license": license})
