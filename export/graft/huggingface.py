"""Adapts a Hugging Face decoder to the contract through transformers' two public hooks.

`AttentionInterface` passes each attention call with its settings (scaling, softcap, sinks). `AttentionMaskInterface`
requests each mask; the hook describes it instead of building it: causal, with which window. Unsupported settings are
refused by name. The code knows no architecture.

https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes  # masks are also requested in a trace

from pastkey.errors import ContractError, InputError
from pastkey.quiet import quiet

from ..graph.stored import StoredWeights
from .attention import AttentionCall, MaskSpec, attend, calling_line, described_mask, mask_spec
from .kernels import handed_over, recurrences_of
from .probe.observe import StandIn

GRAFT = "pastkey_graft"  # our name among transformers' attention implementations
NATIVE = "eager"  # transformers' plain attention, which every architecture has: the reference
_FAR = 1 << 17  # a position beyond any window
# Arguments that do not change attention: caches are off, and positions are already in q and k.
_HARMLESS = {
    "attention_mask", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "output_attentions", "output_hidden_states", "output_router_logits", "position_embeddings", "position_ids",
    "past_key_values", "return_dict", "use_cache",
}  # fmt: skip


class HuggingFaceDecoder(StandIn):
    """forward(input_ids, position_ids) -> logits (B, T, V) of a transformers model for causal language modelling.

    Without position_ids the model computes its own, against which those of the contract are checked.
    """

    def __init__(self, model: Any, stored: StoredWeights | None = None) -> None:
        """`stored`: those of its weights that stay in their file."""
        super().__init__(model)
        self.stored = stored
        self._recurrences = recurrences_of(model)
        self._native = False
        _register_hooks()
        self._experts: Callable[[], contextlib.AbstractContextManager[Any]] = _EveryExpert
        if hasattr(model, "set_experts_implementation"):  # transformers 5
            self._experts = contextlib.nullcontext
            with contextlib.suppress(ValueError):  # no experts
                model.set_experts_implementation("batched_mm")  # torch can trace it
        try:
            self._set_attention(GRAFT)
        except ValueError as error:
            raise ContractError(f"{type(model).__name__} does not support another attention: {error}") from None

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        with self._experts(), contextlib.nullcontext() if self._native else handed_over(self._recurrences):
            # Without a mask transformers looks for several sequences packed into a row.
            logits: Tensor = self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=torch.ones_like(input_ids),
                use_cache=False,
            ).logits
        return logits

    @contextlib.contextmanager
    def native(self) -> Iterator[None]:
        """While open, the model computes attention, masks and recurrences itself."""
        self._set_attention(NATIVE)
        self._native = True
        try:
            yield
        finally:
            self._set_attention(GRAFT)
            self._native = False

    def _set_attention(self, implementation: str) -> None:
        with quiet():  # hides transformers' advice
            self.model.set_attn_implementation(implementation)


class _EveryExpert(TorchFunctionMode):
    """Makes transformers 4 loop over all experts: torch cannot trace its loop over the experts that have tokens.

    The loop runs over `(tokens per expert > 0).nonzero()`. An expert without tokens adds nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.nonzero, torch.nonzero) and args[0].dim() == 1 and args[0].dtype == torch.bool:
            return [torch.tensor([expert]) for expert in range(args[0].shape[0])]
        return func(*args, **(kwargs or {}))


def freeze_rotary(model: Any, context_length: int) -> None:
    """Freezes rotary frequencies that depend on the sequence length at those for up to `context_length` tokens.

    Raises InputError if they change within the context: cached keys would have been rotated by other angles.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        found = [k for k in (kinds.values() if isinstance(kinds, dict) else [kinds]) if isinstance(k, str)]
        moving = [kind for kind in found if kind == "longrope" or "dynamic" in kind]
        if not moving:
            continue
        longest = _constant_until(module)
        if context_length > longest:
            raise InputError(
                f"the rotary positions of {type(model).__name__} ({moving[0]}) change once a text is longer than "
                f"{longest} tokens, which no cache survives: export with --context {longest} or less"
            )
        module.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"


def _constant_until(rotary: Any) -> int:
    """The longest sequence, in tokens, for which a transformers rotary embedding keeps its initial frequencies."""
    config = rotary.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    name = "original_max_position_embeddings"
    lengths = [d[name] for d in (rope, *rope.values()) if isinstance(d, dict) and name in d]
    return int(min(lengths) if lengths else getattr(config, name, None) or rotary.original_max_seq_len)


def _register_hooks() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(GRAFT, _attention)
    AttentionMaskInterface.register(GRAFT, _mask)


def _attention(
    module: nn.Module,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, K, T, D)
    value: Tensor,  # (B, K, T, Dv)
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: (B, T, H, Dv) and no weights."""
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if unknown:
        raise ContractError(
            f"{type(module).__name__} computes attention with {', '.join(unknown)}, which the graft cannot carry over"
        )
    spec = mask_spec(attention_mask)
    if spec is None and attention_mask is None and (is_causal is False or not getattr(module, "is_causal", True)):
        raise ContractError(f"{type(module).__name__} is not causal: only decoders can be exported")
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        mask=attention_mask if spec is None else None,
        dropout=dropout,
        is_causal=spec is not None or attention_mask is None,
        scale=float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5,
        where=calling_line(),
        # transformers' own attention uses only the mask; `sliding_window` is for kernels that build no mask.
        window=sliding_window if spec is None else spec.window,
        softcap=softcap,
        sinks=s_aux,
    )
    return attend(call).transpose(1, 2).contiguous(), None


def _mask(*_: Any, mask_function: Callable[..., Any], **__: Any) -> Tensor:
    """transformers' mask function: describes the pairs that `mask_function(batch, head, query, key)` allows.

    Some masks are built but never used, so an unsupported mask is refused only by an attention call that uses it.
    """
    with _disable_current_modes():
        spec = _describe(mask_function)
    return described_mask(spec)


def _describe(allowed: Callable[..., Any]) -> MaskSpec:
    seen = _row(allowed, _FAR)
    if not seen[_FAR] or seen[_FAR + 1 :].any():
        return MaskSpec(unsupported="is not causal: a decoder's token sees itself and earlier ones, and only those")
    window = None if seen[0] else int(seen.sum())
    for query in (0, 1, _FAR // 2, _FAR - 1, _FAR):
        key = torch.arange(_FAR + 2)
        expected = (key <= query) & (key > query - (window or _FAR + 2))
        if not torch.equal(_row(allowed, query), expected):
            return MaskSpec(
                unsupported="is neither causal nor a causal window (chunked or prefix attention, say), which the graft "
                "cannot carry over"
            )
    return MaskSpec(window)


def _row(allowed: Callable[..., Any], query: int) -> Tensor:
    """Which keys the token at `query` attends to."""
    zero = torch.zeros((), dtype=torch.long)
    row = allowed(zero, zero, torch.tensor(query), torch.arange(_FAR + 2))
    return torch.as_tensor(row).expand(_FAR + 2)
