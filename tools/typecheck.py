"""mypy --strict over the package, the tests and the benchmarks: `make check`.

mypy does not follow the mapped folders of an editable install. So it checks a folder of links in which pastkey/
contains the stages, as in an installed package.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
STAGES = ("train", "export", "runtime", "serve")
TREE = ROOT / ".mypy_cache" / "tree"


def main() -> int:
    """Returns mypy's exit status."""
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "pastkey"
    package.mkdir(parents=True)
    for path in (ROOT / "pastkey").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for stage in STAGES:
        (package / stage).symlink_to(ROOT / stage, target_is_directory=True)
    for other in ("tests", "tools", "benchmarks"):
        (TREE / other).symlink_to(ROOT / other, target_is_directory=True)
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(TREE.parent)]
    packages = ["-p", "pastkey", "-p", "tests", "-p", "tools", "-p", "benchmarks"]
    return subprocess.run([sys.executable, "-m", "mypy", *settings, *packages], cwd=TREE, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
