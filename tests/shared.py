"""Trained models that stand in ../shared beside the checkout, and are no part of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def shared(path: str) -> Path:
    """`path` in ../shared. Skips the test where it is absent; a git worktree looks beside its main checkout too."""
    places = [ROOT.parent / "shared" / path]
    command = ["git", "rev-parse", "--path-format=absolute", "--git-common-dir"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        places.append(Path(done.stdout.strip()).parent.parent / "shared" / path)
    found = next((place for place in places if place.exists()), None)
    if found is None:
        pytest.skip(f"../shared/{path} is not beside this checkout")
    return found
