"""The choice of a graph, and what tracing refuses. That a traced graph is right is tested where it is run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pastkey.contract.bundle import KVGeometry
from pastkey.errors import ContractError
from pastkey.export.graft.probe.observe import Layer, Observation, observe
from pastkey.export.graft.trace import GraphChoice, choose_graph, trace
from pastkey.export.graph.edit import IR_VERSION, OPSET

from ..decoders import Encoder, NanoGpt, Plain


def observed(*geometry: KVGeometry) -> Observation:
    return Observation(tuple(Layer(g, g.kv_heads, "", "") for g in geometry), 37)


FITTING, ODD, UNEQUAL = KVGeometry(2, 64, 64), KVGeometry(2, 10, 10), KVGeometry(2, 8, 16)


# --- choosing -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_auto_takes_the_fused_graph_where_the_operator_takes_the_heads(target):
    choice = choose_graph("auto", target, observed(FITTING, FITTING))
    assert choice.graph == "fused"
    assert f"target {target}" in choice.reason


@pytest.mark.parametrize("target", ["portable", "openvino"])
def test_auto_takes_the_standard_graph_where_the_target_does_not_run_the_fused_one(target):
    choice = choose_graph("auto", target, observed(FITTING))
    assert choice.graph == "standard"
    assert f"target {target}" in choice.reason


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        ((ODD,), "a head size of 10, not a multiple of 8"),
        ((UNEQUAL,), "keys of size 8 and values of size 16"),
    ],
)
def test_auto_takes_the_standard_graph_where_it_must_and_says_why(geometry, words):
    choice = choose_graph("auto", "cpu", observed(*geometry))
    assert (choice.graph, choice.reason) == ("standard", f"GroupQueryAttention cannot take {words}")
    with pytest.raises(ContractError, match=words):
        choose_graph("fused", "cpu", observed(*geometry))


def test_auto_takes_the_standard_graph_where_the_targets_attention_ignores_an_attribute():
    capped = Observation((Layer(FITTING, 2, "", "", attributes=("scale", "softcap")),), 37)
    choice = choose_graph("auto", "webgpu", capped)
    assert choice == GraphChoice("standard", "GroupQueryAttention cannot take softcap, which webgpu ignores")
    assert choose_graph("auto", "cpu", capped).graph == "fused"
    assert choose_graph("standard", "webgpu", capped).graph == "standard"
    with pytest.raises(ContractError, match="cannot take softcap, which webgpu ignores: use --graph standard, or auto"):
        choose_graph("fused", "webgpu", capped)


# --- tracing ------------------------------------------------------------------------------------------------------
def traced_refusal(module: nn.Module) -> str:
    observation = observe(module, 20)
    with pytest.raises(ContractError) as caught:
        trace(module, observation, "standard", 20)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_a_trace_has_the_opset_of_the_oldest_runtime_and_leaves_torch_alone():
    module = NanoGpt().train()
    loggers = [logging.getLogger(name).level for name in ("torch.onnx", "torch.export")]
    detect = torch.nn.modules.transformer._detect_is_causal_mask
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = trace(module, observe(module, 32), "fused", 32)
    assert not told
    assert model.graph.opset_imports[""] == OPSET == 20
    assert IR_VERSION <= 10  # onnxruntime 1.23 loads it
    assert all(child.training for child in module.modules())
    assert torch.nn.modules.transformer._detect_is_causal_mask is detect
    assert [logging.getLogger(name).level for name in ("torch.onnx", "torch.export")] == loggers


def test_torch_is_put_back_after_a_trace_that_failed():
    attention, detect = torch.nn.functional.scaled_dot_product_attention, torch.nn.modules.transformer
    original = detect._detect_is_causal_mask
    traced_refusal(BranchesOnValues())
    assert torch.nn.functional.scaled_dot_product_attention is attention
    assert detect._detect_is_causal_mask is original
    assert torch.backends.mha.get_fastpath_enabled()


class Embedding(Plain):
    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return super().embed(input_ids, self.change(input_ids, position_ids))


class BranchesOnValues(Plain):
    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = super().embed(input_ids, position_ids)
        return hidden * 2 if position_ids.max() > 30 else hidden


class BranchesOnLength(Plain):
    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = super().embed(input_ids, position_ids)
        return hidden if input_ids.shape[1] > 4 else hidden * 1.0


def test_a_branch_on_values_is_refused_with_its_line():
    sentence = traced_refusal(BranchesOnValues())
    assert "torch could not trace BranchesOnValues" in sentence
    assert "test_trace.py:" in sentence
    assert "what runs there depends on the values of a tensor" in sentence
    assert "u0" not in sentence  # torch's symbols
    assert "forward must not branch on values or lengths" in sentence


def test_a_branch_on_the_length_is_refused_with_the_guard():
    sentence = traced_refusal(BranchesOnLength())
    assert (
        "holds only where sequence_length is at least 2 and at most 4: forward must not branch on a length" in sentence
    )
    assert "generated guard" not in sentence
    assert "L['input_ids']" not in sentence


def test_a_length_made_a_python_number_is_refused():
    module = Embedding(lambda ids, positions: positions[:, :1] + torch.arange(int(ids.shape[1])))
    assert "take lengths from tensor.shape and positions from position_ids" in traced_refusal(module)


def test_complex_rotary_tables_are_refused_with_what_to_write():
    class Complex(Plain):
        def more(self) -> None:
            angles = torch.outer(torch.arange(self.context).float(), torch.ones(self.size // 2))
            self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

        def turn(self, heads: Tensor, position_ids: Tensor) -> Tensor:
            pairs = torch.view_as_complex(heads.reshape(*heads.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * self.turns[position_ids][:, None]).flatten(3)

    assert "keep rotary tables as real cos and sin, not as complex numbers" in traced_refusal(Complex())


def test_half_precision_beside_attention_is_refused():
    class HalfMlp(Plain):
        def logits(self, hidden: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.head(hidden).float()

    sentence = traced_refusal(HalfMlp())
    assert "bfloat16" in sentence
    assert "leave out autocast and casts" in sentence


def test_calls_that_appear_only_while_traced_are_refused():
    class Twice(Plain):
        def apply_block(self, block: nn.ModuleDict, hidden: Tensor, position_ids: Tensor) -> Tensor:
            if torch.compiler.is_exporting():
                hidden = super().apply_block(block, hidden, position_ids)
            return super().apply_block(block, hidden, position_ids)

    assert "more attention calls while traced than when run" in traced_refusal(Twice())


def test_calls_that_disappear_while_traced_are_refused():
    class Fewer(Plain):
        def apply_block(self, block: nn.ModuleDict, hidden: Tensor, position_ids: Tensor) -> Tensor:
            if torch.compiler.is_exporting() and block is self.blocks[1]:
                return hidden
            return super().apply_block(block, hidden, position_ids)

    assert "made 1 attention calls while traced and 2 when run" in traced_refusal(Fewer(layers=2))


def test_an_encoders_own_mask_detection_does_not_stop_the_trace():
    module = Encoder()
    model = trace(module, observe(module, 20), "standard", 20)
    assert sum(value.name.startswith("past_key_values.") for value in model.graph.inputs) == 4
