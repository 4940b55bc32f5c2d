"""Verify finds what is wrong with a bundle, says where, and finds nothing wrong with a right one."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import onnx_ir as ir
import pytest
import torch

from pastkey.contract.bundle import open_bundle
from pastkey.errors import ParityError
from pastkey.export import export
from pastkey.export.graft.probe.observe import observe
from pastkey.export.measure.verify import KL_FLOOR, Check, Tolerances, Verification, verify
from pastkey.export.progress import Progress
from pastkey.precisions import PRECISIONS
from pastkey.runtime.providers import open as opening
from pastkey.runtime.providers.inference import OrtSession
from tools.planted_faults import FAULTS, found_by

from .. import families
from ..decoders import llama
from .conftest import scaled

CHECKS = ["prefill", "decode", "chunks_of_7", "chunks_of_64", "batch", "greedy"]


# --- right bundles ------------------------------------------------------------------------------------------------
def verified(made, monkeypatch):
    """Verifies a bundle: progress goes forward to the last check, and one graph is open at a time."""
    parts, live = list[tuple[int, int]](), weakref.WeakSet[Any]()

    class Seen(Progress):
        def advance(self, done: int, total: int) -> None:
            parts.append((done, total))

    class Watched(OrtSession):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            assert not live
            super().__init__(*arguments, **options)
            live.add(self)

    monkeypatch.setattr(opening, "OrtSession", Watched)
    verification = verify(made.bundle, made.module, progress=Seen())
    assert verification.ok
    assert parts == sorted(parts)
    assert parts[-1][0] == parts[-1][1]
    return verification


def test_fp32_against_its_source_is_equal_in_every_check(exported, monkeypatch):
    verification = verified(exported("llama"), monkeypatch)
    assert (verification.reference, verification.quality) == ("source", {})
    assert [check.name for check in verification.checks] == CHECKS
    for check in verification.checks[:-1]:
        assert check.measure == "max_relative_difference"
        assert 0 < check.value <= PRECISIONS["fp32"].max_difference == check.limit
    assert verification.checks[-1].value is None


def test_int8_decode_may_cost_no_more_than_twice_int8_itself(exported, monkeypatch):
    made = exported("llama", "int8")
    checks = {check.name: check for check in verified(made, monkeypatch).checks}
    assert {name for name, check in checks.items() if check.measure == "mean_kl"} == {"decode", "float32"}
    assert checks["decode"].limit == pytest.approx(2 * made.bundle.manifest.parity["int8"]["kl_divergence"], rel=1e-3)
    assert checks["decode"].value <= checks["decode"].limit
    assert checks["chunks_of_7"].limit == checks["batch"].limit == PRECISIONS["fp32"].max_difference
    assert checks["chunks_of_7"].value <= PRECISIONS["fp32"].max_difference


# --- limits -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("precision", "recorded", "measured", "decode_kl", "fp32_kl"),
    [
        ("fp32", None, None, None, None),
        ("int8", None, None, 2 * KL_FLOOR, 0.5),  # nothing is known of it
        ("int8", None, 1e-3, 2e-3, 0.5),  # at export
        ("int8", 1e-3, None, 2e-3, 2e-3),  # later, separately
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


@pytest.mark.parametrize("weight", ["0.self_attn.k_proj", "1.mlp.down_proj"])
def test_an_altered_weight_is_found(weight, exported, altered):
    made = exported("llama")
    bundle, layers = altered(made.bundle, scaled(f"model.layers.{weight}.weight", 2.0)), observe(made.module, 40).layers
    verification = verify(bundle, made.module, layers=layers)
    found = findings(verification)
    assert {"prefill", "decode", "chunks_of_7", "chunks_of_64", "batch"} <= set(found)
    assert "outside attention, such as a mean over the tokens" in found["prefill"].detail
    assert found["prefill"].value > PRECISIONS["fp32"].max_difference
    with pytest.raises(ParityError, match="what I exported does not compute what its source computes: in the check"):
        verification.require_ok("what I exported")


@pytest.mark.parametrize(
    ("change", "near", "told", "untold"),
    [
        (3e-4, False, "a position that does not come from position_ids", "float32 itself is off by"),
        (6e-5, True, "float32 itself is off by", "position_ids"),
    ],
)
def test_a_change_above_the_tolerance_is_not_told_as_one_of_positions_near_rounding(
    change, near, told, untold, exported, altered
):
    made, limit = exported("llama"), PRECISIONS["fp32"].max_difference
    bundle = altered(made.bundle, scaled("model.embed_tokens.weight", 1 + change))
    found = findings(verify(bundle, made.module))["prefill"]
    assert limit < found.value
    assert (found.value < 3 * limit) == near
    assert told in found.detail
    assert untold not in found.detail


def test_int8_against_another_source_of_the_same_shape_is_found(exported):
    made = exported("llama", "int8")
    other = llama()
    with torch.no_grad():
        other.get_parameter("model.norm.weight").mul_(-1)
    verification = verify(made.bundle, other)
    found = next(check for check in verification.checks if check.name == "float32")
    assert (found.measure, found.ok, verification.ok) == ("mean_kl", False, False)
    assert found.value > 10 * found.limit
    assert "another model's bundle" in found.detail


def test_greedy_ids_that_differ_are_told_with_their_step(exported, altered):
    made = exported("llama")
    bundle = altered(made.bundle, scaled("model.layers.0.self_attn.k_proj.weight", -30.0))
    greedy = findings(verify(bundle, made.module))["greedy"]
    assert greedy.measure == "first_difference"
    assert f"token {greedy.value} of the greedy continuation is" in greedy.detail


def mixed_up(model: ir.Model) -> None:
    """Layer 1 answers with layer 0's cached values."""
    values = {value.name: value for value in model.graph.inputs}
    ir.convenience.replace_all_uses_with(values["past_key_values.1.value"], values["past_key_values.0.value"])


