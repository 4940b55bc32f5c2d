"""What is learned from running a module, and the sentence for each module that the graft cannot take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pastkey.bundle import KVGeometry
from pastkey.errors import ContractError, NumericsError
from pastkey.export.observe import observe, random_ids, run_cached, run_uncached

from .decoders import BufferedMask, Experts, FiveTimes, MultiHead, NanoGpt, OneHead, Plain, Wrapper


def refusal(module: nn.Module, context: int = 20) -> str:
    with pytest.raises(ContractError) as caught:
        observe(module, context)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert " None " not in sentence
    return sentence


def test_the_geometry_is_what_the_calls_receive() -> None:
    observation = observe(Plain(heads=6, kv_heads=2, size=10, value_size=12, layers=3), 20)
    assert observation.geometry == (KVGeometry(kv_heads=2, key_head_size=10, value_head_size=12),) * 3
    assert [layer.heads for layer in observation.layers] == [6, 6, 6]
    assert observation.vocab_size == 37


def test_a_block_applied_five_times_is_five_layers() -> None:
    assert len(observe(FiveTimes(size=10, kv_heads=2), 20).layers) == 5


def test_a_layer_names_its_submodule_and_line() -> None:
    layers = observe(MultiHead(layers=2), 20).layers
    assert [layer.module for layer in layers] == ["blocks.0.attention", "blocks.1.attention"]
    assert all(layer.where.startswith("decoders.py:") for layer in layers)


@pytest.mark.parametrize("context", [2, 3, 8, 20])
def test_no_longer_text_is_tried_than_the_context(context: int) -> None:
    assert observe(NanoGpt(context=context), context).vocab_size == 65  # NanoGpt asserts the length


def test_as_many_experts_as_tokens_are_no_attention_by_hand() -> None:
    assert len(observe(Experts(), 20).layers) == 1


def test_the_module_is_left_as_it_was() -> None:
    module = NanoGpt().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    observe(module, 20)
    assert all(child.training for child in module.modules())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_module_in_training_mode_runs_as_if_it_were_not() -> None:
    class Strict(Plain):
        def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().embed(input_ids, position_ids)

    assert observe(Strict().train(), 20).vocab_size == 37


def test_hooks_are_removed_after_a_refusal() -> None:
    module = LastPosition()
    refusal(module)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_running_with_a_cache_gives_what_running_without_gives() -> None:
    module = Plain(kv_heads=2, layers=2)
    ids = random_ids(2, 9, 37)
    whole = run_uncached(module, ids)
    part = run_cached(module, run_uncached(module, ids[:, :5]), ids[:, 5:])
    torch.testing.assert_close(part, whole.logits[:, 5:], rtol=1e-5, atol=1e-6)
    assert [tuple(keys.shape) for keys in whole.keys] == [(2, 2, 9, 8)] * 2


# --- attention that the graft cannot take -------------------------------------------------------------------------
class ByHand(Plain):
    softmax = staticmethod(lambda scores: scores.softmax(-1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = query.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (query @ key.transpose(-2, -1) * 0.35).masked_fill(hidden, float("-inf"))
        return self.softmax(scores) @ value


class ByHandFunctional(ByHand):
    softmax = staticmethod(lambda scores: F.softmax(scores, dim=-1))


class ByHandModule(ByHand):
    softmax = nn.Softmax(dim=-1)


class ByHandExp(ByHand):
    softmax = staticmethod(lambda scores: scores.exp() / scores.exp().sum(-1, keepdim=True))


class OneLayerByHand(ByHand):
    calls = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.calls += 1
        return super().attend(query, key, value) if self.calls % 2 else Plain.attend(self, query, key, value)


@pytest.mark.parametrize("build", [ByHand, ByHandFunctional, ByHandModule, ByHandExp, lambda: OneLayerByHand(layers=2)])
def test_attention_by_hand_is_refused_with_what_to_write(build: Callable[[], nn.Module]) -> None:
    sentence = refusal(build())
    assert "computes attention by hand, a softmax over (7, 7) scores" in sentence
    assert "test_observe.py:" in sentence
    assert "F.scaled_dot_product_attention(q, k, v, is_causal=True)" in sentence


def test_multihead_attention_that_returns_its_weights_is_refused() -> None:
    class Weights(MultiHead):
        def apply_block(self, block: nn.ModuleDict, hidden: Tensor, position_ids: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1])
            x = hidden.transpose(0, 1)
            return hidden + block["attention"](x, x, x, attn_mask=mask)[0].transpose(0, 1)

    assert "with nn.MultiheadAttention, pass need_weights=False" in refusal(Weights())


def test_no_attention_at_all_is_refused() -> None:
    class Bigram(Plain):
        def apply_block(self, block: nn.ModuleDict, hidden: Tensor, position_ids: Tensor) -> Tensor:
            return hidden

    assert "made no call of F.scaled_dot_product_attention" in refusal(Bigram())


class Attending(Plain):
    """Passes `arguments(length)` to the call."""

    def __init__(self, arguments: Callable[[int], dict[str, Any]]) -> None:
        super().__init__()
        self.arguments = arguments

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **self.arguments(query.shape[2]))


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def alibi(length: int) -> Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    slopes = 2.0 ** -torch.arange(1, 5)[:, None, None]
    return (-slopes * distance).masked_fill(~causal(length), float("-inf"))


def test_attention_that_is_not_causal_is_refused() -> None:
    sentence = refusal(Attending(lambda length: {}))
    assert "attention call 0 (test_observe.py:" in sentence
    assert "is not causal" in sentence
    assert "is_causal=True" in sentence


@pytest.mark.parametrize(
    "mask",
    [
        lambda length: causal(length).triu(-2),  # a window of three
        lambda length: causal(length).triu(-9),  # one that only a text of more than ten tokens shows
        lambda length: causal(length).triu(-18),  # one short of the context
        lambda length: torch.ones(length, length, dtype=torch.bool),
        alibi,
        lambda length: torch.zeros(length, length),
    ],
    ids=["window_of_3", "window_of_10", "window_of_19", "all_ones", "alibi", "zeros"],
)
def test_a_mask_that_is_not_the_causal_one_is_refused(mask: Callable[[int], Tensor]) -> None:
    sentence = refusal(Attending(lambda length: {"attn_mask": mask(length)}))
    assert "passes an attn_mask that is not the causal one" in sentence
    assert "write F.scaled_dot_product_attention(q, k, v, is_causal=True) without a mask" in sentence


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
def test_the_causal_mask_is_accepted_in_every_form(mask: Callable[[int], Tensor]) -> None:
    assert len(observe(Attending(lambda length: {"attn_mask": mask(length)}), 20).layers) == 1


def test_dropout_outside_training_is_refused() -> None:
    sentence = refusal(Attending(lambda length: {"is_causal": True, "dropout_p": 0.1}))
    assert "drops out attention weights with probability 0.1" in sentence
    assert "dropout_p=self.dropout if self.training else 0.0" in sentence


def test_heads_merged_into_the_batch_are_refused_with_both_shapes() -> None:
    class Merged(Plain):
        def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            flat = (t.flatten(0, 1) for t in (query, key, value))
            return F.scaled_dot_product_attention(*flat, is_causal=True).unflatten(0, (len(query), -1))

    sentence = refusal(Merged())
    assert "(8, 1, 7, 8)" in sentence
    assert "expected (B, heads, T, head size)" in sentence


def test_a_number_of_calls_that_depends_on_the_length_is_refused() -> None:
    class Deeper(Plain):
        def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            hidden = super().embed(input_ids, position_ids)
            for _ in range(input_ids.shape[1]):
                hidden = self.apply_block(self.blocks[0], hidden, position_ids)
            return hidden

    assert "different attention calls for different lengths (8 and 6)" in refusal(Deeper())


def test_a_bfloat16_attention_call_is_refused() -> None:
    class Autocast(Plain):
        def apply_block(self, block: nn.ModuleDict, hidden: Tensor, position_ids: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().apply_block(block, hidden, position_ids)

    sentence = refusal(Autocast())
    assert "computes in torch.bfloat16" in sentence
    assert "autocast" in sentence


# --- forward ------------------------------------------------------------------------------------------------------
class LastPosition(Plain):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden[:, -1:])


class Returning(Plain):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def logits(self, hidden: Tensor) -> Any:
        return self.change(self.head(hidden))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda logits: (logits, None), "returned a tuple of 2: return the logits alone"),
        (lambda logits: {"logits": logits}, "returned a dict: return the logits alone"),
        (lambda logits: None, "returned a NoneType: return the logits alone"),
        (lambda logits: logits[:, -1], "returned shape (2, 37) for 2 rows of 7 tokens: return logits (B, T, V)"),
        (lambda logits: logits.transpose(0, 1), "returned shape (7, 2, 37)"),
        (lambda logits: logits.half(), "returned torch.float16 logits: return float32"),
        (lambda logits: logits.double(), "returned torch.float64 logits: return float32"),
        (lambda logits: logits / 0, "returned NaN or infinity in its logits"),
    ],
    ids=["tuple", "dict", "nothing", "two_axes", "sequence_first", "half", "double", "not_finite"],
)
def test_anything_but_float32_logits_of_every_position_is_refused(change: Callable[[Tensor], Any], words: str) -> None:
    assert words in refusal(Returning(change))


def test_logits_of_the_last_position_only_are_refused() -> None:
    sentence = refusal(LastPosition())
    assert "returned logits of the last position only, (2, 1, 37) for 7 tokens" in sentence
    assert "return the logits of every position, (B, T, V)" in sentence


def test_a_forward_without_position_ids_is_refused() -> None:
    class NoPositions(Plain):
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
            return super().forward(idx, torch.arange(idx.shape[1])[None])

    sentence = refusal(NoPositions())
    assert "forward(idx, targets) of NoPositions does not take position_ids" in sentence
    assert "forward(input_ids, position_ids) -> logits (B, T, V)" in sentence


def test_a_forward_that_takes_anything_is_accepted() -> None:
    assert observe(Wrapper(Plain()), 20).vocab_size == 37


def test_a_forward_that_needs_more_is_refused() -> None:
    class NeedsMask(Plain):
        def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids, position_ids)

    assert "missing 1 required positional argument: 'attention_mask'" in refusal(NeedsMask())


def test_an_error_in_forward_is_told_with_its_line() -> None:
    class Broken(Plain):
        def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            raise KeyError("wte")

    sentence = refusal(Broken())
    assert "Broken failed on input_ids and position_ids of shape (2, 7) at test_observe.py:" in sentence
    assert "KeyError: 'wte'" in sentence


@pytest.mark.parametrize("build", [Plain, BufferedMask, OneHead])
def test_a_context_longer_than_the_position_table_is_refused(build: Callable[..., nn.Module]) -> None:
    sentence = refusal(build(context=16, heads=1), context=17)
    assert "fails at position 16, the last of a context of 17 tokens, at decoders.py:" in sentence
    assert "IndexError" in sentence


def test_a_head_wider_than_the_embedding_is_refused() -> None:
    module = Plain()
    module.head = nn.Linear(32, 40)
    assert "returns logits of 40 tokens and embeds 37" in refusal(module)


# --- weights ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_module_that_is_not_float32_is_refused(dtype: torch.dtype) -> None:
    assert f"is {dtype}: call module.float() first" in refusal(Plain().to(dtype))


def test_a_buffer_that_is_not_float32_is_refused() -> None:
    module = Plain()
    module.register_buffer("frequencies", torch.ones(4, dtype=torch.float64))
    assert "frequencies of Plain is torch.float64" in refusal(module)


def test_a_module_on_another_device_is_refused() -> None:
    assert "token.weight of Plain is on meta: call module.cpu() first" in refusal(Plain().to("meta"))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(number: float) -> None:
    module = Plain()
    with torch.no_grad():
        module.blocks[0]["q"].weight[3, 4] = number
    with pytest.raises(NumericsError, match=r"the weight blocks\.0\.q\.weight of Plain holds NaN or infinity"):
        observe(module, 20)


def test_a_buffer_may_hold_infinity() -> None:
    module = Plain()
    module.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    assert observe(module, 20).vocab_size == 37
