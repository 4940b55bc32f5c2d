"""A small Hugging Face Hub on 127.0.0.1: what huggingface_hub asks of the real one to fetch a model."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

Files = dict[str, bytes]


@dataclass
class Repository:
    name: str
    commits: list[Files]  # the last one is main
    gated: bool = False
    token: str | None = None  # the one that may read it

    def sha(self, number: int = -1) -> str:
        return hashlib.sha1(f"{self.name} {number % len(self.commits)}".encode()).hexdigest()

    def commit(self, revision: str) -> tuple[str, Files] | None:
        known = {self.sha(number): files for number, files in enumerate(self.commits)}
        sha = self.sha() if revision == "main" else revision
        return (sha, known[sha]) if sha in known else None


@dataclass
class LoopbackHub:
    """`serving` starts one."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # "GET /a/b/resolve/...", in order
    agents: set[str] = field(default_factory=set)  # the User-Agent lines
    ranges: list[str] = field(default_factory=list)
    before: Callable[[str], None] = lambda asked: None  # is called with each request
    breaks: int = 0  # how many of the next downloads of weights end in the middle
    status: int | None = None  # answered to everything

    @property
    def elsewhere(self) -> str:
        """The same server by another name: the real one keeps large files on other hosts."""
        return self.address.replace("127.0.0.1", "localhost")

    def add(self, name: str, files: Mapping[str, bytes] | Path, **options: Any) -> Repository:
        content = dict(files) if not isinstance(files, Path) else read_files(files)
        self.repositories[name] = Repository(name, [content], **options)
        return self.repositories[name]

    def environment(self, home: Path) -> dict[str, str]:
        """The variables of a process that uses this as the Hub, with a separate home."""
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(home / "huggingface"), "HOME": str(home)}
        own |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
        return own | {"XDG_CACHE_HOME": str(home / "cache")}


def read_files(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def serving() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def without_hub(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """An environment without settings of Hugging Face."""
    others = ("HF_", "HUGGING", "TRANSFORMERS")
    return {name: value for name, value in environment.items() if not name.startswith(others)}


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        self.hub.agents.add(self.headers.get("User-Agent", ""))
        self.hub.before(path)
        if self.hub.status is not None:
            self._send(self.hub.status)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._about(found[1], found[2], found[3] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/blobs/(\w+)", path):
            self._blob(found[1])
        else:
            self._send(404)

    do_HEAD = do_GET  # noqa: N815

    def _commit(self, name: str, revision: str, *, file: bool) -> tuple[str, Files] | None:
        """The commit; answers the request itself where there is none."""
        repository = self.hub.repositories.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is not None and token and repository.token != token:
            self._send(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repository is None or (repository.token and not repository.gated and not token):
            self._send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif file and repository.gated and token != repository.token:
            self._send(403 if token else 401, {"X-Error-Code": "GatedRepo"})
        elif (found := repository.commit(revision)) is None:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return found
        return None

    def _about(self, name: str, what: str | None, revision: str) -> None:
        found = self._commit(name, revision, file=False)
        if found is None:
            return
        sha, files = found
        if what == "tree":
            known = {path: {"size": len(data), "oid": hashlib.sha1(data).hexdigest()} for path, data in files.items()}
            content: Any = [{"type": "file", "path": path, **facts} for path, facts in known.items()]
        else:
            siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
            content = {"id": name, "_id": "0", "sha": sha, "siblings": siblings, "private": False, "tags": []}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _file(self, name: str, revision: str, path: str) -> None:
        found = self._commit(name, revision, file=True)
        if found is None:
            return
        sha, files = found
        if path not in files:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        data = files[path]
        digest = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": sha}
        if path.endswith((".safetensors", "_data", ".onnx")):  # in LFS
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            self._send(302, headers | linked | {"Location": f"{self.hub.elsewhere}/blobs/{digest}"})
        else:
            self._send(200, headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data)

    def _blob(self, digest: str) -> None:
        stored = (data for each in self.hub.repositories.values() for files in each.commits for data in files.values())
        data = next(data for data in stored if hashlib.sha256(data).hexdigest() == digest)
        begin = 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            begin = int(found[1])
            self.hub.ranges.append(found[0])
        headers = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}
        upto = None
        if self.command == "GET" and self.hub.breaks:
            self.hub.breaks -= 1
            upto = (len(data) - begin) // 2
        self._send(206 if begin else 200, headers, data[begin:], upto)

    def _send(
        self, status: int, headers: Mapping[str, str] = MappingProxyType({}), data: bytes = b"", upto: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):  # the reader was interrupted
                self.wfile.write(data[:upto])
        if upto is not None:
            self.close_connection = True
