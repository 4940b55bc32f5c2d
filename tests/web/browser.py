"""Pages in headless Chromium, and the server that they get everything from."""

import json
import os
import subprocess
import tempfile
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from queue import Queue

ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
# The page may fetch only from this server; transformers.js makes workers and modules of blobs.
CONFINED = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'wasm-unsafe-eval' blob:"}
FLAGS = (  # root cannot have a sandbox
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)  # fmt: skip


class _Handler(SimpleHTTPRequestHandler):
    """Serves files; what a page posts goes to a queue, with its path."""

    def __init__(self, *arguments, files, headers, posted):
        self._files, self._headers, self._posted = files, headers, posted
        super().__init__(*arguments)

    def send_head(self):
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

    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self._posted.put((self.path, content))

    def log_message(self, *_):
        """Says nothing: a test's output is its failures."""


def _content(files, name):
    for known, place in files.items():
        if name == known:
            return place if isinstance(place, bytes) else place.read_bytes()
        if isinstance(place, Path) and name.startswith(f"{known}/"):
            file = place / name.removeprefix(f"{known}/")
            return file.read_bytes() if file.is_file() else None
    return None


@contextmanager
def serving(files, headers=None, posted=None):
    """Serves a site on loopback: yields its address, and what ends the server before the block does.

    `files`: path of the address -> a file, its content, or a folder of files. `posted` gets what pages post.
    """
    handler = partial(_Handler, files=files, headers=headers or {}, posted=posted or Queue())
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def end():
        server.shutdown()
        server.server_close()

    try:
        yield f"http://127.0.0.1:{server.server_port}/", end
    finally:
        end()


def visit(chromium, page, files, *, flags=(), seconds=120):
    """Opens `page` and waits for its first POST: the path, and the content. Raises queue.Empty after `seconds`.

    Nothing but 127.0.0.1 is reached.
    """
    posted = Queue[tuple[str, object]]()
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
