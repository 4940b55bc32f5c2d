"""What is learned from running a module, and which modules do not keep the contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pastkey.contract.bundle import KVGeometry
from pastkey.errors import ContractError, NumericsError
from pastkey.export.graft.probe.observe import (
    UnkeptError,
    observe,
    random_ids,
    require_finite,
    run_on,
    run_uncached,
)

from ...decoders import MultiHead, NanoGpt, Plain, Twice, Wrapper
from ..plain import plain


def reason(module: nn.Module, context: int = 20) -> str:
    with pytest.raises(UnkeptError) as caught:
        observe(module, context)
    return str(caught.value)


def test_the_geometry_is_what_the_calls_receive():
    observation = observe(Plain(heads=6, kv_heads=2, size=10, value_size=12, layers=3), 20)
    assert observation.geometry == (KVGeometry(kv_heads=2, key_head_size=10, value_head_size=12),) * 3
    assert [layer.heads for layer in observation.layers] == [6, 6, 6]
    assert observation.vocab_size == 37


def test_a_block_applied_twice_is_two_layers():
    assert len(observe(Twice(size=10, kv_heads=2), 20).layers) == 2


def test_a_layer_names_its_submodule_and_line():
    layers = observe(MultiHead(layers=2), 20).layers
    assert [layer.module for layer in layers] == ["blocks.0.attention", "blocks.1.attention"]
    assert all(layer.where.startswith("decoders.py:") for layer in layers)


@pytest.mark.parametrize("context", [2, 20])
def test_no_longer_text_is_tried_than_the_context(context):
    assert observe(NanoGpt(context=context), context).vocab_size == 65  # NanoGpt asserts the length


def test_running_with_a_cache_gives_what_running_without_gives():
    module = Plain(kv_heads=2, layers=2)
    ids = random_ids(2, 9, 37)
    whole = run_uncached(module, ids)
    part = run_on(module, run_uncached(module, ids[:, :5]), ids[:, 5:]).logits
    torch.testing.assert_close(part, whole.logits[:, 5:], rtol=1e-5, atol=1e-6)
    assert [tuple(keys.shape) for keys in whole.keys] == [(2, 2, 9, 8)] * 2


# --- attention ----------------------------------------------------------------------------------------------------
def test_attention_must_be_seen():
    module = plain({"apply_block": lambda m, block, hidden, at: hidden})
    assert "made no call of F.scaled_dot_product_attention" in reason(module)


def attending(arguments: Callable[[int], dict[str, Any]]) -> nn.Module:
    """Passes `arguments(length)` to the call."""

    def attend(m: Plain, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **arguments(query.shape[2]))

    return plain({"attend": attend})


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def alibi(length: int) -> Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    slopes = 2.0 ** -torch.arange(1, 5)[:, None, None]
    return (-slopes * distance).masked_fill(~causal(length), float("-inf"))


def test_attention_must_be_causal():
    sentence = reason(attending(lambda length: {}))
    assert "attention call 0 (test_observe.py:" in sentence
    assert "is not causal" in sentence


@pytest.mark.parametrize(
    "mask",
    [
        lambda length: causal(length).triu(-2),
        lambda length: causal(length).triu(-18),  # one short of the context
        lambda length: torch.ones(length, length, dtype=torch.bool),
        lambda length: causal(length) & (torch.arange(length) != 1),
        alibi,
        lambda length: causal(length).float(),
        lambda length: causal(length)[:1],
    ],
    ids=["window_of_3", "window_of_19", "all_ones", "padding", "alibi", "floats", "one_row"],
)
def test_a_mask_must_be_the_causal_one(mask):
    assert "is not" in reason(attending(lambda length: {"attn_mask": mask(length)}))


@pytest.mark.parametrize(
    "mask",
    [
        causal,
        lambda length: causal(length)[None, None],
        lambda length: torch.zeros(length, length).masked_fill(~causal(length), float("-inf")),
        lambda length: torch.zeros(length, length).masked_fill(~causal(length), torch.finfo(torch.float32).min),
    ],
    ids=["bool", "bool_of_four_axes", "minus_infinity", "lowest_number"],
)
def test_the_causal_mask_is_accepted_in_every_form(mask):
    assert len(observe(attending(lambda length: {"attn_mask": mask(length)}), 20).layers) == 1


def merged(m: Plain, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Heads merged into the batch."""
    rows = len(query)
    query, key, value = (t.flatten(0, 1) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).unflatten(0, (rows, -1))


def deeper(m: Plain, ids: Tensor, at: Tensor) -> Tensor:
    """As many layers as tokens."""
    hidden = Plain.embed(m, ids, at)
    for _ in range(ids.shape[1]):
        hidden = m.apply_block(m.blocks[0], hidden, at)  # type: ignore[arg-type]
    return hidden


def autocast(m: Plain, block: nn.ModuleDict, hidden: Tensor, at: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return Plain.apply_block(m, block, hidden, at)


def needs_mask(m: Plain, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return Plain.forward(m, input_ids, position_ids)


UNKEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (lambda: attending(lambda length: {"is_causal": True, "dropout_p": 0.1}), "drops out attention weights"),
    "merged heads": (lambda: plain({"attend": merged}), "received query, key and value of shapes (8, 1, 7, 8)"),
    "a layer per token": (lambda: plain({"embed": deeper}), "makes different attention calls for different lengths"),
    "autocast": (lambda: plain({"apply_block": autocast}), "computes in torch.bfloat16"),
    "a mask that must be given": (lambda: plain({"forward": needs_mask}), "required positional argument"),
    "a table too short": (lambda: plain(context=19), "IndexError"),
} | {
    f"{name} as logits": (lambda change=change: plain({"logits": lambda m, hidden: change(m.head(hidden))}), "returned")
    for name, change in {
        "a tuple": lambda logits: (logits, None),
        "a dictionary": lambda logits: {"logits": logits},
        "the last": lambda logits: logits[:, -1:],
        "time first": lambda logits: logits.transpose(0, 1),
        "half precision": lambda logits: logits.half(),
        "infinity": lambda logits: logits / 0,
    }.items()
}


@pytest.mark.parametrize("name", UNKEPT)
def test_what_is_not_of_the_contract_is_told(name):
    build, words = UNKEPT[name]
    assert words in reason(build())


def test_a_forward_that_takes_anything_is_accepted():
    assert observe(Wrapper(Plain()), 20).vocab_size == 37


def test_a_head_wider_than_the_embedding_is_refused():
    module = Plain()
    module.head = nn.Linear(32, 40)
    with pytest.raises(ContractError, match="returns logits of 40 tokens and embeds 37"):
        observe(module, 20)


# --- weights ------------------------------------------------------------------------------------------------------
def test_a_weight_that_is_not_finite_is_named():
    module = Plain()
    with torch.no_grad():
        module.blocks[0]["q"].weight[3, 4] = float("inf")
    with pytest.raises(NumericsError, match=r"the weight blocks\.0\.q\.weight of Plain holds NaN or infinity"):
        require_finite(module)


def test_a_buffer_may_hold_infinity():
    module = Plain()
    module.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    assert observe(module, 20).vocab_size == 37
