"""Runs the bundles of tools/versions.py on another architecture, emulated by qemu.

apt fetches Debian's Python for arm64 and its libraries into a separate folder, where they are unpacked; the system does
not change. The wheels for arm64 come from the package index. Run it manually, on Debian: it needs a few minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .versions import BUNDLES, PROMPTS, ROOT, Answers, install_base, make_bundles, pip, releases, run_release, table
from .wheel import build_wheel

PLACE = ROOT / ".environments" / "aarch64"
SYSTEM, PACKAGES = PLACE / "system", PLACE / "packages"
PYTHON = "3.13"  # of Debian 13
QEMU = PLACE / "usr" / "bin" / "qemu-aarch64"
EMULATED = tuple(map(str, (QEMU, "-L", SYSTEM, SYSTEM / "usr" / "bin" / f"python{PYTHON}", "-S", "-P")))
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64", "manylinux_2_17_aarch64")


def fetch_system() -> None:
    """Unpacks Python for arm64 with its dependencies, and qemu, below PLACE."""
    if (PLACE / "fetched").exists():
        return
    shutil.rmtree(PLACE, ignore_errors=True)
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (PLACE / folder).mkdir(parents=True)
    (PLACE / "state" / "status").touch()  # nothing is installed there
    own = {
        "APT::Architecture": "arm64", "APT::Architectures::": "arm64", "APT::Sandbox::User": "root",
        "Dir::State": PLACE / "state", "Dir::State::status": PLACE / "state/status", "Dir::Cache": PLACE / "cache",
    }  # fmt: skip
    options = [part for name, value in own.items() for part in ("-o", f"{name}={value}")]
    wanted = (f"python{PYTHON}-minimal", f"libpython{PYTHON}-stdlib", "libstdc++6")
    chosen = ("install", "--yes", "--no-install-recommends", "--download-only", *wanted)
    for command in ([*options, "update"], [*options, *chosen], ["download", "qemu-user"]):
        subprocess.run(["apt-get", "--quiet=2", *command], cwd=PLACE, check=True)
    for target, files in ((SYSTEM, (PLACE / "cache" / "archives").glob("*.deb")), (PLACE, PLACE.glob("*.deb"))):
        (target / "usr" / "lib").mkdir(parents=True, exist_ok=True)
        for file in files:
            subprocess.run(["dpkg", "-x", file, target], check=True)
    (SYSTEM / "lib").symlink_to("usr/lib")
    (PLACE / "fetched").touch()


def install(folder: Path, *packages: str | Path) -> None:
    """Fills a folder with wheels for arm64."""
    shutil.rmtree(folder, ignore_errors=True)
    binary = ["--only-binary=:all:", "--python-version", PYTHON]
    binary += [part for platform in PLATFORMS for part in ("--platform", platform)]
    pip("install", "--quiet", "--no-deps", "--target", folder, *binary, *packages)


def answers(release: str) -> Answers:
    """Returns this release's results for the bundles on arm64."""
    install(PACKAGES, f"onnxruntime=={release}", "numpy", "tokenizers", build_wheel(PLACE / "wheel"))
    command = [*EMULATED, ROOT / "tools" / "versions.py", "--answer", BUNDLES, PLACE / "answers.npz"]
    command.append(PROMPTS[0])  # the long one is too slow under emulation
    environment = os.environ | {"PYTHONPATH": str(PACKAGES), "XDG_CACHE_HOME": str(PLACE / "home")}
    subprocess.run(list(map(str, command)), cwd=PLACE, env=environment, check=True)
    return Answers.of(PLACE / "answers.npz")


def main() -> int:
    """Returns 0 if both architectures agree, else 1."""
    fetch_system()
    make_bundles()
    release = releases()[0]
    newest = run_release(release, install_base())
    lines = list(table([(f"{release} on arm64", answers(release))], newest))
    print("\n".join(line for line, _ in lines))
    return 0 if all(well for _, well in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
