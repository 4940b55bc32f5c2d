"""A page in headless Chromium, and the server that it gets everything from."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

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
# The page may fetch from this server alone; transformers.js makes workers and modules of blobs.
_POLICY = "default-src 'self' 'unsafe-inline' 'wasm-unsafe-eval' blob:"


class _Handler(SimpleHTTPRequestHandler):
    """Serves files by the beginning of their path; what the page posts goes to a queue, with its path."""

    def __init__(self, *arguments: Any, places: Mapping[str, Path], posted: Queue[tuple[str, Any]]) -> None:
        self._places, self._posted = places, posted
        super().__init__(*arguments)

    def translate_path(self, path: str) -> str:
        path = path.partition("?")[0]
        for prefix, place in self._places.items():
            if path.startswith(prefix):
                return f"{place}{path[len(prefix) :]}"
        return ""  # which is no file

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", _POLICY)
        super().end_headers()

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self._posted.put((self.path, content))

    def log_message(self, *_: Any) -> None:
        """Says nothing: a test's output is its failures."""


def visit(
    chromium: str, page: str, places: Mapping[str, Path], *, flags: Sequence[str] = (), seconds: float = 120
) -> tuple[str, Any]:
    """Opens `page` and waits for its first POST: the path, and the content. Raises queue.Empty after `seconds`.

    `places` maps the beginning of an address's path to a file or folder; the first that fits counts. Nothing but
    127.0.0.1 is reached.
    """
    posted: Queue[tuple[str, Any]] = Queue()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, places=places, posted=posted)) as server,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}{page}"
        command = [chromium, *FLAGS, *flags, f"--user-data-dir={profile}", address]
        home = os.environ | {"HOME": profile, "XDG_CONFIG_HOME": profile}  # its crash reporter writes there
        quiet = subprocess.DEVNULL
        with subprocess.Popen(command, stdout=quiet, stderr=quiet, env=home) as browser:
            try:
                return posted.get(timeout=seconds)
            finally:
                browser.terminate()
                browser.wait()
                server.shutdown()
