"""The recurrences and convolutions of transformers, by the names of the kernels that may replace them."""

import importlib

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers.integrations.hub_kernels", reason="transformers is not installed")

from pastkey.errors import ContractError
from pastkey.export.compare import logits_difference
from pastkey.export.graft.attention import intercept, torch_attention
from pastkey.export.graft.huggingface import HuggingFaceDecoder
from pastkey.export.graft.kernels import handed_over, recurrences_of
from pastkey.export.graft.probe.contract import in_contract
from pastkey.export.graft.states import StateCall, StateError

from ...shared import divided
from ..families import CONTEXT, build

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of each version others


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def delta(length: int, *, channels: bool) -> dict[str, Tensor]:
    decay = -numbers(2, length, 4, *([16] if channels else [])).abs()
    query, key = numbers(2, length, 4, 16), (numbers(2, length, 4, 16) + 1) / 6
    beta = numbers(2, length, 4).sigmoid()
    return {"query": query, "key": key, "value": numbers(2, length, 4, 24), "g": decay, "beta": beta}


def mamba_2(length: int) -> dict[str, Tensor]:
    ends = {"B": numbers(2, length, 2, 16), "C": numbers(2, length, 2, 16)}
    return {"hidden_states": numbers(2, length, 8, 12), "dt": numbers(2, length, 8), "A": -numbers(8).abs(), **ends}


def mamba_1(length: int) -> dict[str, Tensor]:
    ends = {"B": numbers(2, 6, length), "C": numbers(2, 6, length)}
    return {"hidden_states": numbers(2, 10, length), "dt": numbers(2, 10, length), "A": -numbers(10, 6).abs(), **ends}


def rows(length: int) -> dict[str, Tensor]:
    return {"hidden_states": numbers(2, 10, length), "weight": numbers(10, 4)}


STEP = {"dt_bias": numbers(8), "dt_softplus": True, "dt_limit": (0.1, 0.9), "D": numbers(8), "chunk_size": 32}
# a file of transformers, a function in it, its arguments by the length of the text, further ones, the axis of time
FUNCTIONS = {
    "gated delta": ("qwen3_5", "torch_chunk_gated_delta_rule", lambda n: delta(n, channels=False), {}, 1),
    "normed": (
        "qwen3_5", "torch_chunk_gated_delta_rule", lambda n: delta(n, channels=False),
        {"use_qk_l2norm_in_kernel": True}, 1,
    ),
    "kda": ("kimi_linear", "chunk_kimi_delta_attention", lambda n: delta(n, channels=True), {}, 1),
    "mamba 2": ("mamba2", "mamba2_chunk_scan", mamba_2, {"chunk_size": 32, "dt_softplus": True}, 1),
    "mamba 2, steered": ("granitemoehybrid", "mamba2_chunk_scan", mamba_2, STEP, 1),
    "mamba 1": ("jamba", "mamba_selective_scan", mamba_1, {"delta_softplus": True, "D": numbers(10)}, 2),
    "convolution": ("qwen3_5", "causal_conv1d_fn", rows, {"activation": "silu", "bias": numbers(10)}, 2),
    "another activation": ("lfm2", "causal_conv1d_fn", rows, {"activation": "gelu"}, 2),
}  # fmt: skip
VARIES = ("query", "key", "value", "g", "beta", "hidden_states", "dt", "B", "C")  # along time


def called(file: str, function: str, **given: object) -> Tensor:
    """The return value of that file's function, as the file's own code would call it."""
    module = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    found = getattr(module, function)(**given)
    return found[0] if isinstance(found, tuple) else found


def a_layer_of(file: str) -> nn.Module:
    return type("Layer", (nn.Module,), {"__module__": f"transformers.models.{file}.modeling_{file}"})()


@pytest.mark.parametrize("length", [1, 7, 70])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_call_with_a_state_computes_what_the_function_computes_also_in_two_parts(name, length):
    file, function, arguments, further, axis = FUNCTIONS[name]
    given = arguments(length)
    expected = called(file, function, **given, **further)
    with handed_over(recurrences_of(a_layer_of(file))):
        assert logits_difference(expected, called(file, function, **given, **further)) < 1e-5
    state, found, cut = None, [], length // 3

    def go_on(call: StateCall) -> Tensor:
        nonlocal state
        output, state = call.over(state)
        assert state.shape[1:] == call.geometry.shape
        return output

    with handed_over(recurrences_of(a_layer_of(file))), intercept(torch_attention, states=go_on):
        for start, end in ((0, cut), (cut, length)) if cut else ((0, length),):
            part = {
                name: value.narrow(axis, start, end - start) if name in VARIES else value
                for name, value in given.items()
            }
            found.append(called(file, function, **part, **further))
    assert logits_difference(expected, torch.cat(found, axis)) < 1e-5


def test_an_argument_that_is_not_known_is_refused_by_its_name():
    with handed_over(recurrences_of(a_layer_of("mamba2"))), pytest.raises(StateError, match="initial_states"):
        called("mamba2", "mamba2_chunk_scan", **mamba_2(3), chunk_size=8, initial_states=numbers(2, 8, 12, 16))


WRAPPED = [
    ("qwen3_5_text", "torch_chunk_gated_delta_rule"), ("qwen3_5_text", "causal_conv1d_fn"),
    ("granitemoehybrid+mamba", "mamba2_chunk_scan"), ("granitemoehybrid+mamba", "causal_conv1d_fn"),
    ("jamba", "mamba_selective_scan"), ("kimi_linear", "chunk_kimi_delta_attention"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name"), divided(WRAPPED, quick=WRAPPED[:1], ci=WRAPPED[:1]))
def test_a_recurrence_that_is_not_found_is_never_exported_without_its_state(family, name, monkeypatch):
    """As in another release of transformers, or where a kernel's package replaces the function."""
    model = build(family)
    module = importlib.import_module(type(model).__module__)
    monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    with pytest.raises(ContractError, match="with a cache"):
        in_contract(HuggingFaceDecoder(model), CONTEXT, None, lambda _: None)
