"""mypy --strict over the package as it is installed.

mypy does not follow the mapped folders of an editable install, so it is shown a folder that holds pastkey/ with the
stages in it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_package_is_strictly_typed(tmp_path: Path) -> None:
    package = tmp_path / "pastkey"
    package.mkdir()
    files = 0
    for file in (ROOT / "pastkey").glob("*.py"):
        (package / file.name).symlink_to(file)
        files += 1
    for stage in ("train", "export", "runtime"):
        (package / stage).symlink_to(ROOT / stage, target_is_directory=True)
        files += len(list((ROOT / stage).rglob("*.py")))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            str(ROOT / "pyproject.toml"),
            "--no-incremental",
            "-p",
            "pastkey",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = re.search(r"in (\d+) source files", done.stdout)
    assert seen is not None
    assert int(seen[1]) == files