def test_a_cache_that_is_mixed_up_is_found_without_the_source(exported, altered):
    bundle = exported("one_block_twice").bundle
    assert verify(bundle).ok
    found = findings(verify(altered(bundle, mixed_up)))
    assert "prefill" not in found  # there is no past in it
    assert {"decode", "chunks_of_7"} <= set(found)


# --- each planted fault is found: the runs that verify spares would show no other -------------------------------------
CONTEXT = 200
# int8's own rounding is larger than these: `verify` asks whether it is the same model.
WITHIN_INT8 = {
    "half of one matrix times 1.001",
    "half of one matrix times 1.01",
    "one row of one matrix is zero",
    "the scale of one block doubled",
    "the zero point of one block off by one",
    "epsilon of one norm 100 times too large",
    "the scale of one attention 1 % off",
    "the last cached value is stale at single tokens 64, 128, ...",
}


def made(module, folder, precision="fp32", context=CONTEXT):
    export(module, folder / "bundle", precision, context_length=context)
    return open_bundle(folder / "bundle", verify=False)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "within"), [("fp32", set[str]()), ("int8", WITHIN_INT8)])
def test_every_fault_that_exceeds_rounding_is_found(precision, within, tmp_path):
    module = llama(max_position_embeddings=CONTEXT)
    bundle = made(module, tmp_path, precision)
    found = {fault: found_by(bundle, fault, module, (), tmp_path) for fault in FAULTS}
    assert sum(names is not None for names in found.values()) >= 17
    assert {fault for fault, names in found.items() if names == []} <= within


@pytest.mark.slow
@pytest.mark.matrix
def test_a_window_that_is_one_token_too_wide_is_found(tmp_path):
    pytest.importorskip("transformers")
    from pastkey.export.graft.huggingface import HuggingFaceDecoder

    decoder = HuggingFaceDecoder(families.build("gemma3_text"))
    bundle = made(families.build("gemma3_text"), tmp_path, context=families.CONTEXT)
    layers = observe(decoder, families.CONTEXT).layers
    assert found_by(bundle, "one window one token too wide", decoder, layers, tmp_path)


def test_a_last_logits_graph_that_differs_from_the_other_is_found_in_int8(exported, tmp_path):
    bundle = exported("llama", "int8").bundle
    found = found_by(bundle, "the last-logits graph exchanges two rows of the head", None, (), tmp_path)
    assert {"prefill", "decode", "chunks_of_7", "chunks_of_64"} <= set(found)
