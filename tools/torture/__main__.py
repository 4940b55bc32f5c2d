"""Interrupts commands: by SIGKILL at random moments, and by a disk that fails at each call that changes it.

A nursery is a process that has imported everything. It forks a child for each command, so that a thousand commands need
minutes. `Nursery.run` gets the arguments of the pastkey command, or a function by its name, and the fault. The caller
then checks the disk.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
KILL = 0
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS}


@dataclass(frozen=True)
class Fault:
    """A fault at the call of this number among those that change the disk below a folder."""

    below: str
    call: int  # from 1; 0: no fault, and the calls are counted
    error: int = KILL
    once: bool = True  # or at every call from then on


@dataclass(frozen=True)
class Outcome:
    """The end of a command."""

    status: int  # negative: the signal's number
    said: str  # on standard error
    calls: int  # that changed the disk, if a Fault counted them and the process was not killed
    seconds: float

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class Nursery:
    """Runs one command at a time, each in its own process."""

    def __init__(self, folder: Path, imports: Sequence[str], *, library: Path | None = None) -> None:
        self._folder = folder
        environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
        if library is not None:
            environment["LD_PRELOAD"] = str(library)
        command = [sys.executable, "-m", "tools.torture", *imports]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        self._answer()

    def run(
        self, *command: object, function: str | None = None, kill_after: float | None = None, fault: Fault | None = None
    ) -> Outcome:
        """Runs `pastkey COMMAND`, or `module:function` with these texts; kills it after `kill_after` seconds."""
        request: dict[str, object] = {"command": [*map(str, command)], "function": function, "kill_after": kill_after}
        request["fault"] = None if fault is None else asdict(fault)
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Outcome(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the nursery died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=60)


def build_faults(folder: Path) -> Path | None:
    """Returns the library that injects faults, or None if it cannot be built."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        return None
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    command: list[str | Path] = [compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"]
    return library if subprocess.run(command, capture_output=True, check=False).returncode == 0 else None


# --- in the nursery -----------------------------------------------------------------------------------------------
def serve(imports: Sequence[str]) -> None:
    for module in imports:
        importlib.import_module(module)
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(_one(json.loads(line))), flush=True)


def _one(request: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as counted:
        child = os.fork()
        if child == 0:
            _be_the_command(request, said.fileno(), counted.fileno())
        if request["kill_after"] is not None:
            time.sleep(request["kill_after"])
            os.kill(child, signal.SIGKILL)  # it is not reaped yet, so that no other process has its id
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seconds = time.monotonic() - started
        said.seek(0)
        counted.seek(0)
        return {"status": status, "said": said.read(), "calls": int(counted.read() or 0), "seconds": seconds}


def _be_the_command(request: dict[str, Any], said: int, counted: int) -> None:
    status = 1
    try:
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        library = None
        if request["fault"]:
            library = ctypes.CDLL(None)
            fault = Fault(**request["fault"])
            library.faults_arm(os.fsencode(fault.below), ctypes.c_long(fault.call), fault.error, int(fault.once))
        status = _run(request["function"], request["command"])
        if library is not None:
            os.write(counted, str(library.faults_calls()).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _run(function: str | None, command: list[str]) -> int:
    if function is None:
        from pastkey.__main__ import main

        try:
            return main(command)
        except SystemExit as end:
            return int(end.code or 0)
    module, _, name = function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(*command)
    except OSError as error:  # main prints these as a sentence
        print(error, file=sys.stderr)
        return 2
    return 0


# --- functions that are interrupted ---------------------------------------------------------------------------------
def write_bundle(source: str, out: str) -> None:
    """Writes to the disk as the end of an export does, without computing anything."""
    from pastkey.contract import names
    from pastkey.files.durable import whole_folder, write_json
    from pastkey.files.folder import file_records, read_json

    with whole_folder(Path(out), force=True) as work:
        for file in sorted(Path(source).rglob("*")):
            if file.is_file() and file.name != names.MANIFEST:
                made = work / file.relative_to(source)
                made.parent.mkdir(parents=True, exist_ok=True)
                made.write_bytes(file.read_bytes())
        manifest = read_json(Path(source) / names.MANIFEST)
        files = file_records(work, manifest["files"])
        write_json(work / names.MANIFEST, manifest | {"files": files})


def save_a_session(bundle: str, file: str, tokens: str) -> None:
    from pastkey.runtime import load

    with load(bundle, threads=1) as model, model.session() as session:
        session.append([token % 20 for token in range(int(tokens))])
        session.save(file)


if __name__ == "__main__":
    serve(sys.argv[1:])
