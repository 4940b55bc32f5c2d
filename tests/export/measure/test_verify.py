"""Verify finds what is wrong with a bundle, says where, and finds nothing wrong with a right one."""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pastkey.contract import names
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.errors import ParityError
from pastkey.export.graft.probe.observe import observe
from pastkey.export.measure.verify import (
    KL_FLOOR,
    Check,
    Tolerances,
    Verification,
    verify,
)
from pastkey.export.progress import Progress
from pastkey.files.folder import file_record
from pastkey.precisions import PRECISIONS
from pastkey.runtime.providers import open as opening
from pastkey.runtime.providers.inference import OrtSession

from ..conftest import Exported
from ..decoders import llama

CHECKS = ["prefill", "decode", "chunks_of_7", "chunks_of_64", "batch", "greedy"]


def alter_weight(bundle: Bundle, folder: Path, name: str, factor: float, rehash: bool = True) -> Bundle:
    """A copy of the bundle whose weight `name` has one row multiplied, with a manifest that agrees with it."""
    copy = folder / "altered"
    shutil.copytree(bundle.path, copy)
    graph = onnx.load(copy / PRECISIONS[bundle.manifest.precision].graph, load_external_data=False)
    tensor = next(t for t in graph.graph.initializer if t.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    data = copy / "onnx" / place["location"]
    content = bytearray(data.read_bytes())
    offset, count = int(place["offset"]), int(np.prod(tensor.dims[1:]))
    row = np.frombuffer(content, np.float32, count, offset) * np.float32(factor)
    content[offset : offset + row.nbytes] = row.tobytes()
    data.write_bytes(content)
    if rehash:
        manifest = json.loads((copy / names.MANIFEST).read_text())
        manifest["files"][f"onnx/{place['location']}"]["sha256"] = file_record(data).sha256
        (copy / names.MANIFEST).write_text(json.dumps(manifest))
    return open_bundle(copy, verify=rehash)


def figure(check: Check) -> float:
    assert check.value is not None
    return check.value


# --- right bundles ------------------------------------------------------------------------------------------------
def test_fp32_against_its_source_is_equal_in_every_check(exported):
    made = exported("llama")
    verification = verify(made.bundle, made.module)
    assert verification.ok
    assert verification.reference == "source"
    assert [check.name for check in verification.checks] == CHECKS
    for check in verification.checks[:-1]:
        assert check.measure == "max_relative_difference"
        assert 0 < figure(check) <= PRECISIONS["fp32"].max_difference == check.limit
    assert verification.checks[-1].value is None
    assert verification.quality == {}


def test_int8_decode_may_cost_no_more_than_twice_int8_itself(exported):
    made = exported("llama", "int8")
    checks = {check.name: check for check in verify(made.bundle, made.module).checks}
    assert {name for name, check in checks.items() if check.measure == "mean_kl"} == {"decode", "float32"}
    assert checks["decode"].limit == pytest.approx(2 * made.bundle.manifest.parity["int8"]["kl_divergence"], rel=1e-3)
    assert figure(checks["decode"]) <= (checks["decode"].limit or 0)
    assert checks["chunks_of_7"].limit == checks["batch"].limit == PRECISIONS["fp32"].max_difference
    assert figure(checks["chunks_of_7"]) <= PRECISIONS["fp32"].max_difference


def test_progress_goes_forward_from_the_text_to_the_last_check(exported):
    class Seen(Progress):
        def __init__(self) -> None:
            self.parts: list[tuple[int, int]] = []

        def advance(self, done: int, total: int) -> None:
            self.parts.append((done, total))

    seen = Seen()
    made = exported("llama", "int8")
    verify(made.bundle, made.module, progress=seen)
    assert seen.parts == sorted(seen.parts)
    assert seen.parts[-1][0] == seen.parts[-1][1]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_one_graph_is_open_at_a_time(precision, exported, monkeypatch):
    live = weakref.WeakSet[Any]()

    class Watched(OrtSession):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            assert not live
            super().__init__(*arguments, **options)
            live.add(self)

    made = exported("llama", precision)
    monkeypatch.setattr(opening, "OrtSession", Watched)
    assert verify(made.bundle, made.module).ok


# --- limits -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("precision", "recorded", "measured", "decode_kl", "fp32_kl"),
    [
        ("fp32", None, None, None, None),
        ("int8", None, None, 2 * KL_FLOOR, 0.5),  # nothing is known of it
        ("int8", None, 1e-3, 2e-3, 0.5),  # at export
        ("int8", 1e-3, None, 2e-3, 2e-3),  # later, alone
        ("int8", 1e-3, 7.0, 2e-3, 2e-3),  # later, against another source
        ("int8", 0.0, None, 2 * KL_FLOOR, 2 * KL_FLOOR),
        ("int4", 0.1, None, 0.02, 0.2),
    ],
)
def test_limits_follow_from_what_was_recorded(precision, recorded, measured, decode_kl, fp32_kl, exported):
    manifest = exported("llama").bundle.manifest
    parity = {} if recorded is None else {precision: {"kl_divergence": recorded}}
    found = Tolerances.of(dataclasses.replace(manifest, precision=precision, parity=parity), measured)
    assert dataclasses.astuple(found) == (PRECISIONS["fp32"].max_difference, *map(pytest.approx, (decode_kl, fp32_kl)))


