"""Bundles as a hostile author makes them: whole, with every hash right; and hijacked processes."""

import json
import shutil
import warnings

import pytest

from pastkey.contract import names
from pastkey.errors import LimitWarning
from pastkey.files.durable import write_json
from pastkey.files.folder import file_records
from pastkey.runtime.sandbox import process
from pastkey.runtime.sandbox.limits import Limits

EASY = Limits(memory=400_000_000, seconds=60.0)


@pytest.fixture(scope="session")
def talking_bundle(tiny, letters, make_bundle):
    """The tiny decoder with a tokenizer and a chat template."""
    template = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] | lower }}{% endfor %}<a>"
    return make_bundle(tiny, "fused", tokenizer=letters, tokenizer_config={"chat_template": template})


@pytest.fixture
def hostile(talking_bundle, tmp_path):
    """hostile(NAME, CONTENT): the bundle with this file in it, and its hash in the manifest."""

    def make(name, content):
        folder = shutil.copytree(talking_bundle.path, tmp_path / "hostile")
        (folder / name).write_bytes(content)
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        manifest = json.loads((folder / names.MANIFEST).read_text())
        records = file_records(folder, [file for file in files if file != names.MANIFEST])
        write_json(folder / names.MANIFEST, manifest | {"files": records})
        return folder

    return make


def hooked(hook):
    """The boot of a process that runs this first."""
    return process.BOOT.replace("; ", "\n").replace("from pastkey", hook + "from pastkey", 1)


@pytest.fixture
def acting(monkeypatch):
    """acting(PROGRAM): under its limits the process runs this instead of its request.

    `raw` writes bytes where frames are expected, and `frame` a frame of any kind.
    """

    def act(program):
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
