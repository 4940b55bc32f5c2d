"""onnxruntime, as it is found here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pastkey.errors import MissingExtraError
from pastkey.runtime.providers import ort
from pastkey.values import parse_version


@pytest.fixture
def install(monkeypatch):
    """install(WHEELS): as if these packages and versions were installed."""

    def here(wheels):
        monkeypatch.setattr(ort.importlib.metadata, "packages_distributions", lambda: {"onnxruntime": list(wheels)})
        monkeypatch.setattr(ort.importlib.metadata, "version", wheels.__getitem__)

    return here


def test_a_release_that_cannot_run_bundles_is_refused_with_the_command(install):
    install({"onnxruntime-gpu": "1.23.2"})
    with pytest.raises(MissingExtraError, match=r"older than 1\.24\.1.* type  pip install --upgrade onnxruntime-gpu "):
        ort.require_supported("1.23.2")
    for version in ("1.24.1", "2.0.0"):
        ort.require_supported(version)


@pytest.mark.parametrize(
    ("installed", "here", "first"),
    [
        ({"onnxruntime-openvino": "1.24.1"}, "1.24.1", "onnxruntime-openvino"),
        ({"onnxruntime": "1.32.0", "onnxruntime-webgpu": "1.27.0"}, "1.27.0", "onnxruntime-webgpu"),  # over the other
        ({"onnxruntime": "1.27.0", "onnxruntime-webgpu": "1.25.1"}, "1.27.0", "onnxruntime"),
        ({}, "1.27.0", "onnxruntime"),  # built from source
    ],
)
def test_the_wheel_that_answers_is_the_one_to_upgrade(installed, here, first, install, monkeypatch):
    install(installed)
    monkeypatch.setattr(ort.onnxruntime, "__version__", here)
    assert ort.upgrade_command() == f"pip install --upgrade {first}"


@pytest.mark.parametrize(
    ("before", "warnings"), [("import onnxruntime; os.environ[name] = '0'", 1), ("os.environ.pop(name)", 0)]
)
@pytest.mark.skipif(parse_version(ort.onnxruntime.__version__) < ort.TELEMETRY_SINCE, reason="it has none")
def test_telemetry_that_cannot_be_turned_off_any_more_is_said_once(before, warnings):
    program = (
        f"import os, warnings; name = 'ORT_DISABLE_TELEMETRY'; {before}\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    import pastkey.runtime.providers.ort, pastkey.runtime.engine.engine\n"
        "print([(w.category.__name__, str(w.message)) for w in caught if 'telemetry' in str(w.message)])\n"
    )
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.count("RuntimeWarning") == done.stdout.count("set ORT_DISABLE_TELEMETRY=1") == warnings


# None makes the import fail; an empty module is what a half uninstalled wheel leaves.
@pytest.mark.parametrize("stub", ["None", "types.ModuleType('onnxruntime')"])
def test_without_onnxruntime_the_command_to_type_is_named(stub):
    program = f"import sys, types\nsys.modules['onnxruntime'] = {stub}\nfrom pastkey.__main__ import main\n"
    program += "sys.exit(main(['devices']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install onnxruntime" in done.stderr