# --- wrong bundles ------------------------------------------------------------------------------------------------
def findings(verification: Verification) -> dict[str, Check]:
    return {check.name: check for check in verification.checks if not check.ok}


@pytest.mark.parametrize(
    ("weight", "where"),
    [
        ("model.layers.0.self_attn.k_proj.weight", "first in layer 0 (model.layers.0.self_attn, model.py:"),
        ("model.layers.0.self_attn.o_proj.weight", "first in layer 1 (model.layers.1.self_attn, model.py:"),
        ("model.layers.1.mlp.down_proj.weight", "first in what follows the last layer's keys and values"),
    ],
)
def test_an_altered_weight_is_found_and_its_layer_named(weight, where, exported, tmp_path):
    made = exported("llama")
    bundle = alter_weight(made.bundle, tmp_path, weight, 2.0)
    verification = verify(bundle, made.module, layers=observe(made.module, 40).layers)
    assert not verification.ok
    found = findings(verification)
    assert {"prefill", "decode", "chunks_of_7", "chunks_of_64", "batch"} <= set(found)
    assert where in found["prefill"].detail
    assert "outside attention, such as a mean over the tokens" in found["prefill"].detail
    assert figure(found["prefill"]) > PRECISIONS["fp32"].max_difference
    with pytest.raises(ParityError, match="what I exported does not compute what its source computes: in the check"):
        verification.require_ok("what I exported")


def test_a_change_just_above_the_tolerance_is_found(exported, tmp_path):
    made = exported("llama")
    bundle = alter_weight(made.bundle, tmp_path, "model.embed_tokens.weight", 1.0 + 3e-4)
    expected = made.torch_logits(list(range(40)))
    assert np.abs(expected).max() > 1
    detail = findings(verify(bundle, made.module))["prefill"].detail
    assert "a position that is not of position_ids" in detail


def test_a_difference_near_rounding_is_not_told_as_one_of_positions(exported, tmp_path):
    made = exported("llama")
    bundle = alter_weight(made.bundle, tmp_path, "model.embed_tokens.weight", 1.0 + 6e-5)
    found = findings(verify(bundle, made.module))["prefill"]
    assert PRECISIONS["fp32"].max_difference < figure(found) < 3 * PRECISIONS["fp32"].max_difference
    assert "float32 itself is off by" in found.detail
    assert "position_ids" not in found.detail


def test_int8_against_another_source_of_the_same_shape_is_found(exported):
    made = exported("llama", "int8")
    other = llama()
    with torch.no_grad():
        other.get_parameter("model.norm.weight").mul_(-1)
    verification = verify(made.bundle, other)
    found = next(check for check in verification.checks if check.name == "float32")
    assert (found.measure, found.ok, verification.ok) == ("mean_kl", False, False)
    assert found.value is not None
    assert found.limit is not None
    assert found.value > 10 * found.limit
    assert "another model's bundle" in found.detail


def test_greedy_ids_that_differ_are_told_with_their_step(exported, tmp_path):
    made = exported("llama")
    bundle = alter_weight(made.bundle, tmp_path, "model.layers.0.self_attn.k_proj.weight", -30.0)
    greedy = findings(verify(bundle, made.module)).get("greedy")
    assert greedy is not None
    assert greedy.measure == "first_difference"
    assert f"token {greedy.value} of the greedy continuation is" in greedy.detail


def broken_cache(made: Exported, folder: Path) -> Bundle:
    """A copy whose layer 1 answers with layer 0's cached values."""
    copy = folder / "broken"
    shutil.copytree(made.bundle.path, copy)
    for path in (copy / PRECISIONS["fp32"].graph, copy / names.LAST_LOGITS_GRAPH):
        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name == "past_key_values.1.value":
                    node.input[index] = "past_key_values.0.value"
        onnx.save(model, path)
    return Bundle(copy, made.bundle.manifest)


def test_a_cache_that_is_mixed_up_is_found_without_the_source(exported, tmp_path):
    made = exported("head_size_10_context_11")
    assert verify(made.bundle).ok
    two = exported("one_block_twice")
    verification = verify(broken_cache(two, tmp_path))
    found = findings(verification)
    assert "prefill" not in found  # there is no past in it
    assert {"decode", "chunks_of_7"} <= set(found)
    assert "first in layer 1" in found["decode"].detail
