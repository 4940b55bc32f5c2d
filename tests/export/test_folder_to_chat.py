"""A Hugging Face folder -> bundle -> conversation, by the commands that a user types."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("jinja2", reason="jinja2 is not installed")


@pytest.fixture(scope="module")
def bundle(saved_llama, pastkey_command, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "bundle"
    done = pastkey_command("export", saved_llama, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.oldest
@pytest.mark.slow
def test_the_bundle_is_proved_and_runs(bundle, saved_llama, pastkey_command):
    done = pastkey_command("verify", bundle, saved_llama, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    done = pastkey_command("run", bundle, "--prompt", "Once upon a time", "--max-new-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["new_tokens"] == 8


@pytest.mark.oldest
def test_the_bundle_holds_a_conversation(bundle):
    command = [sys.executable, "-m", "pastkey", "chat", str(bundle), "--max-new-tokens", "5"]
    done = subprocess.run(command, input="Hello\nAnd then?\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
