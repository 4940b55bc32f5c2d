"""tools/llama_server: llama.cpp's own tests of its server, on `pastkey serve`."""

from __future__ import annotations

import os
import re
import sys

import pytest

from tools.llama_server.left_out import LEFT_OUT
from tools.llama_server.shim import read

from ..shared import ROOT, ran, shared


@pytest.mark.matrix
def test_the_tests_of_llama_cpp_pass_or_are_left_out_with_a_reason(tmp_path):
    pytest.importorskip("starlette", reason="the extra serve is not installed")
    given = os.environ | {"PASTKEY_STORIES260K": str(shared("models/stories260K"))}
    command = [sys.executable, "-m", "tools.llama_server", "--basetemp", tmp_path / "tests"]
    done = ran(*command, cwd=ROOT, env=given, timeout=3600)
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed
    assert int(passed[1]) >= 40


def test_every_test_that_is_left_out_has_a_reason_and_every_flag_a_meaning():
    assert all(re.compile(name) and reason for name, reason in LEFT_OUT.items())
    words = ["--port", "80", "--offline", "--alias", "a", "--verbose", "--reasoning", "auto", "--ctx-size", "512"]
    assert read(words) == {"--port": "80", "--alias": "a", "--ctx-size": "512"}
    with pytest.raises(SystemExit) as unknown:
        read(["--lora", "x"])
    assert unknown.value.code == 2
