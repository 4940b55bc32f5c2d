"""The choice of a graph, and refusals of tracing. That a traced graph is right is tested where it is run."""

import logging
import re
import warnings

import pytest
import torch

from pastkey.contract.bundle import KVGeometry
from pastkey.errors import ContractError
from pastkey.export.graft.probe.observe import CacheLayer, Observation, observe
from pastkey.export.graft.trace import choose_graph, trace
from pastkey.export.graph.edit import IR_VERSION, OPSET

from ..decoders import NanoGpt, Plain
from .plain import plain


def observed(*sizes, **more):
    layer = CacheLayer(KVGeometry(2, *sizes), 2, "", **more)
    return Observation((layer, layer), 37)


# --- choosing -----------------------------------------------------------------------------------------------------
FITTING, CAPPED = observed(64, 64), observed(64, 64, attributes=("scale", "softcap"))
# asked, target, the observation -> the graph and the reason; or the reason of a refusal
CHOSEN = {
    "fused": ("auto", "cpu", FITTING, "fused", "target cpu"),
    "portable": ("auto", "portable", FITTING, "standard", "target portable"),
    "an odd size": ("auto", "cpu", observed(12, 12), "standard", "a head size of 12, not a multiple of 8"),
    "two sizes": ("auto", "cpu", observed(8, 16), "standard", "keys of size 8 and values of size 16"),
    "a soft cap": ("auto", "webgpu", CAPPED, "standard", "does not support softcap, which webgpu ignores"),
    "a soft cap on the CPU": ("auto", "cpu", CAPPED, "fused", "target cpu"),
    "a standard graph": ("standard", "webgpu", CAPPED, "standard", ""),
    "a soft cap, fused": ("fused", "webgpu", CAPPED, "", "which webgpu ignores: use --graph standard, or auto"),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_graph_is_chosen_that_the_target_runs(name):
    asked, target, seen, graph, reason = CHOSEN[name]
    if not graph:
        with pytest.raises(ContractError, match=reason):
            choose_graph(asked, target, seen)
        return
    choice = choose_graph(asked, target, seen)
    assert choice.graph == graph
    assert reason in choice.reason


# --- tracing ------------------------------------------------------------------------------------------------------
def traced_refusal(module):
    observation = observe(module, 20)
    with pytest.raises(ContractError) as caught:
        trace(module, observation, "standard", 20)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def state_of_torch():
    detect, fast = torch.nn.modules.transformer._detect_is_causal_mask, torch.backends.mha.get_fastpath_enabled()
    levels = [logging.getLogger(name).level for name in ("torch.onnx", "torch.export")]
    return torch.nn.functional.scaled_dot_product_attention, detect, fast, levels


def test_a_trace_has_the_opset_of_the_oldest_runtime_and_leaves_torch_alone():
    module, before = NanoGpt().train(), state_of_torch()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = trace(module, observe(module, 32), "fused", 32)
    assert not told
    assert model.graph.opset_imports[""] == OPSET == 20
    assert IR_VERSION <= 10  # onnxruntime 1.24 loads it
    assert all(child.training for child in module.modules())
    assert state_of_torch() == before


def test_a_branch_is_told_with_its_line_and_torch_is_put_back():
    before, sentence = state_of_torch(), traced_refusal(plain(BRANCHES))
    for words in ("torch could not trace Decoder", "test_trace.py:", "depends on the values of a tensor"):
        assert words in sentence
    assert "u0" not in sentence  # torch's symbols
    assert state_of_torch() == before


def complex_tables(m):
    angles = torch.outer(torch.arange(m.context).float(), torch.ones(m.size // 2))
    m.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))


def complex_numbers(m, heads, at):
    pairs = torch.view_as_complex(heads.reshape(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * m.turns[at][:, None]).flatten(3)


def half_precision(m, hidden):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.head(hidden).float()


def twice(m, block, hidden, at):
    if torch.compiler.is_exporting():
        hidden = Plain.apply_block(m, block, hidden, at)
    return Plain.apply_block(m, block, hidden, at)


def not_the_second(m, block, hidden, at):
    if torch.compiler.is_exporting() and block is m.blocks[1]:
        return hidden
    return Plain.apply_block(m, block, hidden, at)


BRANCHES = {"embed": lambda m, ids, at: Plain.embed(m, ids, at) * (2 if at.max() > 30 else 1)}
REFUSED = {
    "a branch on values": (BRANCHES, "forward must not branch on values or lengths"),
    "a branch on the length": (
        {"embed": lambda m, ids, at: Plain.embed(m, ids, at) * (1 if ids.shape[1] > 4 else 1.0)},
        "holds only where sequence_length is at least 2 and at most 4: forward must not branch on a length",
    ),
    "a length as a number": (
        {"embed": lambda m, ids, at: Plain.embed(m, ids, at[:, :1] + torch.arange(int(ids.shape[1])))},
        "read lengths from tensor.shape and positions from position_ids",
    ),
    "complex numbers": (
        {"more": complex_tables, "turn": complex_numbers},
        "keep rotary tables as real cos and sin, not as complex numbers",
    ),
    "half precision": ({"logits": half_precision}, "leave out autocast and casts"),
    "further calls": ({"apply_block": twice}, "more attention calls while traced than when run"),
    "fewer calls": ({"apply_block": not_the_second}, "made 1 attention calls while traced and 2 when run"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_traced_is_refused_with_what_to_write(name):
    methods, words = REFUSED[name]
    sentence = traced_refusal(plain(methods, layers=2))
    assert words in sentence
    assert not re.search(r"generated guard|L\['input_ids'\]", sentence)  # torch's words
