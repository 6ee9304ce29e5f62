"""What this package asks of the Hugging Face Hub: fetch small files of a repository, and commit some.

A repository is read at one revision with `HubRepo`; `commit_files` publishes all of it or nothing. Which of the files
are subjects is for `hub_utils.py` to say.

huggingface_hub is imported by the functions that call it, so that looking at a local file is instant.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from .subject_file import MAX_FILE_BYTES, SubjectFileError, some_of

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

__multisubject_version__ = "0.1.0"

MAX_UNASKED_BYTES = 2**20  # of larger files in a repository, only the header is fetched to see whether it is a subject
RETRY_WAIT_SECONDS = 1.0  # doubled at every further try
_MAX_TRIES = 4

_T = TypeVar("_T")


class HubOptions(TypedDict, total=False):
    """How to read from the Hub.

    Attributes:
        revision: branch, tag or commit of the repository.
        token: access token for private repositories; `None` takes the one of `hf auth login` or `HF_TOKEN`.
        cache_dir: the Hub cache. Default: the usual one.
        force_download: fetch again what the cache has.
        local_files_only: read the cache, make no network call. `HF_HUB_OFFLINE=1` does the same.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    force_download: bool
    local_files_only: bool


class PushOptions(TypedDict, total=False):
    """How to write to the Hub.

    Attributes:
        private: whether a repository that is created now is private. An existing public one is refused if `True`.
        token: access token with write permission; `None` takes the one of `hf auth login` or `HF_TOKEN`.
        revision: branch to push to. Default: `main`.
        create_pr: open a pull request instead.
        tag: tag the commit, e.g. `"v1"`.
        commit_message: default: says what is uploaded.
    """

    private: bool | None
    token: str | bool | None
    revision: str | None
    create_pr: bool
    tag: str | None
    commit_message: str | None


def check_options(options: Mapping[str, Any], kind: type[HubOptions] | type[PushOptions]) -> None:
    """Raise a TypeError for an option that `kind` does not have."""
    for name in options:
        if name not in kind.__annotations__:
            raise TypeError(f"unexpected argument {name!r}; the Hub's options are {', '.join(kind.__annotations__)}.")


