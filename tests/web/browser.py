"""The page in headless Chromium, and the server that it gets everything from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
Files = Mapping[str, Path | bytes]


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *arguments: Any, files: Files, headers: Mapping[str, str]) -> None:
        self._files, self._headers = files, headers
        super().__init__(*arguments)

    def send_head(self) -> BinaryIO | None:
        name = self.path.partition("?")[0].lstrip("/") or "index.html"
        content = self._files.get(name)
        if content is None:
            self.send_error(404)
            return None
        content = content if isinstance(content, bytes) else content.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(name))
        self.send_header("Content-Length", str(len(content)))
        for header in self._headers.items():
            self.send_header(*header)
        self.end_headers()
        return BytesIO(content)

    def log_message(self, *_: Any) -> None:
        """Says nothing: a test's output is its failures."""


@contextmanager
def serving(files: Files, headers: Mapping[str, str] | None = None) -> Iterator[tuple[str, Callable[[], None]]]:
    """Serves a site: yields its address, and what ends the server before the block does."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, files=files, headers=headers or {}))
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
