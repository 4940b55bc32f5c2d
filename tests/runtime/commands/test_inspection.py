from __future__ import annotations

import json
import tempfile

import numpy as np
import pytest

from pastkey.runtime.commands.inspection import Share, inspect, read_shares
from pastkey.runtime.engine.engine import Engine


def test_sizes_operators_and_placement(bundle, tiny, tmp_path, monkeypatch, command):
    """And nothing is left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    inspection = inspect(bundle.path, threads=1)
    assert list(tmp_path.iterdir()) == []
    (share,) = inspection.shares
    assert (share.provider, share.nodes) == ("cpu", sum(share.operators.values()))
    assert share.operators.get("GroupQueryAttention", 0) == (2 if bundle.manifest.graph == "fused" else 0)
    weights = sum(weight.nbytes for weight in tiny.weights.values())
    tied = tiny.weights["embedding"].nbytes  # read by the gather and, transposed, by the output
    assert weights + tied <= share.weight_bytes <= weights + tied + 2000
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


def test_a_profile_that_was_cut_short_means_a_full_disk(fused_bundle, tmp_path, monkeypatch):
    cut = tmp_path / "profile.json"
    cut.write_text('[{"cat": "Node", "na')
    monkeypatch.setattr("onnxruntime.InferenceSession.end_profiling", lambda _: str(cut))
    with pytest.raises(OSError, match="No space left"):
        inspect(fused_bundle.path, threads=1)


def test_one_token_of_context_is_enough(tiny, make_bundle):
    assert inspect(make_bundle(type(tiny).random([(8, 8)], 1), "fused").path, threads=1).shares


def node(name, provider, size):
    args = {"provider": f"{provider}ExecutionProvider", "op_name": name.split("_")[0], "parameter_size": str(size)}
    return {"cat": "Node", "name": f"{name}_kernel_time", "args": args}


PROFILES = {
    "each node once per provider": (
        [node("MatMul_1", "CUDA", 100), node("MatMul_2", "CUDA", 50), node("MatMul_1", "CUDA", 100),
         node("Shape_3", "CPU", 0), {"cat": "Engine", "name": "model_run", "args": {}},
         {"cat": "Node", "name": "MatMul_1_fence_before", "args": {}}],
        1000, (Share("a.onnx", "cuda", 2, 150, {"MatMul": 2}), Share("a.onnx", "cpu", 1, 0, {"Shape": 1})),
    ),
    "a compiled part without weights has those that are left": (
        [node("subgraph", "NPU", 0), node("MatMul", "CPU", 50)],
        300, (Share("a.onnx", "npu", 1, 250, {"subgraph": 1}), Share("a.onnx", "cpu", 1, 50, {"MatMul": 1})),
    ),
    "a compiled part with weights has its own": (
        [node("subgraph", "NPU", 40), node("MatMul", "CPU", 50)],
        300, (Share("a.onnx", "cpu", 1, 50, {"MatMul": 1}), Share("a.onnx", "npu", 1, 40, {"subgraph": 1})),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PROFILES)
def test_a_profile_is_read_by_provider(case):
    profile, weight_bytes, shares = PROFILES[case]
    assert read_shares(profile, "a.onnx", weight_bytes) == shares


@pytest.mark.parametrize(("chunk", "files"), [(4, ["pastkey_prefill", "pastkey_decode"]), (1, ["pastkey_prefill"])])
def test_each_graph_of_a_static_bundle_is_shown(chunk, files, tiny, make_bundle, command):
    bundle, graphs = make_bundle(tiny, "static", chunk=chunk), [f"onnx/{file}.onnx" for file in files]
    shares = inspect(bundle.path, threads=1).shares
    assert [share.graph for share in shares] == graphs
    least = sum(weight.nbytes for weight in tiny.weights.values())
    assert all(share.nodes == sum(share.operators.values()) > 20 for share in shares)
    assert all(least <= share.weight_bytes < 3 * least for share in shares)
    status, out, _ = command("inspect", bundle.path)
    assert (status, [line for line in out.splitlines() if line.startswith("onnx/")]) == (0, graphs)


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
