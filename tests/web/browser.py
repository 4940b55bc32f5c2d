"""Pages in headless Chromium, and the server that they get everything from."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from queue import Queue
from typing import Any, BinaryIO

ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
# The page may fetch from this server alone; transformers.js makes workers and modules of blobs.
CONFINED = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'wasm-unsafe-eval' blob:"}
FLAGS = (
    "--headless",
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)
Files = Mapping[str, Path | bytes]  # by the path of their address; a folder serves what is in it
Posted = Queue[tuple[str, Any]]


class _Handler(SimpleHTTPRequestHandler):
    """Serves files; what a page posts goes to a queue, with its path."""

    def __init__(self, *arguments: Any, files: Files, headers: Mapping[str, str], posted: Posted) -> None:
        self._files, self._headers, self._posted = files, headers, posted
        super().__init__(*arguments)

    def send_head(self) -> BinaryIO | None:
        name = self.path.partition("?")[0].lstrip("/") or "index.html"
        content = _content(self._files, name)
        if content is None:
            self.send_error(404)
            return None
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(name))
        self.send_header("Content-Length", str(len(content)))
        for header in self._headers.items():
            self.send_header(*header)
        self.end_headers()
        return BytesIO(content)

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self._posted.put((self.path, content))

    def log_message(self, *_: Any) -> None:
        """Says nothing: a test's output is its failures."""


def _content(files: Files, name: str) -> bytes | None:
    for known, place in files.items():
        if name == known:
            return place if isinstance(place, bytes) else place.read_bytes()
        if isinstance(place, Path) and name.startswith(f"{known}/"):
            file = place / name.removeprefix(f"{known}/")
            return file.read_bytes() if file.is_file() else None
    return None


@contextmanager
def serving(
    files: Files, headers: Mapping[str, str] | None = None, posted: Posted | None = None
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Serves a site on loopback: yields its address, and what ends the server before the block does."""
    handler = partial(_Handler, files=files, headers=headers or {}, posted=posted or Queue())
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ended = threading.Event()

    def end() -> None:
        if not ended.is_set():
            ended.set()
            server.shutdown()
            server.server_close()

    try:
        yield f"http://127.0.0.1:{server.server_port}/", end
    finally:
        end()


def visit(
    chromium: str, page: str, files: Files, *, flags: Sequence[str] = (), seconds: float = 120
) -> tuple[str, Any]:
    """Opens `page` and waits for its first POST: the path, and the content. Raises queue.Empty after `seconds`.

    Nothing but 127.0.0.1 is reached.
    """
    posted: Posted = Queue()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        serving(files, CONFINED, posted) as (address, _),
    ):
        command = [chromium, *FLAGS, *flags, f"--user-data-dir={profile}", address + page]
        home = os.environ | {"HOME": profile, "XDG_CONFIG_HOME": profile}  # its crash reporter writes there
        quiet = subprocess.DEVNULL
        with subprocess.Popen(command, stdout=quiet, stderr=quiet, env=home) as browser:
            try:
                return posted.get(timeout=seconds)
            finally:
                browser.terminate()
                browser.wait()
