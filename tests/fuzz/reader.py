"""One reader as a function of the bytes of one file, and the place where files for it are written."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pastkey.contract import names
from pastkey.errors import PastkeyError

from .mutations import Mutation


@dataclass(frozen=True)
class Target:
    """A reader."""

    read: Callable[[bytes], object]
    valid: Callable[[], bytes]  # a file that it accepts
    mutate: Mutation


def alone(file: str, read: Callable[[Path], object], valid: bytes, mutate: Mutation) -> Target:
    """A reader of one file."""
    return Target(lambda content: read(written(file, content)), lambda: valid, mutate)


def within(folder: Callable[[], Path], file: str, read: Callable[[Path], object], mutate: Mutation) -> Target:
    """A reader of a folder, in one file of which the bytes are."""

    def read_changed(content: bytes) -> object:
        with changed(folder(), file, content):
            return read(folder())

    return Target(read_changed, lambda: (folder() / file).read_bytes(), mutate)


@functools.cache
def workplace() -> Path:
    """A folder of this process, removed at its end."""
    folder = tempfile.TemporaryDirectory(prefix="pastkey-fuzz-")
    _kept.append(folder)
    os.environ["XDG_CACHE_HOME"] = os.devnull  # nothing is remembered, so that every input is hashed
    return Path(folder.name)


_kept: list[Any] = []


def written(name: str, content: bytes) -> Path:
    file = workplace() / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return file


def json_bytes(value: object) -> bytes:
    return json.dumps(value).encode()


@contextlib.contextmanager
def changed(folder: Path, file: str, content: bytes) -> Iterator[None]:
    """The folder with this content in one file, which its manifest lists so, if it has another one."""
    manifest = folder / names.MANIFEST
    before = {path: path.read_bytes() for path in (folder / file, manifest) if path.exists()}
    try:
        (folder / file).write_bytes(content)
        if manifest in before and file != names.MANIFEST:
            listed = json.loads(before[manifest])
            for records in (listed["files"], listed.get("training", {}).get("files", {})):
                if file in records:
                    records[file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            manifest.write_text(json.dumps(listed))
        yield
    finally:
        for path, whole in before.items():
            path.write_bytes(whole)


# --- one input: a value or a sentence is well, and all else is a finding ----------------------------------------------
MOST_SECONDS = 2.0  # of processor time, for files below 1 MB


@dataclass(frozen=True)
class Outcome:
    """The outcome of one input: "value", "sentence", "traceback" or "slow"."""

    kind: str
    told: str = ""

    @property
    def well(self) -> bool:
        return self.kind in ("value", "sentence")


def input_of(target: Target, seed: int) -> bytes:
    """The input of a seed, always the same."""
    rng = random.Random(seed)
    return target.mutate(rng, target.valid())


def outcome(target: Target, content: bytes) -> Outcome:
    """Reads `content`. The reader's output is dropped."""
    started = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            target.read(content)
        found = Outcome("value")
    except PastkeyError as error:
        sentence = str(error)
        found = Outcome("sentence", sentence)
        printed = sentence.encode(errors="replace").decode()
        if not sentence.strip() or len(sentence) > 4000 or printed != sentence:
            found = Outcome("traceback", f"no sentence: {sentence!r:.200}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        found = Outcome("traceback", "".join(traceback.format_exception(error))[-3000:])
    seconds = time.process_time() - started
    if found.well and seconds > MOST_SECONDS:
        return Outcome("slow", f"{seconds:.1f} s of processor time, then: {found.told}")
    return found
