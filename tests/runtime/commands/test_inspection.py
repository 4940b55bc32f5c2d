"""`pastkey inspect`, `pastkey bench` and `pastkey devices`: the content of a bundle, its speed, and its devices."""

import functools
import importlib.metadata
import json
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from pastkey.errors import ProviderError
from pastkey.providers import PROVIDERS
from pastkey.runtime.commands.bench import bench, clamp
from pastkey.runtime.commands.devices import devices
from pastkey.runtime.commands.inspection import inspect
from pastkey.runtime.engine.engine import Engine
from pastkey.runtime.providers import ort
from pastkey.runtime.providers import placement as providers
from pastkey.runtime.providers.native import NativeKernels


def test_sizes_operators_and_placement(bundle, tiny, tmp_path, monkeypatch, command):
    """And nothing is left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    inspection = inspect(bundle.path, threads=1)
    assert list(tmp_path.iterdir()) == []
    (share,) = inspection.shares
    assert (share.provider, share.nodes) == ("cpu", sum(share.operators.values()))
    assert share.operators.get("GroupQueryAttention", 0) == (2 if bundle.manifest.graph == "fused" else 0)
    files = [path for path in bundle.path.rglob("*") if path.is_file() and path.name != "pastkey.json"]
    assert inspection.total_bytes == sum(path.stat().st_size for path in files)
    assert inspection.kv_bytes_per_token == 4 * 2 * (8 + 8 + 16 + 16)
    status, out, err = command("inspect", bundle.path)
    assert (status, err) == (0, "")
    assert "golden logits" not in out  # of the CPU there are none to compare
    graph = bundle.manifest.graph
    for word in ("onnx/pastkey.onnx", f"{graph} graph (asked for)", "384  of keys and values", "MatMul"):
        assert word in out
    status, out, err = command("inspect", bundle.path, "--json")
    assert (status, err, json.loads(out)["shares"][0]["provider"]) == (0, "", "cpu")


def test_one_token_of_context_is_enough(tiny, make_bundle):
    assert inspect(make_bundle(type(tiny).random([(8, 8)], 1), "fused").path, threads=1).shares


@pytest.mark.parametrize(("chunk", "files"), [(4, ["pastkey_prefill", "pastkey_decode"]), (1, ["pastkey_prefill"])])
def test_each_graph_of_a_static_bundle_is_shown(chunk, files, tiny, make_bundle, command):
    bundle, graphs = make_bundle(tiny, "static", chunk=chunk), [f"onnx/{file}.onnx" for file in files]
    shares = inspect(bundle.path, threads=1).shares
    assert [share.graph for share in shares] == graphs
    assert all(share.nodes == sum(share.operators.values()) > 20 for share in shares)
    status, out, _ = command("inspect", bundle.path)
    assert (status, [line.split()[0] for line in out.splitlines() if line.startswith("pastkey_")]) == (0, files)


class OnDevice(Engine):
    """An engine on a device that is off by a tenth of a logit where it runs `least` tokens or more."""

    least = 1

    def __init__(self, bundle, **placement):
        super().__init__(bundle, **placement)
        self.graph.providers = ["DeviceExecutionProvider"]

    def run(self, ids, mask=None, *, keep=1, hidden=False):
        logits = super().run(ids, mask, keep=keep, hidden=hidden)
        if ids.shape[1] >= self.least and not (self.graph.one_by_one and ids.shape[1] > 1):  # which runs single tokens
            logits[..., 3] += 0.1 * np.abs(logits).max()
        return logits


@pytest.mark.parametrize(("least", "shown"), [(999, "right"), (2, "prefill wrong"), (1, "wrong")])
def test_what_a_device_computes_is_shown_as_run_says_it(least, shown, fused_bundle, tmp_path, monkeypatch, command):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(OnDevice, "least", least)
    monkeypatch.setattr("pastkey.runtime.engine.engine.Engine", OnDevice)
    for flags in ([], ["--json"]):
        status, out, err = command("inspect", fused_bundle.path, *flags)
        assert status == (2 if shown == "wrong" else 0)
        assert ("'device' computes other logits on this device than the CPU: off by" in err) == (status == 2)
        assert ("single tokens right: the prompt is read token by token" in err) == (shown == "prefill wrong")
    answer = json.loads(out)
    assert (answer["golden_logits"], answer["refusal"] is None) == (shown, status == 0)
    assert [share["provider"] for share in answer["shares"]] == ["cpu"]
    assert f"golden logits on this device: {shown}\n" in command("inspect", fused_bundle.path)[1]


# --- bench ----------------------------------------------------------------------------------------------------------
def test_the_report_has_the_figures_and_what_they_were_measured_with(command, bundle):
    arguments = ["bench", bundle.path, "--prompt-tokens", 20, "--new-tokens", 10, "--threads", 1]
    status, out, err = command(*arguments, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    settings = report.pop("settings")
    assert set(report) == {"prefill_tokens_per_second", "decode_tokens_per_second", "load_seconds", "peak_rss_bytes"}
    assert min(report.values()) > 0
    assert (settings["prompt_tokens"], settings["new_tokens"], settings["threads"]) == (20, 10, 1)
    assert (settings["provider"], settings["graph"]) == ("CPUExecutionProvider", bundle.manifest.graph)
    assert "note" not in settings
    status, out, err = command(*arguments)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["prefill", "decode", "load", "memory"]


def test_clamp():
    assert [clamp(512, 128, context) for context in (640, 639, 1)] == [(512, 128), (511, 128), (1, 0)]
    assert clamp(2, 128, 11) == (2, 5)


def test_it_says_what_it_clamped_and_has_no_figure_of_no_tokens(command, fused_bundle):
    status, _, err = command("bench", fused_bundle.path, "--prompt-tokens", 9999, "--new-tokens", 2)
    assert (status, "the context is 600: 598 + 2 tokens were measured" in err) == (0, True)
    assert bench(fused_bundle.path, prompt_tokens=3, new_tokens=0, threads=1).decode_tokens_per_second is None


def test_peak_memory_sees_what_was_held_and_let_go():
    program = (
        "from pastkey.runtime.commands.bench import peak_rss_bytes\n"
        "before = peak_rss_bytes()\n"
        "held = b'x' * 80_000_000\n"
        "del held\n"
        "print(peak_rss_bytes() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 60_000_000 < int(done.stdout) < 120_000_000


# --- devices --------------------------------------------------------------------------------------------------------
installed = functools.cache(importlib.metadata.packages_distributions)


@pytest.fixture
def packages_are_looked_at_once(monkeypatch):
    """Each look reads what every package of this environment holds."""
    monkeypatch.setattr(importlib.metadata, "packages_distributions", installed)


@pytest.mark.usefixtures("packages_are_looked_at_once")
def test_every_known_provider_is_listed_once_with_available_ones_first(command):
    rows = devices()
    assert (rows[0].short_name, rows[0].available) == ("cpu", True)
    assert rows[0].package.split()[1] == ort.onnxruntime.__version__
    assert [device.split()[0] for device in rows[0].devices] == ["CPU"]
    assert sorted(row.short_name for row in rows if row.short_name in PROVIDERS) == sorted(PROVIDERS)
    assert all(row.note for row in rows if not row.available)
    status, out, _ = command("devices")
    assert status == 0
    assert f"cpu       available  any CPU; {ort.wheels()[0]} {ort.onnxruntime.__version__}" in out
    assert "Apple GPUs and neural engines; comes with pip install onnxruntime on macOS" in out
    shown = json.loads(command("devices", "--json")[1])["devices"]
    assert [(row["short_name"], row["available"]) for row in shown] == [(row.short_name, row.available) for row in rows]


@pytest.mark.usefixtures("packages_are_looked_at_once")
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


@pytest.mark.usefixtures("packages_are_looked_at_once")
def test_portable_kernels_are_said_to_wait_for_a_request(command, monkeypatch):
    monkeypatch.delenv("PASTKEY_KERNELS", raising=False)
    for level, told in (
        ("avx2", "avx2\n"),
        ("portable", "portable: by default onnxruntime's run, which read prompts faster"),
    ):
        here = NativeKernels("0.1.0", 1, level, "/library.so")
        monkeypatch.setattr("pastkey.runtime.providers.native.native_kernels", lambda here=here: here)
        assert f"native kernels: 0.1.0, {told}" in command("devices")[1]
