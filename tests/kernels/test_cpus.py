"""Which level the library chooses on a CPU: emulated ones of ARM."""

from __future__ import annotations

import os
import subprocess

import pytest

from .emulation import emulated

LEVEL = """
import ctypes, sys
level = ctypes.CDLL(sys.argv[1]).pastkey_kernels_level
level.restype = ctypes.c_char_p
print(level())
"""


@pytest.mark.matrix
@pytest.mark.parametrize(("cpu", "level"), [("cortex-a53", "neon"), ("cortex-a76", "dotprod"), ("neoverse-v1", "i8mm")])
def test_the_level_is_the_highest_that_the_cpu_has(cpu, level):
    def chosen(forced: str) -> str:
        python, library, _ = emulated()
        environment = {**os.environ, "QEMU_CPU": cpu, "PASTKEY_KERNELS": forced}
        command = [*python, "-c", LEVEL, library]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert chosen("") == repr(level.encode())
    assert chosen("neon") == repr(b"neon")
    assert chosen("i8mm") == repr(b"i8mm" if level == "i8mm" else None)
