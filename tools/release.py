"""Builds what would be uploaded to PyPI, and tries it: `make release`.

package-lock.json -> web/lib/, the JavaScript libraries of `pastkey web`
checkout -> sdist -> wheel of the sdist, which must be the checkout's wheel, byte for byte
kernels/ -> sdist -> wheel of the sdist
         -> for each Python: a bare environment without a compiler, made of a folder of wheels without an index, where
            README's commands and program run, and `pastkey web`
         -> SHA256SUMS, and the packages of each environment
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from . import web_assets
from .wheel import ROOT, build, build_wheel, copy_source, source_date

# README's commands also need these: they export a Hugging Face folder, and the test makes a small one.
TRIED = ("pastkey[all]", "pastkey-kernels", "pytest>=8.3", "hypothesis")
AROUND = ("README.md", "CONTRIBUTING.md", "pyproject.toml", "docs", "examples", "benchmarks", "tests")


def build_sdist(out: Path) -> Path:
    """Writes the sdist to a folder and returns its file."""
    with tempfile.TemporaryDirectory() as work:
        source = Path(work, "source")
        source.mkdir()
        copy_source(source)
        run_build(source, out, "--sdist")
    (sdist,) = out.glob("*.tar.gz")
    return sdist


def run_build(source: Path, out: Path, *options: str) -> None:
    """Writes the sdist of a folder to another, and without options also the wheel of that sdist."""
    command = [sys.executable, "-m", "build", *options, "--outdir", str(out), str(source)]
    subprocess.run(command, env=source_date(), umask=0o022, check=True, stdout=subprocess.DEVNULL)


def wheel_of(sdist: Path, out: Path) -> Path:
    """Builds the wheel of an unpacked sdist, as pip does where no wheel fits."""
    with tempfile.TemporaryDirectory() as work:
        with tarfile.open(sdist) as archive:
            archive.extractall(work, filter="data")
        (unpacked,) = Path(work).iterdir()
        return build(unpacked, out)


def try_out(out: Path, python: str) -> None:
    """Installs the wheels in `out` into a bare environment of this Python, and runs what README shows.

    The folder has the checkout's README, examples and tests, and not its stages: Python imports the wheel.
    """
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([python, "-m", "venv", f"{work}/environment"], check=True)
        environment, wheels = f"{work}/environment/bin", f"{work}/wheels"
        pip = [f"{environment}/python", "-m", "pip"]
        found = ["--find-links", str(out), "--dest", wheels]
        subprocess.run([*pip, "download", "--quiet", "--only-binary", ":all:", *found, *TRIED], check=True)
        path = f"{environment}:{without_compilers(Path(work, 'programs'))}"
        bare = os.environ | {"PATH": path, "ORT_DISABLE_TELEMETRY": "1"}

        def run(*command: str) -> None:
            subprocess.run(command, cwd=work, env=bare, check=True)

        run(*pip, "install", "--quiet", "--no-index", "--find-links", wheels, *TRIED)
        listed = subprocess.run([*pip, "freeze"], env=bare, check=True, stdout=subprocess.PIPE, text=True).stdout
        (version,) = re.findall(
            r"^version = (\d+\.\d+)", Path(work, "environment", "pyvenv.cfg").read_text(), re.MULTILINE
        )
        (out / f"packages-{version}.txt").write_text(listed, encoding="utf-8")
        for name in AROUND:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(work, name))
        test = "tests/test_readme.py::test_the_commands_and_programs_of_a_page_run_in_turn[README.md]"
        run("python", "-m", "pytest", "-q", test)
        lesson = ("examples/lesson.py:trained", "--tokenizer", "examples/lesson.py:tokenizer", "--context", "16")
        run("pastkey", "export", *lesson, "--out", "lesson")
        run("pastkey", "web", "lesson", "--out", "page")


def without_compilers(folder: Path) -> Path:
    """Makes a folder of links to the programs here but compilers, and returns it."""
    folder.mkdir()
    for place in os.get_exec_path():
        for program in Path(place).glob("*"):
            if not re.search(r"(^|-)(cc|c\+\+|c[89]9|gcc|g\+\+|clang)", program.name):
                with contextlib.suppress(FileExistsError):
                    (folder / program.name).symlink_to(program)
    return folder


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
    run_build(ROOT / "kernels", arguments.out)
    files = sorted(arguments.out.iterdir())
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
    sums = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    (arguments.out / "SHA256SUMS").write_text(sums, encoding="utf-8")
    for python in arguments.python or [sys.executable]:
        try_out(arguments.out.resolve(), python)
        print(f"README's commands run with {python}", flush=True)
    print(sums, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
