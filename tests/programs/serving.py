"""`pastkey serve` as a process, for the programs of others that ask it, and its bundle."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pastkey.contract.bundle import Bundle

from ..runtime import tiny_decoder as decoder
from ..runtime.constraints import vocabularies
from ..tiny_bundles import byte_bundle

MODEL = "tiny"
# Every token is a byte, so that any text is read. The form of tool calls is Hermes'.
TEMPLATE = (
    "{% for t in tools or [] %}<tools>{{ t | tojson }}</tools>{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}"
    "</tool_call>{% endfor %}{{ m.content }}.{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tiny(folder: Path) -> Bundle:
    """A decoder of random weights with a chat template and hidden states."""
    config = {"chat_template": TEMPLATE, "eos_token": vocabularies.END}
    return byte_bundle(folder, [(8, 8), (16, 16)], 1000, hidden_size=decoder.E, tokenizer_config=config)


@contextmanager
def serving(bundle: Path, *flags: str, log: Path, **environment: str) -> Iterator[str]:
    """The address of a server that has loaded the bundle. It ends with status 0 at SIGTERM."""
    command = [sys.executable, "-m", "pastkey", "serve", str(bundle), "--port", "0", "--threads", "1", *flags]
    with log.open("w+", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment)
        try:
            address = _wait(process, log)
            yield address
        finally:
            process.terminate()
            status = process.wait(timeout=60)
        assert status == 0, log.read_text(encoding="utf-8")


def _wait(process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(1200):
        time.sleep(0.05)
        said = log.read_text(encoding="utf-8")
        assert process.poll() is None, said
        found = re.search(r"at (http://\S+)/v1", said)
        try:
            if found and urllib.request.urlopen(f"{found[1]}/health", timeout=5).status == 200:
                return found[1]
        except OSError:
            continue
    raise AssertionError(f"no answer after a minute: {log.read_text(encoding='utf-8')}")


def post(address: str, path: str, body: Any, **headers: str) -> Any:
    """The JSON that a route answers, or the text of a stream's events."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=120) as reply:
        text = reply.read().decode()
        return json.loads(text) if reply.headers["Content-Type"].startswith("application/json") else text
