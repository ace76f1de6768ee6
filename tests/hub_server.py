"""A Hugging Face Hub on 127.0.0.1 that real clients talk to: repositories in memory, faults on demand.

    with HubServer() as server:
        server.add_folder("openai-community/gpt2", checkpoint_folder)
        server.fail("PUT", "/lfs/", status=503, times=2)
        subprocess.run([sys.executable, "push.py"], env=server.env(home=tmp_path))
        assert [commit.title for commit in server.commits("user/model")] == ["initial commit", "Upload model"]

huggingface_hub reads its settings once, when it is imported, so each client is a process of its own.
"""

import base64
import hashlib
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import pytest

LFS_SUFFIXES = (".arrow", ".bin", ".gz", ".npz", ".parquet", ".png", ".pt", ".safetensors", ".zip")
LFS_BYTES = 10 * 2**20
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
BAD_TOKEN = "Invalid credentials in Authorization header"


def is_lfs(path: str, size: int, head: bytes) -> bool:
    """Whether a file is stored as a large one: weights, other binary files, files of 10 MiB and more."""
    return size >= LFS_BYTES or (size > 0 and (path.endswith(LFS_SUFFIXES) or b"\0" in head))


def git_oid(data: bytes) -> str:
    """The SHA-1 that git gives to a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_oid(path: str, data: bytes) -> str | None:
    """The SHA-256 by which a large file is stored, None for a regular one."""
    return hashlib.sha256(data).hexdigest() if is_lfs(path, len(data), data[:512]) else None


@dataclass(frozen=True)
class Token:
    """Who holds a token and what for: role "write", "read" or "fineGrained".

    Only a fine-grained token looks at `scopes`: a repository id or a namespace -> its permissions there,
    "repo.write" and "repo.content.read".
    """

    user: str
    role: str = "write"
    scopes: Mapping[str, Iterable[str]] = field(default_factory=dict)
    orgs: tuple[str, ...] = ()

    def may(self, permission: str, repo_id: str) -> bool:
        namespace = repo_id.split("/")[0]
        if self.role == "fineGrained":
            return any(permission in self.scopes.get(place, ()) for place in (repo_id, namespace))
        return namespace in (self.user, *self.orgs) and (self.role == "write" or permission != "repo.write")


@dataclass(frozen=True, eq=False)
class Commit:
    """One commit: `oid` is its name, `files` the whole tree after it."""

    oid: str
    title: str
    description: str
    author: str
    date: str
    files: Mapping[str, bytes]


@dataclass
class Repo:
    """One repository; a branch is its commits, oldest first."""

    type: str
    id: str
    private: bool = False
    gated: bool = False
    readers: frozenset[str] = frozenset()
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)

    @property
    def url_path(self) -> str:
        return f"/{self.id}" if self.type == "model" else f"/{self.type}s/{self.id}"

    def history(self, revision: str) -> list[Commit]:
        """The commits up to a branch or a commit, oldest first."""
        if revision in self.branches:
            return list(self.branches[revision])
        for branch in self.branches.values():
            for index, commit in enumerate(branch):
                if commit.oid == revision:
                    return branch[: index + 1]
        raise Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def at(self, revision: str) -> Commit:
        return self.history(revision)[-1]

    def commit(
        self, branch: str, files: dict[str, bytes], title: str, description: str, author: str
    ) -> Commit:
        history = self.branches.setdefault(branch, [])
        tree = sorted((path, git_oid(data)) for path, data in files.items())
        identity = repr((self.type, self.id, branch, len(history), title, tree))
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        oid = hashlib.sha1(identity.encode()).hexdigest()
        history.append(Commit(oid, title, description, author, now, files))
        return history[-1]


@dataclass(frozen=True)
class Request:
    """A logged request: `bytes` of body received, `status` 0 if the connection was cut. Holds no token."""

    method: str
    path: str
    bytes: int
    status: int
    user: str | None


@dataclass
class Fault:
    """What happens to matching requests while `times` lasts; see `HubServer.fail`."""

    method: str
    path: str
    times: int
    status: int | None
    message: str | None
    retry_after: int | None
    delay: float
    reset: bool
    lost: bool
    truncate: int | None


@dataclass
class Response:
    """An answer; `body` is sent as JSON unless it is bytes."""

    body: object = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An error answer in the form the Hub gives it."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.response = Response({"error": message}, status, headers)


class HubServer:
    """The Hub on a free port of 127.0.0.1 for the length of a `with` block.

    Tokens known from the start: `hf_write` and `hf_read`, both of the user `user`.
    `requests` holds every request in the order of their ends, `unknown` those that met no endpoint,
    `errors` the exceptions of the server itself.
    """

    def __init__(self):
        self.tokens = {"hf_write": Token("user"), "hf_read": Token("user", role="read")}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.moved: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.unknown: list[Request] = []
        self.errors: list[BaseException] = []
        self.lock = threading.RLock()
        self._listener = _Listener(self)
        self.url = f"http://127.0.0.1:{self._listener.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._listener.shutdown()
        self._listener.server_close()
        self._listener.disconnect_all()

    def env(self, *, home: str | os.PathLike, token: str | None = "hf_write") -> dict[str, str]:
        """The environment for a client process: this Hub, this token, all caches under `home`."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(foreign)}
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # large files go over plain HTTP: Xet storage is not imitated
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return kept | ours | ({"HF_TOKEN": token} if token else {})

    def add_token(self, token: str, user: str, role: str = "write", *, scopes=None, orgs=()) -> None:
        """Make `token` known; `scopes` as in `Token`, `orgs` the organisations that `user` belongs to."""
        self.tokens[token] = Token(user, role, scopes or {}, tuple(orgs))

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str] | None = None,
        *,
        private: bool = False,
        gated: bool = False,
        repo_type: str = "model",
        readers: Iterable[str] = (),
    ) -> None:
        """Create a repository with the Hub's initial commit, and a second one if there are files.

        A private or gated repository opens for its owner and the users in `readers`.
        """
        seeds = {
            path: data.encode() if isinstance(data, str) else data for path, data in (files or {}).items()
        }
        first = {".gitattributes": GIT_ATTRIBUTES.encode()}
        with self.lock:
            repo = Repo(repo_type, repo_id, private, gated, frozenset(readers))
            repo.commit("main", first, "initial commit", "", "system")
            if seeds:
                repo.commit("main", first | seeds, "Upload files", "", "system")
                repo.lfs = {oid: data for path, data in seeds.items() if (oid := lfs_oid(path, data))}
            self.repos[repo_type, repo_id] = repo

    def add_folder(self, repo_id: str, folder: str | os.PathLike, **options) -> None:
        """`add_repo` with every file under a folder."""
        paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        self.add_repo(repo_id, {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}, **options)

    def move(self, old_name: str, repo_id: str) -> None:
        """Redirect an old one-word name, such as `gpt2`, to a repository."""
        self.moved[old_name] = repo_id

    def commits(self, repo_id: str, *, repo_type: str = "model", revision: str = "main") -> list[Commit]:
        """The commits up to a branch or a commit, oldest first; the first is the Hub's "initial commit"."""
        with self.lock:
            return self.repos[repo_type, repo_id].history(revision)

    def files(self, repo_id: str, *, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """The files at a branch or a commit."""
        return dict(self.commits(repo_id, repo_type=repo_type, revision=revision)[-1].files)

    def fail(
        self,
        method: str,
        path: str,
        *,
        times: int = 1,
        status: int | None = None,
        message: str | None = None,
        retry_after: int | None = None,
        delay: float = 0.0,
        reset: bool = False,
        lost: bool = False,
        truncate: int | None = None,
    ) -> Fault:
        """Spoil the next `times` requests of `method` whose path contains `path`.

        status: answer so, with `message` and `retry_after` in seconds; nothing is done.
        reset: read half of the body, then cut the connection; nothing is done.
        lost: do what was asked, then cut the connection instead of answering.
        truncate: promise the whole body, send this many bytes of it, hang up.
        delay: wait this many seconds before answering; goes with any of the others.
        Raises ValueError unless exactly one fault, or a delay, is asked for.
        """
        kinds = [status is not None, reset, lost, truncate is not None].count(True)
        if kinds > 1 or (kinds == 0 and delay <= 0):
            raise ValueError(
                "A fault is one of status, reset, lost and truncate, or a delay: give exactly one."
            )
        fault = Fault(method, path, times, status, message, retry_after, delay, reset, lost, truncate)
        with self.lock:
            self.faults.append(fault)
        return fault

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault
        return None

    def respond(self, method: str, target: str, token: Token | None, headers, body: bytes) -> Response | None:
        """The answer to a request, None if there is no such endpoint; raises Refusal. Call under the lock."""
        path, _, query = target.partition("?")
        match method, [unquote(segment) for segment in path.split("/")[1:]]:
            case "HEAD", [""]:
                return Response({})
            case "GET", ["api", "agent-harnesses"]:
                return Response({"standardEnvVars": [], "harnesses": {}})
            case "GET", ["api", "whoami-v2"]:
                return self._whoami(token)
            case "POST", ["api", "validate-yaml"]:
                return self._validate_yaml(json.loads(body)["content"])
            case "POST", ["api", "repos", "create"]:
                return self._create_repo(token, json.loads(body))
            case _, ["api", "models" | "datasets" | "spaces", name, *_] if name in self.moved:
                return self._redirect(name, target)
            case _, ["api", ("models" | "datasets" | "spaces") as types, owner, name, *rest]:
                repo = self._visible_repo(types[:-1], f"{owner}/{name}", token)
                return self._respond_api(method, repo, rest, parse_qs(query), token, body)
            case _, [("datasets" | "spaces") as types, *rest]:
                return self._respond_files(method, types[:-1], rest, target, token, headers, body)
            case _, rest:
                return self._respond_files(method, "model", rest, target, token, headers, body)

    def _respond_api(self, method: str, repo: Repo, rest, query, token, body: bytes) -> Response | None:
        """The answer under /api/models/{repo.id}, or datasets or spaces."""
        match method, rest:
            case "GET", [] | ["revision", _]:
                return self._info(repo, repo.at(rest[1] if rest else "main"), query.get("blobs") == ["true"])
            case "GET", ["tree", revision, *folder]:
                recursive = query.get("recursive") == ["true"]
                return self._tree(repo.at(revision).files, "/".join(folder), recursive)
            case "POST", ["paths-info", revision]:
                files, wanted = repo.at(revision).files, parse_qs(body.decode()).get("paths", [])
                return Response([self._file_entry(path, files[path]) for path in wanted if path in files])
            case "GET", ["auth-check"]:
                self._check_gate(token, repo)
                return Response({})
        self._check_write(token, repo.id)
        match method, rest:
            case "GET", ["auth-check", "write"]:
                return Response({})
            case "POST", ["preupload", revision]:
                return self._preupload(repo.at(revision).files, json.loads(body)["files"])
            case "POST", ["commit", branch] if "create_pr" not in query:
                lines = [json.loads(line) for line in body.splitlines()]
                return self._commit(repo, branch, lines, token.user)
            case "POST", ["branch", branch]:
                if branch in repo.branches:
                    raise Refusal(409, f"Reference already exists: {branch}")
                repo.branches[branch] = repo.history(json.loads(body).get("startingPoint", "main"))
                return Response({})
        return None

    def _respond_files(
        self, method: str, repo_type: str, rest, target: str, token, headers, body
    ) -> Response | None:
        """The answer at the addresses of files, regular and large."""
        match method, rest:
            case "GET" | "HEAD", [name, "resolve", *_] if name in self.moved:
                return self._redirect(name, target)
            case "GET" | "HEAD", [owner, name, "resolve", revision, *path]:
                repo = self._visible_repo(repo_type, f"{owner}/{name}", token)
                self._check_gate(token, repo)
                return self._resolve(repo.at(revision), "/".join(path), headers.get("Range"))
            case "POST", [owner, name, "info", "lfs", "objects", ("batch" | "verify") as action]:
                repo = self._visible_repo(repo_type, f"{owner}/{name.removesuffix('.git')}", token)
                self._check_write(token, repo.id)
                return (self._lfs_batch if action == "batch" else self._lfs_verify)(repo, json.loads(body))
            case "PUT", [owner, name, "lfs", oid]:
                # Clients send no token here: on the Hub this is a signed address of the storage.
                repo = self.repos.get((repo_type, f"{owner}/{name.removesuffix('.git')}"))
                return repo and self._lfs_put(repo, oid, body)
        return None

    def _visible_repo(self, repo_type: str, repo_id: str, token: Token | None) -> Repo:
        repo = self.repos.get((repo_type, repo_id))
        if repo and (not repo.private or self._may_read(token, repo)):
            return repo
        # The Hub tells a stranger only 401, and clients take that as "not found" over https alone;
        # with the code they do so over http too.
        raise Refusal(404 if token else 401, "Repository not found", code="RepoNotFound")

    def _may_read(self, token: Token | None, repo: Repo) -> bool:
        if token is None:
            return False
        may = token.may("repo.content.read", repo.id) or token.may("repo.write", repo.id)
        return may or token.user in repo.readers

    def _check_write(self, token: Token | None, repo_id: str) -> None:
        if token is None:
            raise Refusal(401, "Invalid username or password.", code="RepoNotFound")
        if not token.may("repo.write", repo_id):
            raise Refusal(403, "Authorization error.")

    def _check_gate(self, token: Token | None, repo: Repo) -> None:
        if repo.gated and not self._may_read(token, repo):
            why = "you are not in the authorized list" if token else "you must be authenticated"
            message = f"Access to {repo.type} {repo.id} is restricted and {why}."
            raise Refusal(403 if token else 401, message, code="GatedRepo")

    def _redirect(self, name: str, target: str) -> Response:
        location = target.replace(f"/{name}", f"/{self.moved[name]}", 1)
        return Response(status=307, headers={"Location": location})

    def _whoami(self, token: Token | None) -> Response:
        if token is None:
            raise Refusal(401, BAD_TOKEN)
        access: dict = {"displayName": "token", "role": token.role}
        if token.role == "fineGrained":
            entities = {
                place: {"name": place, "type": "model" if "/" in place else "user"} for place in token.scopes
            }
            scoped = [
                {"entity": entities[place], "permissions": [*token.scopes[place]]} for place in entities
            ]
            access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
        orgs = [{"type": "org", "name": org} for org in token.orgs]
        auth = {"type": "access_token", "accessToken": access}
        return Response(
            {"type": "user", "name": token.user, "fullname": token.user, "orgs": orgs, "auth": auth}
        )

    def _validate_yaml(self, card: str) -> Response:
        missing = {"message": "empty or missing yaml metadata in repo card"}
        return Response({"errors": [], "warnings": [] if card.startswith("---\n") else [missing]})

    def _create_repo(self, token: Token | None, asked: dict) -> Response:
        if token is None:
            raise Refusal(401, BAD_TOKEN)
        owner, repo_type = asked["organization"] or token.user, asked.get("type", "model")
        repo_id = f"{owner}/{asked['name']}"
        if not token.may("repo.write", repo_id):
            raise Refusal(
                403, f"You don't have the rights to create a {repo_type} under the namespace {owner!r}."
            )
        url = self.url + Repo(repo_type, repo_id).url_path
        if (repo_type, repo_id) in self.repos:
            return Response({"error": f"You already created this {repo_type} repo", "url": url}, 409)
        self.add_repo(repo_id, private=asked.get("visibility") == "private", repo_type=repo_type)
        return Response({"url": url, "name": repo_id})

    def _file_entry(self, path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if oid := lfs_oid(path, data):
            entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
        return entry

    def _info(self, repo: Repo, commit: Commit, blobs: bool) -> Response:
        siblings = []
        for path, data in commit.files.items():
            siblings.append({"rfilename": path})
            if blobs:
                siblings[-1] |= {"size": len(data), "blobId": git_oid(data)}
                if oid := lfs_oid(path, data):
                    siblings[-1]["lfs"] = {"size": len(data), "sha256": oid, "pointerSize": 134}
        shown = {"id": repo.id, "author": repo.id.split("/")[0], "sha": commit.oid, "siblings": siblings}
        shown |= {"createdAt": repo.branches["main"][0].date, "lastModified": commit.date}
        shown |= {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False}
        return Response(shown | {"tags": [], "downloads": 0, "likes": 0})

    def _tree(self, files: Mapping[str, bytes], folder: str, recursive: bool) -> Response:
        prefix = f"{folder}/" if folder else ""
        inside = {path: data for path, data in files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on this revision", code="EntryNotFound")
        entries = {}
        for path, data in inside.items():
            *parents, _ = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parents) + 1 if recursive else min(len(parents), 1) + 1):
                parent = prefix + "/".join(parents[:depth])
                entries[parent] = {
                    "type": "directory",
                    "path": parent,
                    "size": 0,
                    "oid": git_oid(parent.encode()),
                }
            if recursive or not parents:
                entries[path] = self._file_entry(path, data)
        return Response([entries[path] for path in sorted(entries)])

    def _resolve(self, commit: Commit, path: str, byte_range: str | None) -> Response:
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", code="EntryNotFound", **headers)
        data = commit.files[path]
        headers |= {
            "ETag": f'"{lfs_oid(path, data) or git_oid(data)}"',
            "Content-Type": "application/octet-stream",
        }
        if byte_range is None:
            return Response(data, headers=headers)
        first, last = byte_range.removeprefix("bytes=").split("-")
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= stop:
            raise Refusal(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return Response(data[start:stop], 206, headers)

    def _preupload(self, files: Mapping[str, bytes], asked: list[dict]) -> Response:
        answers = []
        for file in asked:
            path, old = file["path"], files.get(file["path"])
            large = is_lfs(path, file["size"], base64.b64decode(file["sample"]))
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append(answer | ({} if old is None else {"oid": lfs_oid(path, old) or git_oid(old)}))
        return Response({"files": answers})

    def _lfs_batch(self, repo: Repo, asked: dict) -> Response:
        base, answers = f"{self.url}{repo.url_path}.git", []
        for wanted in asked["objects"]:
            answers.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in repo.lfs:
                put, verify = f"{base}/lfs/{wanted['oid']}", f"{base}/info/lfs/objects/verify"
                answers[-1]["actions"] = {"upload": {"href": put}, "verify": {"href": verify}}
        return Response({"transfer": "basic", "objects": answers})

    def _lfs_put(self, repo: Repo, oid: str, body: bytes) -> Response:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "The provided sha256 does not match what was computed.")
        repo.lfs[oid] = body
        return Response(headers={"ETag": f'"{oid}"'})

    def _lfs_verify(self, repo: Repo, asked: dict) -> Response:
        if len(repo.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "Object not found")
        return Response({})

    def _commit(self, repo: Repo, branch: str, lines: list[dict], author: str) -> Response:
        """Apply the lines of a commit, all of them or none."""
        parent, header = repo.at(branch), lines[0]["value"]
        if branch not in repo.branches:
            raise Refusal(400, f"{branch} is not a branch.")
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines[1:]:
            value, path = line["value"], line["value"]["path"]
            match line["key"]:
                case "file":
                    files[path] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in repo.lfs:
                        raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
                    files[path] = repo.lfs[value["oid"]]
                case "deletedFile":
                    if files.pop(path, None) is None:
                        raise Refusal(404, "A file with this name doesn't exist", code="EntryNotFound")
                case "deletedFolder":
                    folder = path.rstrip("/") + "/"
                    files = {name: data for name, data in files.items() if not name.startswith(folder)}
        commit = repo.commit(branch, files, header["summary"], header.get("description", ""), author)
        url = f"{self.url}{repo.url_path}/commit/{commit.oid}"
        return Response({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})


class _Listener(ThreadingHTTPServer):
    """Accepts connections, one daemon thread each, and remembers them so that closing ends them."""

    request_queue_size = 128

    def __init__(self, hub: HubServer):
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Connection)

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def disconnect_all(self):
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the client was faster

    def handle_error(self, request, client_address):
        if not isinstance(error := sys.exception(), ConnectionError):
            self.hub.errors.append(error)


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self):
        hub = self.server.hub
        fault = hub.next_fault(self.command, self.path)
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.token = hub.tokens.get(bearer)
        body = self._read(half=bool(fault and fault.reset))
        if fault and fault.delay:
            time.sleep(fault.delay)
        if fault and fault.reset:
            return self._cut(body)
        if fault and fault.status is not None:
            response = self._failure(fault)
        elif bearer and self.token is None:
            response = Refusal(401, BAD_TOKEN).response
        else:
            response = self._respond(body)
        if fault and fault.lost:
            return self._cut(body)
        hub.requests.append(self._request(body, response.status))
        self._send(response, fault.truncate if fault else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _respond(self, body: bytes) -> Response:
        hub = self.server.hub
        try:
            with hub.lock:
                response = hub.respond(self.command, self.path, self.token, self.headers, body)
        except Refusal as refusal:
            return refusal.response
        except Exception as error:
            hub.errors.append(error)
            return Refusal(500, f"{type(error).__name__} in the server: {error}").response
        if response is None:
            hub.unknown.append(self._request(body, 404))
            return Refusal(404, "Not Found").response
        return response

    def _failure(self, fault: Fault) -> Response:
        usual = {401: BAD_TOKEN, 403: "Authorization error."}
        message = fault.message or usual.get(fault.status) or HTTPStatus(fault.status).phrase
        headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
        return Refusal(fault.status, message, **headers).response

    def _read(self, half: bool) -> bytes:
        """The request's body, or half of it; ConnectionError if the client dies in the middle."""
        size = int(self.headers.get("Content-Length", 0))
        size = size // 2 if half else size
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("The client hung up in the middle of a body.")
        return body

    def _cut(self, body: bytes):
        """End the connection as a fallen network does: a reset, with no answer and no orderly close."""
        self.server.hub.requests.append(self._request(body, 0))
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # the socket closes, and so resets, only when nothing reads from it any more
        self.connection.close()

    def _send(self, response: Response, truncate: int | None):
        body = response.body if isinstance(response.body, bytes) else json.dumps(response.body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **response.headers}
        self.send_response(response.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:truncate])
        self.close_connection |= truncate is not None

    def _request(self, body: bytes, status: int) -> Request:
        return Request(self.command, self.path, len(body), status, self.token and self.token.user)

    def log_message(self, *_):
        pass  # requests are kept in HubServer.requests, stderr stays the test's


@pytest.fixture
def hub():
    """A running HubServer; fails the test if the server itself met an error."""
    with HubServer() as server:
        yield server
    assert not server.errors, server.errors
