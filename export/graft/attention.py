"""Intercepts every attention call of a module: `intercept` passes each call to a handler instead of torch.

Two mechanisms are needed. A TorchFunctionMode sees the function itself, also if a file says `from
torch.nn.functional import scaled_dot_product_attention`. torch suspends the mode while it runs its own Python
functions (nn.MultiheadAttention, nn.TransformerEncoderLayer); these reach a replaced
`F.scaled_dot_product_attention`. For a library with a public attention hook, the hook calls `attend`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pastkey.errors import ContractError

from .states import StateCall, StateHandler

_ATTENTION = F.scaled_dot_product_attention
_MASK_SPEC = "pastkey_mask_spec"
_REPLACING = threading.RLock()
_NOT_THE_USERS = (Path(__file__).parents[1], Path(torch.__file__).parent)


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one scaled_dot_product_attention call, with tensors as (B, heads, T, D)."""

    query: Tensor  # (B, H, T, D)
    key: Tensor  # (B, K, T, D)
    value: Tensor  # (B, K, T, Dv)
    mask: Tensor | None  # attn_mask, as the module passed it
    dropout: float
    is_causal: bool
    scale: float  # factor on the scores
    where: str  # file:line of the call, for error messages
    # Features that scaled_dot_product_attention has no argument for.
    window: int | None = None  # number of tokens that a token attends to, itself included
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap)
    sinks: Tensor | None = None  # (H,) one more score per head in the softmax, without a value
    bias: Tensor | None = None  # (H or 1, context) added to the scores by distance: query - key position
    # Custom weights (B, H', T, S) from plain q kᵀ (B, H, T, S) and S; the queries are the last T of S tokens. Queries
    # and keys may be concatenations of parts, with the widths in `parts`, and each part has its own scores.
    weights: Callable[[list[Tensor], Any], Tensor] | None = None
    parts: tuple[int, ...] = ()
    # Parts of one latent row (B, 1, T, Dk + Dv) that serve as keys and as values alike: the value, which the queries
    # (B, H, T, Dk + Dv) read behind the key; or the whole row, which is also summed: the result is (B, H, T, Dk + Dv).
    shared: Literal["none", "value", "row"] = "none"

    def keys(self, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The parts of the queries, each with the cached part (B, K, S, D) that it is multiplied with."""
        if self.shared == "none":
            return [(self.query, key)]
        parts = [key.shape[3], value.shape[3]]
        return list(zip(self.query.split(parts, 3), (key, value), strict=True))

    def values(self, key: Tensor, value: Tensor) -> list[Tensor]:
        """The cached parts (B, K, S, D) whose weighted sums are the result."""
        return [key, value] if self.shared == "row" else [value]

    @property
    def groups(self) -> int:
        """How many query heads share one key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def fused_attributes(self) -> dict[str, Any]:
        """The attributes of GroupQueryAttention for this call."""
        attributes: dict[str, Any] = {"num_heads": self.query.shape[1], "kv_num_heads": self.key.shape[1]}
        attributes["scale"] = self.scale
        if self.window is not None:
            attributes["local_window_size"] = self.window
        if self.softcap is not None:
            attributes["softcap"] = self.softcap
        return attributes

    @property
    def special(self) -> str | None:
        """The feature of this call that GroupQueryAttention cannot compute, if any."""
        if self.weights is not None:
            return "attention weights that are not a softmax of scores and a mask"
        if self.shared != "none":
            return "a latent row that is key and value of all heads"
        return None if self.bias is None else "a bias on its scores (ALiBi or relative positions, say)"


@dataclass(frozen=True)
class RowsCall:
    """Rows that an operator mixes with a few rows of earlier tokens."""

    rows: Tensor  # (B, T, F) of the new tokens
    keep: int  # how many of the last rows a later token needs
    where: str  # file:line, for error messages


Handler = Callable[[AttentionCall], Tensor]
RowsHandler = Callable[[RowsCall], Tensor]
Watch = Callable[[Any, tuple[Any, ...], dict[str, Any]], Tensor | None]


@contextlib.contextmanager
def replaced(owner: Any, name: str, instead: Any) -> Iterator[None]:
    """While open, replaces an attribute of `owner`, if it exists. One thread at a time can do so."""
    with _REPLACING:
        if name not in vars(owner):
            yield
            return
        original = vars(owner)[name]
        setattr(owner, name, instead)
        try:
            yield
        finally:
            setattr(owner, name, original)


@contextlib.contextmanager
def intercept(
    handler: Handler,
    watch: Watch | None = None,
    rows: RowsHandler | None = None,
    states: StateHandler | None = None,
) -> Iterator[None]:
    """While open, passes each attention call to `handler` once; the caller gets its result (B, H, T, Dv).

    `watch(func, args, kwargs)` gets every other torch function that the module calls directly, and may return a
    result that replaces the call. `rows` gets each RowsCall and returns the cached rows followed by the new ones,
    (B, T + up to `keep`, F). `states` gets each call that keeps a state, and returns its outputs. Functions wrapped by
    torch.compile run as plain Python meanwhile, because compiled code cannot be intercepted.
    """
    mode = _AttentionMode(handler, watch, rows, states)
    with replaced(F, "scaled_dot_product_attention", mode.attend), replaced(_AttentionMode, "active", mode):
        fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it would run attention in one C++ kernel
        try:
            with mode, torch.compiler.set_stance("force_eager"):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


@contextlib.contextmanager
def embedding(ids: Tensor) -> Iterator[list[int]]:
    """While open, yields the rows of each table that these ids, or a view of them, index."""
    rows: list[int] = []
    place = ids.untyped_storage().data_ptr()

    def watch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if func is F.embedding:
            index = args[0] if args else kwargs.get("input")
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if type(index) is not Tensor or not isinstance(weight, Tensor):  # a tensor of a trace has no storage
                return
            if index.untyped_storage().data_ptr() == place:
                rows.append(weight.shape[0])

    with intercept(torch_attention, watch):
        yield rows


def attend(call: AttentionCall) -> Tensor:
    """Attention (B, H, T, Dv) for a library's hook: by the handler of the open `intercept`, else by torch."""
    mode = _AttentionMode.active
    return torch_attention(call) if mode is None else mode.hand_over(call)


def extend(call: RowsCall) -> Tensor:
    """The rows, preceded by the cached rows of earlier tokens if an `intercept` with `rows` is open."""
    mode = _AttentionMode.active
    return call.rows if mode is None or mode.rows is None else mode.rows(call)


def remember(call: StateCall) -> Tensor:
    """The outputs of a call that keeps a state: by the open `intercept` with `states`, else without earlier tokens."""
    mode = _AttentionMode.active
    return call.over(None)[0] if mode is None or mode.states is None else mode.states(call)


def torch_attention(call: AttentionCall) -> Tensor:
    """The reference: the result (B, H, T, Dv) of the call in torch, as the module made it."""
    if call.window is None and call.softcap is None and call.sinks is None and call.special is None:
        return _ATTENTION(
            call.query,
            call.key,
            call.value,
            attn_mask=call.mask,
            is_causal=call.is_causal,
            scale=call.scale,
            enable_gqa=call.groups > 1,
        )
    return attention_over(call, call.key, call.value)


def attention_over(call: AttentionCall, key: Tensor, value: Tensor) -> Tensor:
    """Written-out attention of the queries, the last T of S tokens, over keys (B, K, S, D), values (B, K, S, Dv)."""
    new, total = call.query.shape[2], key.shape[2]
    if call.weights is not None:
        weights = call.weights(raw_scores(call, key), total)
        return weights @ repeated(value, weights.shape[1])
    heads = call.query.shape[1]
    if call.softcap is None and call.sinks is None and call.special is None:  # torch's own stores no scores
        key, value = repeated(key, heads), repeated(value, heads)
        mask = None if new == 1 and call.window is None else visible(new, total, call.window)
        return _ATTENTION(call.query, key, value, attn_mask=mask, scale=call.scale)
    products = [(q * call.scale) @ repeated(k, heads).transpose(2, 3) for q, k in call.keys(key, value)]
    scores = functools.reduce(torch.add, products)  # (B, H, T, S)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~visible(new, total, call.window), -torch.inf)
    if call.bias is not None:
        distance = torch.arange(total - new, total)[:, None] - torch.arange(total)[None, :]
        scores = scores + call.bias[:, distance.clamp_min(0)].to(scores.dtype)
    if call.sinks is not None:
        sinks = call.sinks[:, None, None].expand(len(scores), -1, new, 1)
        scores = torch.cat([scores, sinks], 3)
    weights = scores.softmax(-1)[..., :total]
    return torch.cat([weights @ repeated(v, heads) for v in call.values(key, value)], -1)


def raw_scores(call: AttentionCall, key: Tensor) -> list[Tensor]:
    """Unscaled scores q kᵀ (B, H, T, S) for each part of the queries and of the keys (B, K, S, D)."""
    key = repeated(key, call.query.shape[1])
    pairs = zip(call.query.split(call.parts, 3), key.split(call.parts, 3), strict=True)
    return [query @ part.transpose(2, 3) for query, part in pairs]


def repeated(heads: Tensor, count: int) -> Tensor:
    """Repeats each of the K heads of (B, K, S, D) for consecutive query heads: (B, count, S, D)."""
    return heads if heads.shape[1] == count else heads.repeat_interleave(count // heads.shape[1], 1)


def visible(new: int, total: int, window: int | None = None) -> Tensor:
    """(T, S), whether a row's token (the last T of S) attends to a column's token: causal, within the window."""
    distance = torch.arange(total - new, total)[:, None] - torch.arange(total)[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


@dataclass(frozen=True)
class MaskSpec:
    """Describes a mask: causal, within a window if one is given, or unsupported for the given reason."""

    window: int | None = None
    unsupported: str | None = None

    def __post_init__(self) -> None:
        assert self.window is None or self.window > 0


def described_mask(spec: MaskSpec) -> Tensor:
    """A placeholder that describes a mask instead of holding it. Only intercepted attention can read it.

    The description is an attribute, which the tensor keeps while torch traces.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    setattr(mask, _MASK_SPEC, spec)
    return mask


def mask_spec(mask: Tensor | None) -> MaskSpec | None:
    """The description of a described mask, None for any other mask. Raises ContractError if it is unsupported."""
    found: MaskSpec | None = getattr(mask, _MASK_SPEC, None)
    if found is not None and found.unsupported is not None:
        raise ContractError(f"the mask of the attention call at {calling_line()} {found.unsupported}")
    return found


class _AttentionMode(TorchFunctionMode):
    active: _AttentionMode | None = None  # of the open `intercept`

    def __init__(
        self, handler: Handler, watch: Watch | None, rows: RowsHandler | None, states: StateHandler | None
    ) -> None:
        super().__init__()
        self.rows = rows
        self.states = states
        self._handler = handler
        self._watch = watch
        self._busy = False  # the handler runs: its torch calls are not the module's

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION and not self._busy:
            return self.attend(*args, **kwargs)
        if self._watch is not None and not self._busy:
            instead = self._watch(func, args, kwargs)
            if instead is not None:
                return instead
        return func(*args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Replaces F.scaled_dot_product_attention."""
        if self._busy:
            return _ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        shape = query.shape
        spec = mask_spec(attn_mask)
        if spec is not None:
            attn_mask = None
        elif attn_mask is not None and query.dim() == 3:
            attn_mask = _four_axes(attn_mask)
        call = AttentionCall(
            query=_four_axes(query),
            key=_four_axes(key),
            value=_four_axes(value),
            mask=attn_mask,
            dropout=dropout_p,
            is_causal=is_causal or spec is not None,
            scale=float(scale) if scale is not None else float(shape[-1]) ** -0.5,
            where=calling_line(),
            window=spec.window if spec is not None else None,
        )
        output = self.hand_over(call)
        return output if query.dim() == 4 else output.reshape(*shape[:-1], output.shape[-1])

    def hand_over(self, call: AttentionCall) -> Tensor:
        """Passes the call to the handler, whose own torch calls are not intercepted."""
        self._busy = True
        try:
            return self._handler(call)
        finally:
            self._busy = False


def _four_axes(tensor: Tensor) -> Tensor:
    """Adds an axis for one head: (B, T, D) -> (B, 1, T, D)."""
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor


@functools.cache  # called for each frame of each traced operator
def is_users(file: Path) -> bool:
    """Whether a frame's file is user code: outside torch and this export package, and a real file."""
    return not any(folder in file.parents for folder in _NOT_THE_USERS) and not file.name.startswith("<")


def calling_line() -> str:
    """file:line of the innermost running frame of user code."""
    return _user_line(traceback.walk_stack(sys._getframe(1))) or "torch"


def failing_line(error: BaseException) -> str | None:
    """file:line where user code led to the error, None if the traceback has no frame of user code."""
    return _user_line(reversed(list(traceback.walk_tb(error.__traceback__))))


def causes_of(error: BaseException) -> tuple[list[BaseException], str]:
    """Returns the error, its cause, the cause of that and so on, and file:line of user code that led to them, or ""."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain, next((found for cause in reversed(chain) if (found := failing_line(cause))), "")


def is_raised(error: BaseException) -> bool:
    """Whether user code raised the error itself, by `raise` or `assert`."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and is_users(Path(frames[-1].filename)) and (frames[-1].line or "").startswith(_SAID)


_SAID = ("raise", "assert")


def _user_line(frames: Iterable[tuple[FrameType, int]]) -> str | None:
    """file:line of the first frame of user code; the innermost frame comes first."""
    for frame, line in frames:
        file = Path(frame.f_code.co_filename)
        if is_users(file):
            return f"{file.name}:{line}"
    return None
