"""The library's sources by a compiler of this machine: what no graph can show."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.versions import ROOT

from .emulation import emulated
from .running import ON_ARM

COMPILER = shutil.which("c++") or ""
KERNELS = ROOT / "kernels"
INCLUDES = [f"-I{KERNELS / 'csrc'}", f"-isystem{KERNELS / 'third_party'}"]

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")


def compiled(*arguments: str | Path) -> None:
    command = [COMPILER, "-std=c++17", *INCLUDES, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def sources() -> dict[str, list[str]]:
    """File -> the flags of its instruction set, of this machine's architecture."""
    text = (KERNELS / "CMakeLists.txt").read_text()
    found = {file: list[str]() for file in re.search(r"set\(SOURCES ([^)]*)\)", text)[1].split()}
    for flags, files in re.findall(r'level_sources\(\w+ "[^"]*" "([^"]*)" "[^"]*"\s+([^)]*)\)', text):
        if ("-mavx2" in flags or "-mavx512f" in flags) != ON_ARM:
            found |= {file: flags.split(";") if flags else [] for file in files.split()}
    return found


SOURCES = sources()
OF_NO_LEVEL = [f"csrc/{name}.cc" for name in ("library", "levels", "draw", "matmul", "attention", "recurrence")]


@pytest.mark.slow
@pytest.mark.parametrize("file", SOURCES)
def test_a_level_shares_no_function_with_another_and_no_frame_is_too_large_for_a_thread(file, tmp_path):
    """A small thread has 128 kB. Of a weak function the linker keeps one copy, for which a processor may be too old."""
    if file not in OF_NO_LEVEL:
        compiled("-O0", *SOURCES[file], "-c", KERNELS / file, "-o", tmp_path / "object")
        symbols = subprocess.run(["nm", "-C", tmp_path / "object"], capture_output=True, text=True, check=True).stdout
        assert [line for line in symbols.splitlines() if " W " in line] == []
    flags = ["-O3", "-ffp-contract=off", *SOURCES[file], "-Werror", "-Wframe-larger-than=30720"]
    compiled(*flags, "-c", KERNELS / file, "-o", tmp_path / "object")


def test_without_memory_or_an_output_an_operator_says_so(tmp_path):
    """A std::terminate or a write to a null pointer would end the process."""
    program = tmp_path / "boundary"
    compiled(Path(__file__).with_name("boundary.cc"), "-o", program)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake"), reason="no CMake")
@pytest.mark.matrix
def test_a_program_links_the_static_library_beside_another_of_operators(tmp_path):
    configure = ["-S", str(KERNELS), "-B", str(tmp_path / "build"), "-DPASTKEY_STATIC=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    for step in (configure, ["--build", str(tmp_path / "build")],
                 ["--install", str(tmp_path / "build"), "--prefix", str(tmp_path)]):  # fmt: skip
        subprocess.run(["cmake", *step], check=True, capture_output=True)
    program = tmp_path / "program.cc"
    program.write_text("""
#include "onnxruntime_c_api.h"
#include "pastkey_kernels.h"
extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions*, const OrtApiBase*) { return nullptr; }
int main(int count, char**) {
  OrtApiBase none{[](uint32_t) noexcept -> const OrtApi* { return nullptr; }, nullptr};
  if (count > 1) PastkeyRegisterCustomOps(nullptr, &none);
  return RegisterCustomOps(nullptr, &none) ? 1 : 0;
}
""")
    compiled(program, f"-I{tmp_path / 'include'}", tmp_path / "lib/libpastkey_kernels.a", "-o", tmp_path / "program")
    subprocess.run([tmp_path / "program"], check=True)


# --- which level the library chooses on a CPU: emulated ones of ARM ---------------------------------------------------
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
