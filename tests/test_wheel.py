"""Two builds of the wheel are the same bytes, at another time, under another umask."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from tools.wheel import ROOT, without_links

from .shared import ran


@pytest.mark.matrix  # before a release
def test_two_builds_are_the_same_bytes(tmp_path):
    built: list[Path] = []
    for number, (umask, when) in enumerate(((0o022, 1_500_000_000), (0o077, 1_700_000_000))):
        checkout = tmp_path / f"checkout{number}"
        for stage in ("pastkey", "train", "export", "runtime", "serve", "web", "see"):
            shutil.copytree(ROOT / stage, checkout / stage, ignore=shutil.ignore_patterns("__pycache__", "lib"))
        (checkout / "web" / "lib").mkdir()
        (checkout / "web" / "lib" / "ort.wasm.min.mjs").write_text("export {}")
        (checkout / "tools").mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE", "tools/wheel.py"):
            shutil.copy(ROOT / name, checkout / name)
        for path in checkout.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
            os.utime(path, (when, when))
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1600000000", "PYTHONHASHSEED": str(number)}
        program = checkout / "tools" / "wheel.py"
        ran(sys.executable, program, tmp_path / f"out{number}", env=environment, umask=umask)
        built += (tmp_path / f"out{number}").glob("*.whl")
    one, other = (file.read_bytes() for file in built)
    assert one == other
    with zipfile.ZipFile(built[0]) as archive:
        assert {"pastkey/web/page/index.html", "pastkey/web/lib/ort.wasm.min.mjs"} <= {*archive.namelist()}
        assert {entry.date_time for entry in archive.infolist()} == {(2020, 9, 13, 12, 26, 40)}
        assert {entry.external_attr >> 16 & 0o777 for entry in archive.infolist()} <= {0o644, 0o664}


def test_the_packages_readme_links_to_no_file_of_the_checkout():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](docs/" in readme
    assert "](docs/" not in without_links(readme)
    assert without_links("A [page](https://x.org/y) and [one](docs/z.md#w).") == "A [page](https://x.org/y) and one."
