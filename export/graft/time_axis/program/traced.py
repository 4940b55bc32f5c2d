"""Patches that are active while torch traces, and the causes of a failed trace."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch._aot_autograd import frontend_utils
from torch._subclasses import FakeTensor

from pastkey.errors import first_line

from ...attention import AttentionCall, causes_of, is_users, repeated, replaced, visible
from ...probe.causes import Cause, Kind
from .nodes import Traced

LogitsOf = Callable[[nn.Module, Tensor], Tensor]  # the author's call on (1, T) ids


def written_out(call: AttentionCall) -> Tensor:
    """scaled_dot_product_attention as documented, so that it is followed like attention that a module writes out."""
    key, value = repeated(call.key, call.query.shape[1]), repeated(call.value, call.query.shape[1])
    scores = call.query @ key.transpose(-2, -1) * call.scale
    if call.is_causal:
        scores = scores.masked_fill(~visible(*scores.shape[-2:]), -torch.inf)
    if call.mask is not None and call.mask.dtype == torch.bool:
        scores = scores.masked_fill(~call.mask, -torch.inf)
    elif call.mask is not None:
        scores = scores + call.mask
    weights = scores.softmax(-1)
    output = (torch.dropout(weights, call.dropout, True) if call.dropout else weights) @ value
    # The memory layout of torch's own result: a view in the author's code may rely on it.
    return output.transpose(-3, -2).contiguous().transpose(-3, -2)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """While open, torch is patched for a trace.

    Of the frames that made an operator, a trace keeps those named `forward`; the patch keeps the innermost frame of
    user code instead.
    """
    with (
        mask_detection(causal=False),
        replaced(fx.proxy.TracerBase, "_filter_traceback_frames", _innermost),
        replaced(FakeTensor, "tolist", Tensor.tolist),  # one question instead of one for each number
        whole_objects(),
    ):
        yield


def mask_detection(*, causal: bool) -> contextlib.AbstractContextManager[None]:
    """Replaces nn.TransformerEncoder's comparison of its mask with the causal one, which torch cannot trace.

    With `causal`, a mask is the causal one, as `observe` has found. Otherwise it is followed as it is.
    """

    def detect(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        del size
        return causal and (mask is not None if is_causal is None else is_causal)

    return replaced(torch.nn.modules.transformer, "_detect_is_causal_mask", detect)


def whole_objects() -> contextlib.AbstractContextManager[None]:
    """Stops torch from copying objects on a module's self part by part, which breaks some of them."""
    return replaced(frontend_utils, "_pytree_subclasses_that_lose_info", _ButContainers())


class _ButContainers:
    """Contains all types except dict, list and tuple."""

    def __contains__(self, kind: object) -> bool:
        return kind not in (dict, list, tuple)


def _innermost(_tracer: Any, frames: traceback.StackSummary) -> traceback.StackSummary:
    users = (frame for frame in reversed(frames) if is_users(Path(frame.filename)))
    return traceback.StackSummary.from_list([frame for frame in [next(users, None)] if frame is not None])


def different(lengths: tuple[int, int], first: Sequence[Traced], second: Sequence[Traced]) -> list[Cause]:
    """Causes for the lines that run a different number of times at the two lengths, grouped by file and class."""
    counts = [Counter((n.where, n.owner) for n in nodes if n.kind == "call") for nodes in (first, second)]
    places: dict[tuple[str, str], list[int]] = {}
    for where, owner in counts[0] | counts[1]:
        if where != "torch" and counts[0][where, owner] != counts[1][where, owner]:
            file, _, line = where.rpartition(":")
            places.setdefault((file, owner), []).append(int(line))
    what = "is a loop over positions or a recurrence, and runs other operators for"
    what += f" {lengths[0]} tokens than for {lengths[1]}"
    loops = [
        Cause(Kind.RECURRENCE, what, f"{file}:{min(lines)}" + (f"-{max(lines)}" if len(set(lines)) > 1 else ""), owner)
        for (file, owner), lines in places.items()
    ]
    return loops or [Cause(Kind.RECURRENCE, what)]


def untraced(error: BaseException) -> Cause:
    """Why torch could not trace a module."""
    chain, where = causes_of(error)
    text = " ".join(str(cause) for cause in chain)
    if "data-dependent" in text or "GuardOnDataDependent" in text or "unbacked" in text.lower():
        return Cause(Kind.DATA, "branches on values", where)
    return Cause(Kind.UNKNOWN, f"could not be traced by torch: {first_line(chain[-1])[:300]}", where)
