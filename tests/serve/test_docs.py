"""The commands and the program of docs/serve.md, against a server of a tiny model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pastkey.serve.api import schemas
from pastkey.serve.app import TABLE

from .conftest import running, write_tiny

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")


def test_the_command_and_the_program_of_the_page_run(tmp_path):
    pytest.importorskip("openai")
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (command,) = re.findall(r"^    (curl (?:.*\\\n)?.*)$", PAGE, re.MULTILINE)
    patient = write_tiny(tmp_path / "bundle", stand_in="Q")  # reads every letter
    with running(patient, names=("bundle",), defaults={"max_new_tokens": 8}) as served:
        address = f"127.0.0.1:{served.port}"
        if shutil.which("curl") is not None:
            asked = ["bash", "-c", command.replace("127.0.0.1:8080", address)]
            told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
            assert '"object":"chat.completion"' in told
        environment = os.environ | {"OPENAI_BASE_URL": f"http://{address}/v1"}
        asked = [sys.executable, "-c", program]
        done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout) == 64 + 1 + 64  # the answer, a line break, the streamed answer


def test_the_page_names_every_route_and_field():
    for entry in TABLE:
        assert re.sub(r"{.*}", "NAME", entry.path) in PAGE
    for name in schemas.ModelBody.model_fields:
        assert f"`{name}`" in PAGE