class HubUnreachableError(ConnectionError):
    """The Hub cannot be asked: offline, unreachable, or out of order. Perhaps the cache knows."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------

_HUB_SOURCE = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<path>[^@]+?))?/?(?:@(?P<revision>.+))?")


@dataclass(frozen=True)
class HubSource:
    """`user/repo[/path][@revision]`, taken apart. The path is a folder or a file of the repository, or empty."""

    repo_id: str
    path: str
    revision: str | None


def parse_hub_source(source: str, revision: str | None = None) -> HubSource:
    """Take `source` apart.

    Raises:
        FileNotFoundError: it is no Hub id (nor a file, or it would not have come here).
        ValueError: `revision` and `source` contradict, or a file stands behind the revision.
    """
    match = _HUB_SOURCE.fullmatch(source)
    parts = (match["path"] or "").split("/") if match else []
    if match is None or ".." in parts or "." in parts or "\\" in source:
        raise FileNotFoundError(
            f"source={source!r}: no such file or folder, and a Hub id has the form user/repo[/path][@revision]."
        )
    if (match["revision"] or "").endswith(".safetensors"):
        raise ValueError(f"source={source!r}: @revision stands at the end, as in user/repo/file.safetensors@main.")
    if revision is not None and match["revision"] not in (None, revision):
        raise ValueError(f"revision={revision!r} contradicts source={source!r}. Give the revision once.")
    return HubSource(match["repo"], match["path"] or "", revision or match["revision"])


@dataclass(frozen=True)
class HubRepo:
    """A repository at a revision, to read from. What is missing is reported in our words, as the client's own types.

    Args:
        repo_id: `user/repo`.
        options: how to read; see `HubOptions`.
    """

    repo_id: str
    options: HubOptions

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit; None for the default branch."""
        return self.options.get("revision")

    @property
    def offline(self) -> bool:
        """Whether the cache alone may be asked."""
        from huggingface_hub import constants

        return self.options.get("local_files_only", False) or constants.HF_HUB_OFFLINE

    def download(self, path: str, size: int | None = None) -> Path:
        """A file in the cache, fetched if need be; its size is asked for first, unless it is known.

        Raises:
            SubjectFileError: it is too large for a subject; nothing was downloaded.
            huggingface_hub.errors.HfHubHTTPError: the Hub has no such repository, revision or file for us.
            huggingface_hub.errors.LocalEntryNotFoundError: the Hub cannot be asked, and the cache does not have it.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import HTTPError

        if size is None and not self.offline:
            with suppress(HTTPError):  # the download says what is wrong, or finds the file in the cache
                url = hf_hub_url(self.repo_id, path, revision=self.revision)
                size = get_hf_file_metadata(url, token=self.options.get("token")).size
        if size is not None and size > MAX_FILE_BYTES:
            raise SubjectFileError(
                f"{self.repo_id}: {path} has {size:,} bytes, too large for a subject (a few KB; at most "
                f"{MAX_FILE_BYTES:,}). Nothing was downloaded."
            )
        with self._saying_what_is_missing(path):
            return Path(
                hf_hub_download(
                    self.repo_id,
                    path,
                    revision=self.revision,
                    token=self.options.get("token"),
                    cache_dir=self.options.get("cache_dir"),
                    force_download=self.options.get("force_download", False) and not self.offline,
                    local_files_only=self.offline,
                )
            )

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Path -> bytes of the files in one folder of the repository (not in its subfolders).

        Raises:
            HubUnreachableError: see there.
            huggingface_hub.errors.HfHubHTTPError: the Hub has no such repository, revision or folder for us.
        """
        from huggingface_hub.errors import EntryNotFoundError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

        if self.offline:
            raise HubUnreachableError("local_files_only=True or HF_HUB_OFFLINE=1")
        try:
            with self._saying_what_is_missing(folder):
                entries = [*self._api.list_repo_tree(self.repo_id, folder or None, revision=self.revision)]
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
            raise
        except HTTPError as error:
            raise HubUnreachableError(f"{type(error).__name__}: {error}") from error
        return {entry.path: getattr(entry, "size", 0) for entry in entries}  # of folders: 0

    def cached_folder(self, folder: str, patterns: list[str], why: HubUnreachableError) -> Path:
        """A folder as the cache has it, for when the Hub cannot be asked, which is `why`.

        Raises:
            huggingface_hub.errors.LocalEntryNotFoundError: the cache does not have all of it.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        prefix = f"{folder}/" if folder else ""
        try:
            snapshot = snapshot_download(
                self.repo_id,
                revision=self.revision,
                cache_dir=self.options.get("cache_dir"),
                allow_patterns=[prefix + pattern for pattern in patterns],
                local_files_only=True,
            )
        except LocalEntryNotFoundError as error:
            raise LocalEntryNotFoundError(self._not_cached(folder, why)) from error
        return Path(snapshot) / folder

    def may_be_subject(self, path: str, size: int) -> bool:
        """Whether a file is worth its download: a `.safetensors` is small, or its header says it is ours."""
        from huggingface_hub.errors import SafetensorsParsingError

        if size <= MAX_UNASKED_BYTES or path.endswith(".pt"):
            return True
        try:
            parsed = self._api.parse_safetensors_file_metadata(self.repo_id, path, revision=self.revision)
            return "multisubject" in parsed.metadata
        except (SafetensorsParsingError, AttributeError, TypeError, ValueError, RecursionError):  # of a damaged header
            return False

    @property
    def _api(self) -> HfApi:
        return _client(self.options.get("token"))

    @property
    def _at_revision(self) -> str:
        return f" at revision {self.revision!r}" if self.revision else ""

    def _not_cached(self, path: str, why: object) -> str:
        source = f"{self.repo_id}/{path}".rstrip("/")
        return (
            f"source={source!r}{self._at_revision}: not, or not completely, in the Hub cache, and the Hub cannot be "
            f"asked ({why}). Load it once online."
        )

    @contextmanager
    def _saying_what_is_missing(self, path: str) -> Iterator[None]:
        """The client's errors for what is not there, with messages of ours."""
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RemoteEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            yield
        except LocalEntryNotFoundError as error:
            raise LocalEntryNotFoundError(self._not_cached(path, error.__cause__ or "offline")) from error
        except HfHubHTTPError as error:
            repository = f"the Hub's repository {self.repo_id!r}"
            if isinstance(error, GatedRepoError):
                message = (
                    f"access to {repository} is restricted: accept its terms at "
                    f"{self._api.endpoint}/{self.repo_id}, and log in with `hf auth login`."
                )
            elif isinstance(error, RepositoryNotFoundError):
                message = (
                    f"the Hub has no repository {self.repo_id!r}, or it is private and you are not authenticated as "
                    "somebody who may see it. Check the id; for a private one log in with `hf auth login`, set "
                    "HF_TOKEN, or pass `token`."
                )
            elif isinstance(error, RevisionNotFoundError):
                message = f"{repository} has no revision {self.revision!r}{self._revisions()}."
            elif isinstance(error, RemoteEntryNotFoundError):
                message = (
                    f"{repository} has no file or folder {path!r}{self._at_revision}. "
                    f"`multisubject list {self.repo_id}` says which subjects it has."
                )
            else:
                raise
            raise type(error)(message, response=error.response, server_message=error.server_message) from error

    def _revisions(self) -> str:
        """What revisions there are, as the end of a sentence; nothing where the Hub does not say."""
        from huggingface_hub.errors import HTTPError

        with suppress(HTTPError):
            refs = self._api.list_repo_refs(self.repo_id)
            branches, tags = (sorted(ref.name for ref in kind) for kind in (refs.branches, refs.tags))
            return f"; it has the branches {some_of(branches)} and the tags {some_of(tags)}"
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RepoState:
    """A repository as it is at one commit, while we prepare the next one. `sizes`: path -> bytes of all its files."""

    repo: HubRepo
    sizes: Mapping[str, int]

    def read_text(self, path: str) -> str | None:
        """A text file's content; None where there is none."""
        if path not in self.sizes:
            return None
        try:
            file = self.repo.download(path, self.sizes[path])
            return file.read_text(encoding="utf-8-sig")  # without the byte order mark of Windows' editors
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} of {self.repo.repo_id!r} is not UTF-8 text ({error}); save it there anew."
            ) from error


