"""Writes for each extra of pyproject.toml a CycloneDX document of all packages that pip would install with it here.

pip resolves an extra without installing it, and reports the files' names, releases and sha256. cyclonedx-py, in a
separate environment, writes the document.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environments import environment

ROOT = Path(__file__).resolve().parent.parent
CYCLONEDX = ("sbom", ["cyclonedx-bom>=7.5"])


def extras() -> list[str]:
    """Returns the declared extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["optional-dependencies"])


def resolved(extra: str) -> list[dict[str, Any]]:
    """Returns the entries of pip's report on what it would install with an extra, without pastkey."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run([*command, f"{ROOT}[{extra}]"], stdout=subprocess.PIPE, text=True, check=True)
    entries: list[dict[str, Any]] = json.loads(done.stdout)["install"]
    return [entry for entry in entries if entry["metadata"]["name"] != "pastkey"]


def requirements(entries: Sequence[dict[str, Any]]) -> str:
    """Returns a line for each package, with its release and the hash of its file."""
    lines = []
    for entry in entries:
        hashes = entry["download_info"]["archive_info"]["hashes"]
        name = re.sub("[-_.]+", "-", entry["metadata"]["name"]).lower()  # normalized, as in a purl
        lines.append(f"{name}=={entry['metadata']['version']} --hash=sha256:{hashes['sha256']}\n")
    return "".join(sorted(lines))


def write_sbom(extra: str, out: Path) -> Path:
    """Writes pastkey-EXTRA.cdx.json to a folder and returns it."""
    out.mkdir(parents=True, exist_ok=True)
    pinned, made = out / f"pastkey-{extra}.txt", out / f"pastkey-{extra}.cdx.json"
    pinned.write_text(requirements(resolved(extra)), encoding="utf-8")
    program = environment(*CYCLONEDX).parent / "cyclonedx-py"
    options = ("--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible", "--output-file", str(made))
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}  # a list does not say which package requires which
    subprocess.run([str(program), "requirements", str(pinned), *options], env=quiet, check=True)
    return made


if __name__ == "__main__":
    for name in sys.argv[2:] or extras():
        document = write_sbom(name, Path(sys.argv[1]))
        print(f"{document}: {len(json.loads(document.read_text(encoding='utf-8'))['components'])} packages")
