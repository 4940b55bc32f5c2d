"""Installs the JavaScript libraries of `pastkey web` into web/lib/: `make web-assets`.

web/package.json and package-lock.json -> npm ci, by the lock's hashes -> the files below, with their licences
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
WEB = ROOT / "web"
LIBRARIES = WEB / "lib"
INSTALLED = ROOT / ".environments" / "web"  # with its node_modules/, which has the tests' axe-core as well
LOCKED = ("package.json", "package-lock.json")
# Package -> its files, and the name of each in web/lib/.
FILES = {
    "onnxruntime-web": {f"dist/{name}": name for name in (
        "ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm", "ort.webgpu.min.mjs",
        "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm",
    )},
    "@huggingface/tokenizers": {"dist/tokenizers.min.mjs": "tokenizers.min.mjs", "LICENSE": "tokenizers.LICENSE"},
    "@huggingface/jinja": {"dist/index.js": "jinja.js", "LICENSE": "jinja.LICENSE"},
}  # fmt: skip
# onnxruntime-web's package has no file of its licence, which is that of onnxruntime's header.
LICENCES = {ROOT / "kernels" / "third_party" / "onnxruntime_c_api.LICENSE": "onnxruntime-web.LICENSE"}


def install() -> Path | None:
    """Fills web/lib/ on first use, and again when the lock changes; None without npm.

    Returns the folder with node_modules/.
    """
    stamp = INSTALLED / "stamp"
    read = (path.read_bytes() for path in (*(WEB / name for name in LOCKED), Path(__file__)))
    content = hashlib.sha256(b"".join(read)).hexdigest()
    INSTALLED.parent.mkdir(exist_ok=True)
    with FileLock(INSTALLED.with_suffix(".lock")):
        if stamp.exists() and stamp.read_text() == content and LIBRARIES.is_dir():
            return INSTALLED
        if shutil.which("npm") is None:
            return None
        shutil.rmtree(INSTALLED, ignore_errors=True)
        INSTALLED.mkdir()
        for name in LOCKED:
            shutil.copy(WEB / name, INSTALLED)
        command = ["npm", "ci", "--silent", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(command, cwd=INSTALLED, check=True)
        _copy()
        stamp.write_text(content)
    return INSTALLED


def _copy() -> None:
    """Puts the files into web/lib/, which is there whole or not at all."""
    work = LIBRARIES.with_name(f"lib.{os.getpid()}")
    work.mkdir()
    for package, files in FILES.items():
        for file, name in files.items():
            shutil.copyfile(INSTALLED / "node_modules" / package / file, work / name)
    for licence, name in LICENCES.items():
        shutil.copyfile(licence, work / name)
    shutil.rmtree(LIBRARIES, ignore_errors=True)
    work.rename(LIBRARIES)


if __name__ == "__main__":
    if install() is None:
        sys.exit("npm is not installed, which the libraries of the page come by: install Node.js")
