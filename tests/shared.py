"""Shared by tests of several folders: trained models next to the checkout, and a table's part for each run."""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def shared(path: str) -> Path:
    """`path` in ../shared. Skips the test where it is absent; a git worktree also looks next to its main checkout."""
    places = [ROOT.parent / "shared" / path]
    command = ["git", "rev-parse", "--path-format=absolute", "--git-common-dir"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        places.append(Path(done.stdout.strip()).parent.parent / "shared" / path)
    found = next((place for place in places if place.exists()), None)
    if found is None:
        pytest.skip(f"../shared/{path} is not beside this checkout")
    return found


def ran(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, with its output as text. Its exit status must be 0."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def divided(cases: Iterable[Any], *, quick: Collection[Any] = (), ci: Collection[Any] = ()) -> list[Any]:
    """Cases for `parametrize`: `make test` runs those of `quick`, CI also those of `ci`, `make matrix` all.

    A case is a value, or a tuple of several.
    """
    cases = [*cases]
    assert {*quick, *ci} <= {*cases}, "a case that is chosen does not exist"
    marked = []
    for case in cases:
        marks = () if case in quick else pytest.mark.slow if case in ci else pytest.mark.matrix
        marked.append(pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks))
    return marked
