"""Runs graphs of the native operators, each level of the kernels in a separate process.

As a program: `python running.py FOLDER LIBRARY` runs the cases there, see `run_at`.
"""

from __future__ import annotations

import os
import pickle
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
ARM_LEVELS = ("neon", "dotprod", "i8mm")
LEVELS = ("portable", "avx2", "avx_vnni", "avx512", "amx", *ARM_LEVELS)
ON_ARM = platform.machine().lower() in ("aarch64", "arm64")


@dataclass(frozen=True)
class Case:
    """A graph, and what it is run with: the rows of `feeds`, one after the other."""

    model: bytes
    feeds: Sequence[Mapping[str, Array]]
    threads: int = 1
    in_place: Mapping[str, str] = field(default_factory=dict)  # outputs in the buffers of inputs, which are copied


@dataclass
class Outcome:
    """The outputs of each of a case's feeds, or the message of the error that opening or a run raised."""

    outputs: list[list[Array]] = field(default_factory=list)
    error: str = ""


def run_at(level: str, cases: Sequence[Case], folder: Path) -> list[Outcome] | None:
    """The outcomes at a level; None where this machine does not have it."""
    folder.mkdir(parents=True, exist_ok=True)
    python, library, more = machine(level)
    given = [(case.model, list(case.feeds), case.threads, dict(case.in_place)) for case in cases]
    (folder / "cases").write_bytes(pickle.dumps(given))
    environment = {**os.environ, "PASTKEY_KERNELS": level, "ORT_DISABLE_TELEMETRY": "1", **more}
    done = subprocess.run(
        [*python, __file__, str(folder), library], env=environment, capture_output=True, text=True, timeout=3600
    )
    if level in LEVELS and f"PASTKEY_KERNELS is {level}, " in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    return [Outcome(*outcome) for outcome in pickle.loads((folder / "outcomes").read_bytes())]


def machine(level: str) -> tuple[Sequence[str], str, dict[str, str]]:
    """A level's Python, library and environment. Elsewhere than on ARM, its levels are emulated."""
    if level in ARM_LEVELS and not ON_ARM:
        from .emulation import emulated

        return emulated()
    if library := os.environ.get("PASTKEY_SANITIZED"):  # `make sanitize`
        named = ["c++", "-print-file-name=libasan.so"]
        first = subprocess.run(named, capture_output=True, text=True, check=True).stdout.strip()
        # Python and onnxruntime keep memory to their end. GCC does not align 64 bytes on the stack that it keeps to see
        # a use after a return (bug 110027). A library that throws needs its own C++ library loaded.
        options = "detect_leaks=0:detect_stack_use_after_return=0"
        return [sys.executable], library, {"LD_PRELOAD": f"{first} libstdc++.so.6", "ASAN_OPTIONS": options}
    from pastkey_kernels import library_path

    return [sys.executable], library_path(), {}


def bound_run(session: Any, feed: Mapping[str, Array], in_place: Mapping[str, str]) -> list[Array]:
    import onnxruntime as ort

    binding = session.io_binding()
    values = {name: ort.OrtValue.ortvalue_from_numpy(array.copy()) for name, array in feed.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        if output.name in in_place:
            binding.bind_ortvalue_output(output.name, values[in_place[output.name]])
        else:
            binding.bind_output(output.name)
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        for name in in_place.values():
            if name in values and values[name].numpy().tobytes() != feed[name].tobytes():
                raise RuntimeError(f"{name} has changed") from error
        raise
    return [np.array(value.numpy()) for value in binding.get_outputs()]


def main(folder: Path, library: str) -> None:
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    outcomes = []
    for model, feeds, threads, in_place in pickle.loads((folder / "cases").read_bytes()):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.register_custom_ops_library(library)
        outcome = Outcome()
        try:
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            for feed in feeds:
                outcome.outputs.append(bound_run(session, feed, in_place) if in_place else session.run(None, feed))
        except Exception as error:
            outcome.error = str(error)
        outcomes.append((outcome.outputs, outcome.error))
    (folder / "outcomes").write_bytes(pickle.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
