"""The library's sources by a compiler of this machine: what no graph can show."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tools.versions import ROOT

COMPILER = shutil.which("c++") or ""
KERNELS = ROOT / "kernels"
INCLUDES = [f"-I{KERNELS / 'csrc'}", f"-isystem{KERNELS / 'third_party'}"]

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")


def compiled(*arguments: str | Path) -> None:
    command = [COMPILER, "-std=c++17", *INCLUDES, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_memory_or_an_output_an_operator_says_so(tmp_path: Path) -> None:
    """A std::terminate or a write to a null pointer would end the process."""
    program = tmp_path / "boundary"
    compiled(Path(__file__).with_name("boundary.cc"), "-o", program)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
