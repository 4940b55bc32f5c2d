from __future__ import annotations

import functools
import importlib.metadata
import json

import pytest

from pastkey.errors import ProviderError
from pastkey.providers import PROVIDERS
from pastkey.runtime.commands import devices
from pastkey.runtime.providers import ort
from pastkey.runtime.providers import placement as providers
from pastkey.runtime.providers.native import NativeKernels
from pastkey.runtime.providers.ort import onnxruntime

installed = functools.cache(importlib.metadata.packages_distributions)


@pytest.fixture(autouse=True)
def packages_are_looked_at_once(monkeypatch):
    """Each look reads what every package of this environment holds."""
    monkeypatch.setattr(importlib.metadata, "packages_distributions", installed)


def test_every_known_provider_is_listed_once_with_available_ones_first():
    rows = devices.devices()
    assert rows[0].short_name == "cpu"
    assert rows[0].available
    assert sorted(row.short_name for row in rows if row.short_name in PROVIDERS) == sorted(PROVIDERS)
    assert all(row.note for row in rows if not row.available)


def test_what_is_here_has_its_wheel_and_its_devices():
    cpu = devices.devices()[0]
    assert cpu.package.split()[1] == onnxruntime.__version__
    assert [device.split()[0] for device in cpu.devices] == ["CPU"]


def test_a_plugin_that_does_not_load_is_absent_and_says_why(monkeypatch):
    qnn = PROVIDERS["qnn"]

    def fail(name: str) -> list[object]:
        raise ProviderError("no library")

    monkeypatch.setattr(providers, "available", lambda: [qnn.name, providers.CPU])
    monkeypatch.setattr(providers, "is_plugin", lambda name: name == qnn.name)
    monkeypatch.setattr(providers, "plugin_devices", fail)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2")
    (row,) = (row for row in devices.devices() if row.short_name == "qnn")
    assert (row.available, row.note, row.package, row.devices) == (False, "no library", "onnxruntime-qnn 2", ())


def test_a_provider_that_nobody_knew_of_is_listed(monkeypatch):
    monkeypatch.setattr(providers, "available", lambda: ["NewExecutionProvider", providers.CPU])
    (row,) = (row for row in devices.devices() if row.short_name == "new")
    assert (row.name, row.available, row.devices) == ("NewExecutionProvider", True, ())


def test_portable_kernels_are_said_to_wait_for_a_request(command, monkeypatch):
    monkeypatch.delenv("PASTKEY_KERNELS", raising=False)
    for level, told in (("avx2", "avx2\n"), ("portable", "portable: onnxruntime's run, which read prompts faster")):
        here = NativeKernels("0.1.0", 1, level, "/library.so")
        monkeypatch.setattr("pastkey.runtime.providers.native.native_kernels", lambda here=here: here)
        assert f"native kernels: 0.1.0, {told}" in command("devices")[1]


def test_devices(command):
    status, out, _ = command("devices")
    assert status == 0
    assert f"cpu            available  any CPU; {ort.wheels()[0]} {onnxruntime.__version__}" in out
    assert "Apple GPUs and neural engines; comes with pip install onnxruntime on macOS" in out
    status, out, _ = command("devices", "--json")
    rows = {row["short_name"]: row for row in json.loads(out)["devices"]}
    assert rows["cpu"]["available"]
