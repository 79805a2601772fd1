"""A Hugging Face Hub in a thread: as much of its HTTP API as pushing and loading models needs, and faults on request.

Written from what the client sends and expects. It keeps everything in memory, and `requests` and `uploads` say what it
was asked for and which objects were sent to it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_writer": "user", "hf_other": "other", "hf_reader": None}
LFS_BYTES = 1_000_000  # larger files go through LFS, and weights of any size
PART_BYTES = 1_000_000  # larger objects are sent in parts


class RefusedError(Exception):
    """What a request is answered with instead."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass
class File:
    content: bytes
    is_lfs: bool

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.is_lfs else self.blob_id


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.refs["main"] = self.commit({}, "initial commit")

    def commit(self, files: dict[str, File], message: str) -> str:
        self.messages.append(message)
        oid = hashlib.sha1(f"{len(self.messages)} {message}".encode()).hexdigest()
        self.commits[oid] = files
        return oid

    def resolve(self, revision: str) -> str:
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


@dataclass
class Fault:
    """What happens to the first `times` requests whose `METHOD path` matches."""

    pattern: str
    status: int | None = None  # None: the connection is cut after half of the body
    times: int = 10**9


class Hub:
    """`with Hub() as hub:` serves at `hub.url`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[str] = []
        self.uploads: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes] | None = None) -> Repository:
        """A public repository that is there already."""
        repository = self.repositories[repo_id] = Repository()
        added = {name: File(content, name.endswith(".safetensors")) for name, content in (files or {}).items()}
        repository.refs["main"] = repository.commit(added, "files")
        return repository

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return {name: file.content for name, file in repository.commits[repository.resolve(revision)].items()}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        request = f"{self.command} {unquote(url.path)}"
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next((f for f in self.hub.faults if f.times and re.match(f.pattern, request)), None)
            if fault is not None:
                fault.times -= 1
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.status is None:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        try:
            if fault is not None:
                raise RefusedError(fault.status or 500, "this is a test")
            for pattern, method in ROUTES:
                if (match := re.fullmatch(pattern, request)) is not None:
                    with self.hub.lock:
                        getattr(self, method)(*match.groups())
                    return
            raise RefusedError(404, f"no route for {request}")
        except RefusedError as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self.reply({"error": refused.message, **refused.body}, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, content: Any = b"", status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass  # `requests` has it

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    # -- who may do what ---------------------------------------------------------------------------------------------

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def repository(self, repo_id: str) -> Repository:
        user = self.user()
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and user != repo_id.split("/")[0]):
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        return repository

    def owned(self, repo_id: str) -> Repository:
        repository = self.repository(repo_id)
        if self.user() != repo_id.split("/")[0]:
            raise RefusedError(403, f"You have no write access to {repo_id}")
        return repository

    # -- routes ------------------------------------------------------------------------------------------------------

    def create(self) -> None:
        user, owner, name = self.user(), self.json["organization"], self.json["name"]
        if not self.headers.get("Authorization"):
            raise RefusedError(401, "Invalid username or password.")
        repo_id = f"{owner or user}/{name}"
        url = f"{self.hub.url}/{repo_id}"
        if user != repo_id.split("/")[0]:
            raise RefusedError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        if repo_id in self.hub.repositories:
            raise RefusedError(409, "You already created this model repo", url=url)
        self.hub.repositories[repo_id] = Repository(self.json.get("visibility") == "private")
        self.reply({"url": url, "name": repo_id})

    def validate_yaml(self) -> None:
        wrong = "license: [" in self.json["content"]
        self.reply({"errors": [{"message": '"license" must be a string'}] if wrong else []}, 400 if wrong else 200)

    def info(self, repo_id: str, revision: str | None) -> None:
        repository = self.repository(repo_id)
        oid = repository.resolve(revision or "main")
        siblings = [{"rfilename": name} for name in repository.commits[oid]]
        self.reply({"id": repo_id, "sha": oid, "private": repository.private, "siblings": siblings})

    def tree(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id)
        entries = []
        for name, file in repository.commits[repository.resolve(revision)].items():
            lfs = {"oid": file.etag, "size": len(file.content), "pointerSize": 134}
            entry = {"type": "file", "path": name, "size": len(file.content), "oid": file.blob_id}
            entries.append(entry | ({"lfs": lfs} if file.is_lfs else {}))
        self.reply(entries)

    def branch(self, repo_id: str, name: str) -> None:
        repository = self.owned(repo_id)
        if name in repository.refs:
            raise RefusedError(409, "Reference already exists")
        repository.refs[name] = repository.refs["main"]
        self.reply({})

    def discuss(self, repo_id: str) -> None:
        repository = self.repository(repo_id)
        if self.user() is None:
            raise RefusedError(403, "You need to be logged in")
        number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
        repository.refs[f"refs/pr/{number}"] = repository.refs["main"]
        self.reply({"num": number})

    def discussion(self, repo_id: str, number: str) -> None:
        what = {"num": int(number), "title": "title", "status": "draft", "createdAt": "2026-01-01T00:00:00.000Z"}
        what |= {"repo": {"name": repo_id, "type": "model"}, "author": {"name": "user"}, "events": []}
        pull_request = {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "diff": ""}
        self.reply({**what, "isPullRequest": True, **pull_request})

    def preupload(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id) if revision.startswith("refs/pr/") else self.owned(repo_id)
        there = repository.commits[repository.resolve(revision)]
        answers = []
        for file in self.json["files"]:
            path = file["path"]
            mode = "lfs" if file["size"] > LFS_BYTES or path.endswith(".safetensors") else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": path == "ignored.txt"}
            answers.append(answer | ({"oid": there[path].etag} if path in there else {}))
        self.reply({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self.repository(repo_id)
        objects = []
        for wanted in self.json["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}"}
            if size > PART_BYTES:
                number = -(-size // PART_BYTES)
                upload["header"] = {str(n): f"{self.hub.url}/lfs/{oid}/{n}" for n in range(1, number + 1)}
                upload["header"]["chunk_size"] = str(PART_BYTES)
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/{oid}/verify"}}
            objects.append(wanted if oid in self.hub.objects else wanted | {"actions": actions})
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        self.keep(oid, self.body)
        self.reply()

    def lfs_put_part(self, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = self.body
        self.reply(headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_complete(self, oid: str) -> None:
        self.keep(oid, b"".join(self.hub.parts[oid, part["partNumber"]] for part in self.json["parts"]))
        self.reply({})

    def keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusedError(400, "content and oid differ")
        self.hub.uploads[oid] += 1
        self.hub.objects[oid] = content

    def lfs_verify(self, oid: str) -> None:
        if len(self.hub.objects.get(oid, b"")) != self.json["size"]:
            raise RefusedError(404, "object not found")
        self.reply({})

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id) if revision.startswith("refs/pr/") else self.owned(repo_id)
        files = dict(repository.commits[repository.resolve(revision)])
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        if self.query.get("create_pr"):
            revision = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repository.refs)}"
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
            elif operation["key"] == "lfsFile" and value["oid"] in self.hub.objects:
                files[value["path"]] = File(self.hub.objects[value["oid"]], is_lfs=True)
            else:
                raise RefusedError(400, f"cannot commit {operation['key']} {value['path']}")
        oid = repository.commit(files, header["value"]["summary"])
        repository.refs[revision] = oid
        url = f"{self.hub.url}/{repo_id}"
        self.reply({"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "pullRequestUrl": f"{url}/discussions/1"})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.repository(repo_id)
        oid = repository.resolve(revision)
        file = repository.commits[oid].get(path)
        if file is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        self.reply(file.content, headers=headers)


ID = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST /api/repos/create", "create"),
    ("POST /api/validate-yaml", "validate_yaml"),
    (f"GET /api/models/{ID}(?:/revision/(.+))?", "info"),
    (f"GET /api/models/{ID}/tree/(refs/pr/\\d+|[^/]+)/?", "tree"),
    (f"POST /api/models/{ID}/branch/(.+)", "branch"),
    (f"POST /api/models/{ID}/discussions", "discuss"),
    (f"GET /api/models/{ID}/discussions/(\\d+)", "discussion"),
    (f"POST /api/models/{ID}/preupload/(.+)", "preupload"),
    (f"POST /api/models/{ID}/commit/(.+)", "commit"),
    (f"POST /{ID}\\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/(\w+)", "lfs_put"),
    (r"PUT /lfs/(\w+)/(\d+)", "lfs_put_part"),
    (r"POST /lfs/(\w+)", "lfs_complete"),
    (r"POST /lfs/(\w+)/verify", "lfs_verify"),
    (f"(?:GET|HEAD) /{ID}/resolve/(refs/pr/\\d+|[^/]+)/(.+)", "resolve"),
]
