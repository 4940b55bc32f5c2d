"""A virtual environment for each engine, in .environments/peers-NAME, and what is installed in it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environments import ROOT, environment
from pastkey.command import say

from .engines import EngineError


@dataclass(frozen=True)
class Environment:
    """What pip installs for one engine."""

    arguments: tuple[str, ...]  # of pip install
    shown: tuple[str, ...]  # the packages whose versions belong to a result
    note: str = ""  # what to expect of the installation


ENVIRONMENTS = {
    # The checkout's own Python, which runs this.
    "pastkey": Environment((), ("onnxruntime", "numpy", "tokenizers")),
    # Its model builder needs what follows.
    "genai": Environment(
        ("onnxruntime-genai", "onnx", "onnx-ir", "torch", "transformers"),
        ("onnxruntime-genai", "onnxruntime", "numpy"),
    ),
    # Built here, for this machine's instructions, as its authors advise.
    "llama": Environment(
        ("--no-binary=llama-cpp-python", "llama-cpp-python"),
        ("llama-cpp-python", "numpy"),
        ", built from source: about ten minutes",
    ),
    "optimum": Environment(
        ("optimum-onnx>=0.1,<0.2", "transformers>=4.57,<4.58", "onnxruntime", "torch"),
        ("optimum-onnx", "optimum", "transformers", "onnxruntime", "torch"),
    ),
    "transformers": Environment(("transformers", "torch"), ("transformers", "torch")),
}


def python_of(runtime: str) -> Path:
    """The Python of an engine's environment, installed on first use. Raises EngineError when pip fails."""
    if runtime == "pastkey":
        return Path(sys.executable)
    wanted = ENVIRONMENTS[runtime]
    if not (ROOT / ".environments" / f"peers-{runtime}" / "stamp").exists():
        say(f"install {runtime}{wanted.note}")
    try:
        return environment(f"peers-{runtime}", wanted.arguments)
    except subprocess.CalledProcessError as error:
        raise EngineError(f"pip could not install {runtime}: exit status {error.returncode}, see above") from None


def versions_of(runtime: str, python: Path) -> dict[str, str]:
    """package -> version, of what is measured. pastkey's own names the content of its source files, too."""
    code = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    command = [str(python), "-c", code, *ENVIRONMENTS[runtime].shown]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"{python} does not know its packages: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, str] = json.loads(done.stdout)
    return {"pastkey": _own_version()} | found if runtime == "pastkey" else found


def _own_version() -> str:
    """pastkey's version and a digest of its source, which a version number does not tell apart."""
    from pastkey import __version__

    content = hashlib.sha256()
    for folder in ("pastkey", "train", "export", "runtime"):
        for file in sorted((ROOT / folder).glob("*.py")):
            content.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"{__version__} (source {content.hexdigest()[:8]})"
