from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pastkey.errors import MissingExtraError
from pastkey.runtime import ort


@pytest.mark.parametrize(
    ("text", "numbers"), [("1.32.0", (1, 32, 0)), ("1.23", (1, 23, 0)), ("1.33.0.dev20261102", (1, 33, 0))]
)
def test_a_version_is_its_first_three_numbers(text: str, numbers: tuple[int, int, int]) -> None:
    assert ort.parse_version(text) == numbers


@pytest.mark.parametrize(("version", "word"), [("1.22.1", "older than 1.23.0"), ("1.24.1", "links")])
def test_a_release_that_cannot_run_bundles_is_refused_with_the_command(version: str, word: str) -> None:
    with pytest.raises(MissingExtraError, match=word) as caught:
        ort.require_supported(version)
    assert "pip install" in str(caught.value)


@pytest.mark.parametrize("version", ["1.23.0", "1.24.2", "1.32.0", "2.0.0"])
def test_other_releases_are_taken(version: str) -> None:
    ort.require_supported(version)


def test_telemetry_is_off_before_onnxruntime_is_imported() -> None:
    program = (
        "import builtins, os\n"
        "real = builtins.__import__\n"
        "def spy(name, *rest):\n"
        "    if name == 'onnxruntime' and 'seen' not in globals():\n"
        "        globals()['seen'] = os.environ.get('ORT_DISABLE_TELEMETRY')\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = spy\n"
        "import pastkey\n"
        "pastkey.load\n"
        "print(seen)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize("missing", ["absent", "damaged"])
def test_without_onnxruntime_the_command_to_type_is_named(missing: str) -> None:
    # None makes the import fail; an empty module is what a half uninstalled wheel leaves.
    stub = {"absent": "None", "damaged": "types.ModuleType('onnxruntime')"}[missing]
    program = f"import sys, types\nsys.modules['onnxruntime'] = {stub}\nfrom pastkey.__main__ import main\n"
    program += "sys.exit(main(['devices']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'pastkey[cpu]'" in done.stderr
    assert done.stderr.count("\n") == 1
