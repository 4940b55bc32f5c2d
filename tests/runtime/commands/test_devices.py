from __future__ import annotations

import functools
import importlib.metadata
import json

import pytest

from pastkey.errors import ProviderError
from pastkey.providers import PROVIDERS
from pastkey.runtime.commands.devices import devices
from pastkey.runtime.providers import ort
from pastkey.runtime.providers import placement as providers
from pastkey.runtime.providers.native import NativeKernels

installed = functools.cache(importlib.metadata.packages_distributions)


@pytest.fixture(autouse=True)
def packages_are_looked_at_once(monkeypatch):
    """Each look reads what every package of this environment holds."""
    monkeypatch.setattr(importlib.metadata, "packages_distributions", installed)


def test_every_known_provider_is_listed_once_with_available_ones_first(command):
    rows = devices()
    assert (rows[0].short_name, rows[0].available) == ("cpu", True)
    assert rows[0].package.split()[1] == ort.onnxruntime.__version__
    assert [device.split()[0] for device in rows[0].devices] == ["CPU"]
    assert sorted(row.short_name for row in rows if row.short_name in PROVIDERS) == sorted(PROVIDERS)
    assert all(row.note for row in rows if not row.available)
    status, out, _ = command("devices")
    assert status == 0
    assert f"cpu            available  any CPU; {ort.wheels()[0]} {ort.onnxruntime.__version__}" in out
    assert "Apple GPUs and neural engines; comes with pip install onnxruntime on macOS" in out
    shown = json.loads(command("devices", "--json")[1])["devices"]
    assert [(row["short_name"], row["available"]) for row in shown] == [(row.short_name, row.available) for row in rows]


def test_a_plugin_that_does_not_load_is_absent_and_says_why(monkeypatch):
    """And a provider that nobody knew of is listed."""
    qnn = PROVIDERS["qnn"]

    def fail(name):
        raise ProviderError("no library")

    monkeypatch.setattr(providers, "available", lambda: [qnn.name, "NewExecutionProvider", providers.CPU])
    monkeypatch.setattr(providers, "is_plugin", lambda name: name == qnn.name)
    monkeypatch.setattr(providers, "plugin_devices", fail)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2")
    rows = {row.short_name: row for row in devices()}
    row, new = rows["qnn"], rows["new"]
    assert (row.available, row.note, row.package, row.devices) == (False, "no library", "onnxruntime-qnn 2", ())
    assert (new.name, new.available, new.devices) == ("NewExecutionProvider", True, ())


def test_portable_kernels_are_said_to_wait_for_a_request(command, monkeypatch):
    monkeypatch.delenv("PASTKEY_KERNELS", raising=False)
    for level, told in (("avx2", "avx2\n"), ("portable", "portable: onnxruntime's run, which read prompts faster")):
        here = NativeKernels("0.1.0", 1, level, "/library.so")
        monkeypatch.setattr("pastkey.runtime.providers.native.native_kernels", lambda here=here: here)
        assert f"native kernels: 0.1.0, {told}" in command("devices")[1]
