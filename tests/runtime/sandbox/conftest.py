"""Bundles as a hostile author makes them: whole, with every hash right."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from pastkey.contract import names
from pastkey.errors import LimitWarning
from pastkey.files.durable import write_json
from pastkey.files.folder import file_records
from pastkey.runtime.sandbox import process
from pastkey.runtime.sandbox.limits import Limits

from ...onnx_text import encode_model, field, nodes, values
from ..conftest import tiny_graph

SMALL = Limits(memory=400_000_000, seconds=1.0)  # the tiny decoder loads in a tenth of it
EASY = Limits(memory=400_000_000, seconds=60.0)

Hostile = Callable[[str], Path]

_START = "start = Identity(logits_start)\n"


def _loop() -> tuple[str, bytes]:
    """2**62 iterations, on whose outcome the logits depend."""
    inner = "int64 i, int64[1] before"
    body = b"".join(field(1, node) for node in nodes("going = Identity(go)\n after = Sub(before, before)\n"))
    body += field(2, "body") + field(11, next(values("int64 i")))
    condition = field(1, "go") + field(2, field(1, field(1, 9) + field(2, b"")))  # BOOL
    body += field(11, condition) + field(11, list(values(inner))[1])
    body += field(12, field(1, "going") + field(2, field(1, field(1, 9) + field(2, b"")))) + field(
        12, next(values("int64[1] after"))
    )
    attribute = field(1, "body") + field(6, body) + field(20, 5)  # GRAPH
    loop = b"".join(field(1, name) for name in ("turns", "yes", "logits_start")) + field(2, "turned")
    loop += field(4, "Loop") + field(5, attribute)
    constants = "one1 = Constant <value_int = 1> ()\n yes = Cast <to = 9> (one1)\n"
    constants += f"turns = Constant <value_int = {2**62}> ()\n"
    return "start = Mul(turned, turned)\n", b"".join(field(1, node) for node in nodes(constants)) + field(1, loop)


def _large_constant() -> tuple[str, bytes]:
    """3 GB and as much again, folded when the graph is loaded."""
    text = "sizes = Constant <value_ints = [3, 268435456]> ()\n zero = Constant <value_float = 0.0> ()\n"
    text += "large = Expand(zero, sizes)\n less = Neg(large)\n"
    text += "least = ReduceMax <keepdims = 0> (less)\n nought = Cast <to = 7> (least)\n"
    return text + "start = Add(logits_start, nought)\n", b""


GRAPHS = {"a loop": _loop, "a large constant": _large_constant}


def mend(folder: Path) -> None:
    """Writes the hashes of the files as they are into the manifest."""
    manifest = json.loads((folder / names.MANIFEST).read_text())
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    manifest["files"] = file_records(folder, [file for file in files if file != names.MANIFEST])
    write_json(folder / names.MANIFEST, manifest)


@pytest.fixture(scope="session")
def talking_bundle(tiny, letters, make_bundle):
    """The tiny decoder with a tokenizer and a chat template."""
    template = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] | lower }}{% endfor %}<a>"
    return make_bundle(tiny, "fused", tokenizer=letters, tokenizer_config={"chat_template": template})


@pytest.fixture
def hostile(talking_bundle, tiny, tmp_path):
    """hostile(GRAPH): a bundle with this graph; hostile("") one to be changed and mended."""

    def make(kind: str) -> Path:
        folder = tmp_path / "hostile"
        shutil.copytree(talking_bundle.path, folder)
        if kind:
            start, first = GRAPHS[kind]()
            text = tiny_graph(tiny, "fused", last_only=True)
            assert _START in text
            model, _ = encode_model(text.replace(_START, start), tiny.weights, first=first)
            (folder / names.LAST_LOGITS_GRAPH).write_bytes(model)
            mend(folder)
        return folder

    return make


def hooked(hook: str) -> str:
    """The boot of a process that runs this first."""
    return process.BOOT.replace("; ", "\n").replace("from pastkey", hook + "from pastkey", 1)


@pytest.fixture
def acting(monkeypatch):
    """acting(PROGRAM): under its limits the process runs this in place of what it was asked for.

    `raw` writes bytes where frames are expected, and `frame` a frame of any kind.
    """

    def act(program: str) -> None:
        act = f"""
import pastkey.runtime.sandbox.child as c
def run(arguments):
    import json, os, signal, socket, subprocess, sys, time
    frames = sys.stdout.buffer.raw._frames
    frame, raw = frames.write, lambda content: (frames._target.write(content), frames._target.flush())
    exec({program!r}, {{**globals(), **locals()}})
    return 0
c.function_of = lambda name: run
"""
        monkeypatch.setattr(process, "BOOT", hooked(act))

    return act


@pytest.fixture(autouse=True)
def no_warning_of_a_limit():
    """Wherever this is: a system may lack limits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LimitWarning)
        yield


def has_ended(pid: int) -> bool:
    """Whether a process is gone within a minute."""
    until, state = time.monotonic() + 60, Path(f"/proc/{pid}/stat")
    while time.monotonic() < until:
        try:
            if state.read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False
