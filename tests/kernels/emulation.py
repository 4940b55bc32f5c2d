"""The kernels for 64-bit ARM, cross-built and emulated: by Debian's compiler, its Python for arm64, and qemu."""

from __future__ import annotations

import functools
import shutil
import subprocess

import onnxruntime
import pytest
from filelock import FileLock

from tools import aarch64
from tools.versions import ROOT

COMPILER = "aarch64-linux-gnu-g++"
PLACE = ROOT / ".environments" / "aarch64-kernels"
CMAKE = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}")


@functools.cache
def emulated() -> tuple[tuple[str, ...], str, dict[str, str]]:
    """The command of an emulated Python, the library for it, and what its environment has besides. Or skips."""
    for program in ("apt-get", "cmake", COMPILER):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing: the kernels for ARM are cross-built and emulated on Debian")
    packages, build = PLACE / f"onnxruntime-{onnxruntime.__version__}", PLACE / "build"
    PLACE.mkdir(parents=True, exist_ok=True)
    with FileLock(PLACE / "lock"):
        aarch64.fetch_system()
        if not (packages / "installed").exists():
            aarch64.install(packages, f"onnxruntime=={onnxruntime.__version__}", "numpy")
            (packages / "installed").touch()
        for command in (["-S", str(ROOT / "kernels"), "-B", str(build), *CMAKE], ["--build", str(build)]):
            subprocess.run(["cmake", *command], check=True, capture_output=True)
    return aarch64.EMULATED, str(build / "libpastkey_kernels.so"), {"PYTHONPATH": str(packages)}
