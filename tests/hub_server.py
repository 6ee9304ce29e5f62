"""A Hugging Face Hub on the loopback interface, for tests that use the real `huggingface_hub` client.

It keeps repositories, commits, branches, tags and LFS objects in memory, knows who may see a private repository, counts
every byte that it serves, and can be told to fail, to be slow, or to hang up in the middle of an upload.

    with LoopbackHub() as hub:
        ...  # the client's endpoint: hub.url
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".pt", ".png", ".bin")


@dataclass
class Repo:
    """A repository: commits are snapshots of all its files, refs point at commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)  # which of the refs are tags

    def commit(self, ref: str, files: dict[str, bytes]) -> str:
        content = [self.refs.get(ref), sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())]
        sha = hashlib.sha1(json.dumps([*content, len(self.commits)]).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    @property
    def head(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


@dataclass(frozen=True)
class Request:
    """One request as it was served. `sent` counts the bytes of the answer's body."""

    method: str
    path: str
    status: int
    sent: int
    authorization: str | None


@dataclass
class Fault:
    """Answer the next `times` requests that match with `status`; `0` hangs up half-way through the body."""

    method: str
    path: str
    status: int
    times: int
    headers: dict[str, str]


class LoopbackHub:
    """The server; `tokens` maps access tokens to user names, each of whom owns the repositories under their name."""

    def __init__(self, tokens: dict[str, str] | None = None):
        self.tokens = {"hf_" + "t" * 34: "user"} if tokens is None else tokens
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.titles: list[str] = []  # of the commits that were asked for
        self.faults: list[Fault] = []
        self.delay = 0.0  # seconds before every answer
        self.before_commit: Callable[[], None] | None = None
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def token(self) -> str:
        return next(iter(self.tokens))

    def create(self, repo_id: str, *, private: bool = False, files: dict[str, bytes] | None = None) -> Repo:
        repo = self.repos[repo_id] = Repo(private=private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})})
        return repo

    def fail(self, method: str, path: str, status: int, times: int = 1, headers: dict[str, str] | None = None) -> None:
        self.faults.append(Fault(method, path, status, times, headers or {}))

    def served(self, method: str = "GET", path: str = "") -> list[Request]:
        return [r for r in self.requests if r.method == method and re.search(path, r.path)]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body of an answer in one packet, for which nobody waits
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    # -- answering ----------------------------------------------------------------------------------------------------

    def answer(self, status: int, body: bytes | dict | list = b"", headers: dict[str, str] | None = None) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
        sent = 0 if self.command == "HEAD" else len(body)
        self.hub.requests.append(Request(self.command, self.path, status, sent, self.headers.get("Authorization")))
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if sent:
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self) -> None:
        hub = self.hub
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        time.sleep(hub.delay)
        with hub.lock:
            fault = next(
                (f for f in hub.faults if f.times and f.method == self.command and re.search(f.path, self.path)), None
            )
            if fault:
                fault.times -= 1
        if fault and fault.status == 0:
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            hub.requests.append(Request(self.command, self.path, 0, 0, self.headers.get("Authorization")))
            self.close_connection = True
            self.connection.close()
            return
        self.data = self.body()
        if fault:
            self.answer(fault.status, {"error": "told to fail"}, fault.headers)
            return
        for method, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and self.command in method.split():
                getattr(self, name)(*(unquote(group or "") for group in match.groups()))
                return
        self.refuse(404, "RepoNotFound", f"no route for {self.command} {self.path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    # -- who may do what ----------------------------------------------------------------------------------------------

    @property
    def user(self) -> str | None:
        return self.hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def find(self, repo_id: str, *, write: bool = False) -> Repo | None:
        """The repository, or an answer that says why not."""
        repo, owner = self.hub.repos.get(repo_id), self.user == repo_id.split("/")[0]
        if repo is None or (repo.private and not owner):
            self.refuse(404 if self.user else 401, "RepoNotFound", "Repository not found")
        elif repo.gated and not owner:
            self.refuse(403, "GatedRepo", f"Access to model {repo_id} is restricted")
        elif write and not owner:
            self.refuse(403 if self.user else 401, "Forbidden", "You have no write permission here")
        else:
            return repo
        return None

    def find_commit(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repo = self.find(repo_id)
        if repo is None:
            return None
        sha = repo.resolve(revision)
        if sha is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha, repo.commits[sha]

    # -- routes -------------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        if self.user is None:
            self.refuse(401, "Unauthorized", "Invalid credentials")
        else:
            self.answer(200, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self) -> None:
        wanted = json.loads(self.data)
        repo_id = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if self.user != repo_id.split("/")[0]:
            self.refuse(403 if self.user else 401, "Forbidden", "You have no rights to create a repository here")
            return
        with self.hub.lock:
            status = 409 if repo_id in self.hub.repos else 200
            if status == 200:
                self.hub.create(repo_id, private=bool(wanted.get("private") or wanted.get("visibility") == "private"))
        self.answer(status, {"url": f"{self.hub.url}/{repo_id}"})

    def validate_yaml(self) -> None:
        content = json.loads(self.data)["content"]
        match = re.match(r"---\n(.*?)\n---", content, flags=re.DOTALL)
        valid = match is not None and isinstance(yaml.safe_load(match[1]), dict)
        errors = [] if valid else [{"message": "no front matter"}]
        self.answer(200 if valid else 400, {"errors": errors, "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        found = self.find_commit(repo_id, revision) if self.find(repo_id, write=True) else None
        if found is None:
            return
        files = []
        for entry in json.loads(self.data)["files"]:
            path = entry["path"]
            files.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(path, found[1][path]) if path in found[1] else None,
                }
            )
        self.answer(200, {"files": files})

    def lfs_batch(self, repo_id: str) -> None:
        if self.find(repo_id, write=True) is None:
            return
        objects = []
        for entry in json.loads(self.data)["objects"]:
            oid, verify = entry["oid"], {"href": f"{self.hub.url}/lfs/verify"}
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{oid}"}, "verify": verify}
            objects.append({**entry, **({} if oid in self.hub.lfs else {"actions": actions})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.data).hexdigest() != oid:
            self.refuse(400, "BadRequest", "the object does not have the announced hash")
            return
        self.hub.lfs[oid] = self.data
        self.answer(200)

    def lfs_verify(self) -> None:
        entry = json.loads(self.data)
        known = len(self.hub.lfs.get(entry["oid"], b"")) == entry["size"]
        self.answer(200 if known else 404, {})

    def commit(self, repo_id: str, revision: str) -> None:
        if self.hub.before_commit is not None:
            self.hub.before_commit()
        with self.hub.lock:
            repo = self.find(repo_id, write=True)
            found = self.find_commit(repo_id, revision) if repo else None
            if repo is None or found is None:
                return
            files = dict(found[1])
            for line in self.data.splitlines():
                item = json.loads(line)
                key, value = item["key"], item["value"]
                if key == "header" and value.get("parentCommit") not in (None, found[0]):
                    self.refuse(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
                    return
                if key == "header":
                    self.hub.titles.append(value["summary"])
                elif key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.lfs:
                        self.refuse(400, "BadRequest", "LFS pointer to an object that does not exist")
                        return
                    files[value["path"]] = self.hub.lfs[value["oid"]]
                elif key == "deletedFile":
                    files.pop(value["path"])
            pull_request = f"refs/pr/{sum(ref.startswith('refs/pr/') for ref in repo.refs) + 1}"
            is_pull_request = "create_pr" in self.query
            sha = repo.commit(pull_request if is_pull_request else revision, files)
        url = f"{self.hub.url}/{repo_id}"
        answer = {"commitUrl": f"{url}/commit/{sha}", "commitOid": sha}
        if is_pull_request:
            answer["pullRequestUrl"] = f"{url}/discussions/{pull_request.rpartition('/')[2]}"
        self.answer(200, answer)

    def create_ref(self, repo_id: str, kind: str, revision: str) -> None:
        repo = self.find(repo_id, write=True)
        if repo is None:
            return
        wanted = json.loads(self.data or b"{}")
        ref, start = (wanted["tag"], revision) if kind == "tag" else (revision, wanted.get("startingPoint", "main"))
        if ref in repo.refs:
            self.answer(409, {"error": f"{kind} exists"})
            return
        repo.refs[ref] = repo.resolve(start) or repo.refs["main"]
        if kind == "tag":
            repo.tags.add(ref)
        self.answer(200, {})

    def list_refs(self, repo_id: str) -> None:
        repo = self.find(repo_id)
        if repo is not None:
            found: dict[str, list] = {"branches": [], "converts": [], "tags": []}
            for ref, sha in repo.refs.items():
                kind = "tags" if ref in repo.tags else "branches"
                found[kind].append({"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": sha})
            self.answer(200, found)

    def model_info(self, repo_id: str, revision: str) -> None:
        found = self.find_commit(repo_id, revision or "main")
        if found is not None:
            siblings = [{"rfilename": path, "size": len(data)} for path, data in sorted(found[1].items())]
            private = self.hub.repos[repo_id].private
            self.answer(200, {"id": repo_id, "sha": found[0], "siblings": siblings, "private": private, "tags": []})

    def tree(self, repo_id: str, revision: str, folder: str) -> None:
        found = self.find_commit(repo_id, revision)
        if found is None:
            return
        prefix, recursive = f"{folder}/" if folder else "", "true" in self.query.get("recursive", ["false"])[0].lower()
        entries: dict[str, dict] = {}
        for path, data in sorted(found[1].items()):
            if path.startswith(prefix):
                first, _, rest = path[len(prefix) :].partition("/")
                if rest and not recursive:
                    entries[prefix + first] = {"type": "directory", "path": prefix + first, "oid": "0" * 40, "size": 0}
                else:
                    entries[path] = {"type": "file", "path": path, "oid": _git_oid(data), "size": len(data)}
                    if path.endswith(LFS_SUFFIXES):
                        oid = hashlib.sha256(data).hexdigest()
                        entries[path]["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
        if folder and not entries:
            self.refuse(404, "EntryNotFound", f"{folder} does not exist")
        else:
            self.answer(200, [*entries.values()])

    def resolve_file(self, repo_id: str, revision: str, path: str) -> None:
        found = self.find_commit(repo_id, revision)
        if found is None:
            return
        sha, files = found
        if path not in files:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        data = files[path]
        headers = {"ETag": f'"{_oid(path, data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path.endswith(LFS_SUFFIXES):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if byte_range:
            begin, end = int(byte_range[1]), int(byte_range[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            self.answer(206, data[begin : end + 1], headers)
        else:
            self.answer(200, data, headers)


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{_REPO}/preupload/([^/]+)", "preupload"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(\w+)", "lfs_upload"),
    ("POST", r"/lfs/verify", "lfs_verify"),
    ("POST", rf"/api/models/{_REPO}/commit/([^/]+)", "commit"),
    ("POST", rf"/api/models/{_REPO}/(branch|tag)/([^/]+)", "create_ref"),
    ("GET", rf"/api/models/{_REPO}(?:/revision/([^/]+))?", "model_info"),
    ("GET", rf"/api/models/{_REPO}/refs", "list_refs"),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)(?:/(.+))?", "tree"),
    ("GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", "resolve_file"),
]


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _oid(path: str, data: bytes) -> str:
    """What identifies a file's content: its SHA-256 under LFS, git's own hash otherwise."""
    return hashlib.sha256(data).hexdigest() if path.endswith(LFS_SUFFIXES) else _git_oid(data)
