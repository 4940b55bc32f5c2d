"""`pastkey chat` in a process of its own, and its settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

FLAGS = ["--max-new-tokens", "7", "--temperature", "1", "--seed", "1"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 7, "temperature": 1.0, "seed": 1}


def chat(bundle: Path, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    program = [sys.executable, "-m", "pastkey", "chat", str(bundle), "--threads", "1", *arguments]
    return subprocess.run(program, input=given, capture_output=True, check=False)


def fails(done: subprocess.CompletedProcess[bytes], *words: str) -> None:
    assert done.returncode == 2
    sentence = done.stderr.decode()
    assert sentence.count("\n") == 1
    for word in words:
        assert word in sentence
