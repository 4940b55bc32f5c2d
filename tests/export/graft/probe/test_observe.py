"""The facts learned from running a module, and which modules do not keep the contract."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pastkey.contract.bundle import KVGeometry
from pastkey.errors import ContractError, NumericsError
from pastkey.export.graft.probe.observe import UnkeptError, observe, random_ids, require_finite, run_uncached

from ...decoders import MultiHead, NanoGpt, Plain, Twice, Wrapper
from ..plain import plain, steps


def test_the_geometry_is_what_the_calls_receive():
    observation = observe(Plain(heads=6, kv_heads=2, size=10, value_size=12, layers=3), 20)
    assert observation.geometry == (KVGeometry(kv_heads=2, key_head_size=10, value_head_size=12),) * 3
    assert [layer.heads for layer in observation.layers] == [6, 6, 6]
    assert observation.vocab_size == 37
    assert len(observe(Twice(size=10, kv_heads=2), 20).layers) == 2  # one block, applied twice


def test_a_layer_names_its_line():
    layers = observe(MultiHead(layers=2), 20).layers
    assert all(layer.where.startswith("decoders.py:") for layer in layers)


@pytest.mark.parametrize("context", [2, 20])
def test_no_longer_text_is_tried_than_the_context(context):
    assert observe(NanoGpt(context=context), context).vocab_size == 65  # NanoGpt asserts the length


def test_running_with_a_cache_gives_what_running_without_gives():
    module = Plain(kv_heads=2, layers=2)
    ids = random_ids(2, 9, 37)
    whole = run_uncached(module, ids)
    torch.testing.assert_close(steps(module, ids, 5, 9), whole.logits, rtol=1e-5, atol=1e-6)
    assert [tuple(keys.shape) for keys in whole.keys] == [(2, 2, 9, 8)] * 2


# --- what keeps the contract --------------------------------------------------------------------------------------
def attending(arguments):
    """Passes `arguments(length)` to the call."""
    return plain({"attend": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, **arguments(q.shape[2]))})


def masked(mask):
    return attending(lambda length: {"attn_mask": mask(length)})


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


def added(lowest):
    """The causal mask in numbers."""
    return lambda length: torch.zeros(length, length).masked_fill(~causal(length), lowest)


def alibi(length):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (-(2.0 ** -torch.arange(1, 5)[:, None, None]) * distance).masked_fill(~causal(length), float("-inf"))


def with_infinite_buffer():
    module = Plain()
    module.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    return module


KEPT = {
    "a causal mask": lambda: masked(causal),
    "of four axes": lambda: masked(lambda length: causal(length)[None, None]),
    "of minus infinity": lambda: masked(added(float("-inf"))),
    "of the lowest number": lambda: masked(added(torch.finfo(torch.float32).min)),
    "a forward that takes anything": lambda: Wrapper(Plain()),
    "a buffer that holds infinity": with_infinite_buffer,
}


@pytest.mark.parametrize("name", KEPT)
def test_a_module_of_the_contract_is_observed(name):
    observation = observe(KEPT[name](), 20)
    assert (len(observation.layers), observation.vocab_size) == (1, 37)


MASKS = {
    "window_of_3": lambda length: causal(length).triu(-2),
    "window_of_19": lambda length: causal(length).triu(-18),  # one short of the context
    "all_ones": lambda length: torch.ones(length, length, dtype=torch.bool),
    "padding": lambda length: causal(length) & (torch.arange(length) != 1),
    "alibi": alibi,
    "floats": lambda length: causal(length).float(),
    "one_row": lambda length: causal(length)[:1],
}


def merged(m, query, key, value):
    """Heads merged into the batch."""
    rows = len(query)
    query, key, value = (t.flatten(0, 1) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).unflatten(0, (rows, -1))


def deeper(m, ids, at):
    """As many layers as tokens."""
    hidden = Plain.embed(m, ids, at)
    for _ in range(ids.shape[1]):
        hidden = m.apply_block(m.blocks[0], hidden, at)
    return hidden


def autocast(m, block, hidden, at):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return Plain.apply_block(m, block, hidden, at)


LOGITS = {
    "a tuple": lambda m, hidden: (m.head(hidden), None),
    "the last": lambda m, hidden: m.head(hidden)[:, -1:],
    "half precision": lambda m, hidden: m.head(hidden).half(),
    "infinity": lambda m, hidden: m.head(hidden) / 0,
}
UNKEPT = {
    "no attention": (
        lambda: plain({"apply_block": lambda m, block, hidden, at: hidden}), "made no call of F.scaled_dot"
    ),
    "no mask": (lambda: attending(lambda length: {}), r"attention call 0 \(test_observe.py:.*is not causal"),
    "dropout": (lambda: attending(lambda length: {"is_causal": True, "dropout_p": 0.1}), "drops out attention weights"),
    "merged heads": (lambda: plain({"attend": merged}), r"received query, key and value of shapes \(8, 1, 7, 8\)"),
    "a layer per token": (lambda: plain({"embed": deeper}), "makes different attention calls for different lengths"),
    "autocast": (lambda: plain({"apply_block": autocast}), "computes in torch.bfloat16"),
    "a mask that must be given": (
        lambda: plain({"forward": lambda m, input_ids, position_ids, mask: m.head(m.token(input_ids))}),
        "required positional argument",
    ),
    "a table too short": (lambda: plain(context=19), "IndexError"),
}  # fmt: skip
UNKEPT |= {name: (partial(masked, mask), "is not") for name, mask in MASKS.items()}
UNKEPT |= {f"{name} as logits": (partial(plain, {"logits": change}), "returned") for name, change in LOGITS.items()}


@pytest.mark.parametrize("name", UNKEPT)
def test_what_is_not_of_the_contract_is_told(name):
    build, words = UNKEPT[name]
    with pytest.raises(UnkeptError, match=words):
        observe(build(), 20)


def test_a_head_wider_than_the_embedding_and_a_weight_that_is_not_finite_are_refused():
    with pytest.raises(ContractError, match="returns logits of 40 tokens and embeds 37"):
        observe(plain({"more": lambda m: setattr(m, "head", nn.Linear(32, 40))}), 20)
    module = Plain()
    with torch.no_grad():
        module.blocks[0]["q"].weight[3, 4] = float("inf")
    with pytest.raises(NumericsError, match=r"the weight blocks\.0\.q\.weight of Plain holds NaN or infinity"):
        require_finite(module)
