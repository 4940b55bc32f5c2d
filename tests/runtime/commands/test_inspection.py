from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pastkey.bundle import Bundle
from pastkey.runtime.commands.inspection import Share, inspect, read_shares
from pastkey.runtime.providers.parts import Assigned

if TYPE_CHECKING:
    from ..conftest import Tiny


def test_sizes_operators_and_placement(bundle: Bundle, tiny: Tiny) -> None:
    inspection = inspect(bundle.path, threads=1)
    (share,) = inspection.shares
    assert share.provider == "cpu"
    assert share.nodes == sum(share.operators.values())
    assert share.operators.get("GroupQueryAttention", 0) == (2 if bundle.manifest.graph == "fused" else 0)
    weights = sum(weight.nbytes for weight in tiny.weights.values())
    tied = tiny.weights["embedding"].nbytes  # read by the gather and, transposed, by the output
    assert weights + tied <= share.weight_bytes <= weights + tied + 2000
    assert inspection.total_bytes == sum(
        path.stat().st_size for path in bundle.path.rglob("*") if path.is_file() and path.name != "pastkey.json"
    )
    assert inspection.kv_bytes_per_token == 4 * 2 * (8 + 8 + 16 + 16)


def test_nothing_is_left_behind(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    inspect(bundle.path, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_was_cut_short_means_a_full_disk(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "profile.json"
    cut.write_text('[{"cat": "Node", "na')
    monkeypatch.setattr("onnxruntime.InferenceSession.end_profiling", lambda _: str(cut))
    with pytest.raises(OSError, match="No space left"):
        inspect(bundle.path, threads=1)


def test_one_token_of_context_is_enough(tiny: Tiny, make_bundle: Callable[..., Bundle]) -> None:
    assert inspect(make_bundle(type(tiny).random([(8, 8)], 1), "fused").path, threads=1).shares


def test_nodes_are_counted_once_per_provider() -> None:
    def node(name: str, provider: str, size: int) -> dict[str, object]:
        args = {"provider": provider, "op_name": name.split("_")[0], "parameter_size": str(size)}
        return {"cat": "Node", "name": f"{name}_kernel_time", "args": args}

    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    profile: list[dict[str, Any]] = [
        node("MatMul_1", cuda, 100), node("MatMul_2", cuda, 50), node("MatMul_1", cuda, 100), node("Shape_3", cpu, 0),
        {"cat": "Engine", "name": "model_run", "args": {}},
        {"cat": "Node", "name": "MatMul_1_fence_before", "args": {}},
    ]  # fmt: skip
    shares = Share("cuda", 2, 150, {"MatMul": 2}), Share("cpu", 1, 0, {"Shape": 1})
    assert read_shares(profile, {}) == shares
    # What is recorded of the first is too little to be all of it.
    record = {cuda: Assigned(Counter(MatMul=1), 1), cpu: Assigned(Counter(Shape=2), 2)}
    assert read_shares(profile, record) == (shares[0], replace(shares[1], parts=2))
