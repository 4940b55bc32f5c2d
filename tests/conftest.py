"""What tests of several stages share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what a load remembers out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pastkey_command() -> Run:
    """Runs the `pastkey` command in a process of its own, as a user would."""

    def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pastkey", *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "2"},
        )

    return run


@pytest.fixture(scope="session")
def classic(pastkey_command: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the classic lesson as checkpoint/ and as an int8 bundle/, made by the commands."""
    folder = tmp_path_factory.mktemp("classic")
    for arguments in (
        ("train", "--preset", "classic", "--out", folder / "checkpoint"),
        ("export", folder / "checkpoint", "--out", folder / "bundle"),
    ):
        done = pastkey_command(*arguments)
        assert done.returncode == 0, done.stderr
    return folder
