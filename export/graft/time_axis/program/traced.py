"""Tracing by torch: what is done otherwise meanwhile, and what stands in the way already there."""

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

from ...attention import AttentionCall, failing_line, is_users, repeated, replaced, visible
from ...probe.causes import Cause, Kind
from .nodes import Traced

LogitsOf = Callable[[nn.Module, Tensor], Tensor]  # the author's call on (1, T) ids


def written_out(call: AttentionCall) -> Tensor:
    """scaled_dot_product_attention as its documentation has it, so that it is followed as attention by hand is."""
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
    # As torch's own result lies in memory: a view of the author's may rely on it.
    return output.transpose(-3, -2).contiguous().transpose(-3, -2)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """What torch does otherwise while it traces.

    nn.TransformerEncoder compares its mask with the causal one by value, which no trace can follow. And of the frames
    that made an operator a trace keeps those called `forward`: here it is the user's innermost one.
    """
    with (
        replaced(torch.nn.modules.transformer, "_detect_is_causal_mask", lambda mask, is_causal=None, size=None: False),
        replaced(fx.proxy.TracerBase, "_filter_traceback_frames", _innermost),
        replaced(FakeTensor, "tolist", Tensor.tolist),  # one question, not one for each number
        whole_objects(),
    ):
        yield


def whole_objects() -> contextlib.AbstractContextManager[None]:
    """What a module keeps on self is copied by taking it apart, which not every object outlives: copy none."""
    return replaced(frontend_utils, "_pytree_subclasses_that_lose_info", _ButContainers())


class _ButContainers:
    """All types but Python's own containers."""

    def __contains__(self, kind: object) -> bool:
        return kind not in (dict, list, tuple)


def _innermost(_tracer: Any, frames: traceback.StackSummary) -> traceback.StackSummary:
    users = (frame for frame in reversed(frames) if is_users(Path(frame.filename)))
    return traceback.StackSummary.from_list([frame for frame in [next(users, None)] if frame is not None])


def different(lengths: tuple[int, int], first: Sequence[Traced], second: Sequence[Traced]) -> list[Cause]:
    """The lines that are run more often for more tokens; those of a class together."""
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
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    where = next((found for cause in reversed(chain) if (found := failing_line(cause))), None) or ""
    text = " ".join(str(cause) for cause in chain)
    if "data-dependent" in text or "GuardOnDataDependent" in text or "unbacked" in text.lower():
        return Cause(Kind.DATA, "branches on values", where)
    return Cause(Kind.UNKNOWN, f"could not be traced by torch: {first_line(chain[-1])[:300]}", where)
