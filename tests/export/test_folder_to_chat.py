"""A Hugging Face folder -> bundle -> conversation, by the commands that a user types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import Run

pytest.importorskip("jinja2", reason="jinja2 is not installed")


@pytest.fixture(scope="module")
def bundle(saved_llama: Path, pastkey_command: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    done = pastkey_command("export", saved_llama, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def test_the_bundle_is_proved_and_runs(bundle: Path, saved_llama: Path, pastkey_command: Run) -> None:
    done = pastkey_command("verify", bundle, saved_llama, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    done = pastkey_command("run", bundle, "--prompt", "Once upon a time", "--max-new-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["new_tokens"] == 8


def test_other_programs_load_it(bundle: Path, pastkey_command: Run) -> None:
    done = pastkey_command("check", bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "transformers.js" in done.stdout


def test_the_bundle_holds_a_conversation(bundle: Path) -> None:
    command = [sys.executable, "-m", "pastkey", "chat", str(bundle), "--max-new-tokens", "5"]
    done = subprocess.run(command, input="Hello\nAnd then?\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
