"""Builds a reproducible wheel of this checkout: the same files give the same bytes.

It is built from a copy, since setuptools leaves build/ behind, from which a deleted module would ship again. Times are
those of SOURCE_DATE_EPOCH, and modes do not depend on the umask. The only remaining difference is the release of
setuptools, which the wheel names.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST_OF_1980 = 315532800  # the earliest time in a zip file


def copy_source(target: Path) -> None:
    """Copies all files of the wheel, with the same modes everywhere."""
    for stage in ("pastkey", "train", "export", "runtime", "serve", "web", "see"):
        shutil.copytree(ROOT / stage, target / stage, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (target / "README.md").write_text(without_links(readme), encoding="utf-8")
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def without_links(readme: str) -> str:
    """Drops pictures of the checkout and links into it: on a package index they have no target."""
    readme = re.sub(r"^!\[[^]]*\]\((?!https?:)[^)]*\)\n\n", "", readme, flags=re.MULTILINE)
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"\1", readme)


def source_date() -> dict[str, str]:
    """The environment of a build: its files have the time of the last commit, or SOURCE_DATE_EPOCH's."""
    commit = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {"SOURCE_DATE_EPOCH": commit.stdout.strip() or str(FIRST_OF_1980)} | os.environ


def build(source: Path, out: Path) -> Path:
    """Writes the wheel of a source folder to another folder and returns its file. setuptools writes into `source`."""
    with tempfile.TemporaryDirectory() as built:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", built, str(source)]
        subprocess.run(command, env=source_date(), umask=0o022, check=True)
        (wheel,) = Path(built).glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copyfile(wheel, out / wheel.name))


def build_wheel(out: Path) -> Path:
    """Writes the checkout's wheel to a folder and returns its file."""
    with tempfile.TemporaryDirectory() as source:
        copy_source(Path(source))
        return build(Path(source), out)


if __name__ == "__main__":
    made = build_wheel(Path(sys.argv[1]))
    print(f"{hashlib.sha256(made.read_bytes()).hexdigest()}  {made}")
