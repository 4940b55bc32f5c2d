"""Builds a reproducible wheel of this checkout: the same files give the same bytes.

It is built from a copy, since setuptools leaves build/ behind, from which a deleted module would ship again. Times are
those of SOURCE_DATE_EPOCH, and modes do not depend on the umask. The only remaining difference is the release of
setuptools, which the wheel names.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST_OF_1980 = 315532800  # the earliest time in a zip file


def copy_source(target: Path) -> None:
    """Copies all files of the wheel, with the same modes everywhere."""
    for stage in ("pastkey", "train", "export", "runtime"):
        shutil.copytree(ROOT / stage, target / stage, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def build_wheel(out: Path) -> Path:
    """Writes the wheel to a folder and returns its file."""
    commit = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False)
    environment = {"SOURCE_DATE_EPOCH": commit.stdout.strip() or str(FIRST_OF_1980)} | os.environ
    with tempfile.TemporaryDirectory() as work:
        source, built = Path(work, "source"), Path(work, "built")
        source.mkdir()
        copy_source(source)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(built), str(source)]
        subprocess.run(command, env=environment, umask=0o022, check=True)
        (wheel,) = built.glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copyfile(wheel, out / wheel.name))


if __name__ == "__main__":
    made = build_wheel(Path(sys.argv[1]))
    print(f"{hashlib.sha256(made.read_bytes()).hexdigest()}  {made}")
