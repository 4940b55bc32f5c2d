"""Each fault that is planted into a bundle is found by `verify`: the runs that it spares would show no other."""

from __future__ import annotations

import pytest

from pastkey.contract.bundle import open_bundle
from pastkey.export import export
from pastkey.export.graft.probe.observe import observe
from tools.planted_faults import FAULTS, found_by

from .. import families
from ..decoders import llama

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
    assert found is not None
    assert {"prefill", "decode", "chunks_of_7", "chunks_of_64"} <= set(found)