def commit_files(
    repo_id: str, prepare: Callable[[RepoState], Mapping[str, bytes | None]], message: str, options: PushOptions
) -> CommitInfo:
    """Commit what `prepare` makes of the repository's present state: path -> content, or `None` to delete the file.

    The repository is created if need be. Starts over when another push came in between.

    Args:
        repo_id: `user/repo`.
        prepare: called with the state that the commit follows upon.
        message: the commit's, where the options have none.
        options: see `PushOptions`.

    Raises:
        ValueError: private, but the repository is public; or the tag is there already.
        ConnectionError: the connection was lost; the message says what the repository holds now.
        huggingface_hub.errors.HfHubHTTPError: what the Hub answers.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    private, revision, tag = options.get("private"), options.get("revision"), options.get("tag")
    api = _client(options.get("token"))

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
        repo = HubRepo(repo_id, {"revision": str(info.sha), "token": options.get("token")})
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        files = prepare(RepoState(repo, sizes))
        return api.create_commit(
            repo_id,
            [
                CommitOperationDelete(path) if data is None else CommitOperationAdd(path, data)
                for path, data in files.items()
            ],
            commit_message=options.get("commit_message") or message,
            revision=revision,
            create_pr=options.get("create_pr", False),
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


def _client(token: str | bool | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="multisubject", library_version=__multisubject_version__)


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
