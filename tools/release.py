"""Builds what would be uploaded to PyPI, and tries it: `make release`.

package-lock.json -> web/lib/, the JavaScript libraries of `pastkey web`
checkout -> sdist -> wheel of the sdist, which must be the checkout's wheel, byte for byte
         -> for each Python: a bare environment with the wheel, where README's commands and program run
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from . import web_assets
from .wheel import ROOT, build, build_wheel, copy_source, source_date

# What README's commands need beside the wheel: they export a Hugging Face folder, and the test makes a small one.
EXTRAS = "all"
AROUND = ("README.md", "CONTRIBUTING.md", "pyproject.toml", "docs", "examples", "benchmarks", "tests")


def build_sdist(out: Path) -> Path:
    """Writes the sdist to a folder and returns its file."""
    with tempfile.TemporaryDirectory() as work:
        source = Path(work, "source")
        source.mkdir()
        copy_source(source)
        command = [sys.executable, "-m", "build", "--sdist", "--outdir", str(out), str(source)]
        subprocess.run(command, env=source_date(), umask=0o022, check=True, stdout=subprocess.DEVNULL)
    (sdist,) = out.glob("*.tar.gz")
    return sdist


def wheel_of(sdist: Path, out: Path) -> Path:
    """Builds the wheel of an unpacked sdist, as pip does where no wheel fits."""
    with tempfile.TemporaryDirectory() as work:
        with tarfile.open(sdist) as archive:
            archive.extractall(work, filter="data")
        (unpacked,) = Path(work).iterdir()
        return build(unpacked, out)


def try_out(wheel: Path, python: str) -> None:
    """Installs the wheel into a bare environment of this Python, and runs what README shows.

    The folder has the checkout's README, examples and tests, and not its stages: Python imports the wheel.
    """
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([python, "-m", "venv", f"{work}/environment"], check=True)
        pip = [f"{work}/environment/bin/python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, f"{wheel}[{EXTRAS}]", "pytest>=8.3"], check=True)
        for name in AROUND:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(work, name))
        test = "tests/test_readme.py::test_the_commands_and_programs_of_a_page_run_in_turn[README.md]"
        tests = [f"{work}/environment/bin/python", "-m", "pytest", "-q", test]
        subprocess.run(tests, cwd=work, env=os.environ | {"ORT_DISABLE_TELEMETRY": "1"}, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="a folder, which is emptied")
    parser.add_argument("--python", action="append", help="try it on this one; may be given several times")
    arguments = parser.parse_args()
    if web_assets.install() is None:
        print("npm is not installed, which the libraries of `pastkey web` come by: install Node.js", file=sys.stderr)
        return 1
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)
    sdist = build_sdist(arguments.out)
    wheel = wheel_of(sdist, arguments.out)
    with tempfile.TemporaryDirectory() as work:
        if build_wheel(Path(work)).read_bytes() != wheel.read_bytes():
            print(f"the wheel of {sdist} is not the wheel of the checkout: the sdist lacks a file", file=sys.stderr)
            return 1
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", sdist, wheel], check=True)
    for python in arguments.python or [sys.executable]:
        try_out(wheel.resolve(), python)
        print(f"README's commands run with {python}", flush=True)
    for file in (sdist, wheel):
        print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
