"""Runs a decoder over a text, its prompt and its output, and keeps the values inside.

Causal attention makes one run over the whole text equal to generating it token by token, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError, NumericsError
from pastkey.export.compare import logits_difference, relative_difference
from pastkey.export.graph.session import cpu_session, window_feeds
from pastkey.export.measure.metrics import softmax

from .inspectable import Inspectable, inspectable

TOP = 10  # likeliest tokens that are kept of a distribution

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Likeliest:
    """The likeliest next tokens, in order, with the last axis of K of them."""

    ids: Ids  # (..., K)
    probabilities: Floats  # (..., K)


@dataclass(frozen=True)
class InnerValues:
    """The values inside a decoder. S tokens were run, the last W of them are shown, from `first` on."""

    ids: list[int]  # (S,)
    first: int  # S - W
    logits: Floats  # (W, V): of the token after each shown one
    attention: dict[int, Floats]  # attention call -> weights (len(attention_heads), W, S) of the shown tokens
    attention_heads: list[int]  # their numbers
    errors: dict[int, float]  # attention call -> max |weights @ values - the call's own result| / max |result|
    layers: int  # attention calls of the decoder
    heads: int  # H, the fewest of a call
    embedding: Floats | None  # (W, E)
    positions: Floats | None  # (W, E), added to the embedding
    entering: Floats | None  # (W, E), the input of the first layer
    lens: list[Likeliest | None]  # (W, K) before the first layer and after each, None without a single stream there
    lens_next: list[Floats | None]  # (W,): the probability there of the token that came next
    lens_error: float | None  # max |logits of the last stream - logits| / max |logits|, None without a lens


def likeliest(logits: Floats, count: int = TOP) -> Likeliest:
    """The `count` likeliest tokens of logits (..., V), the likeliest first."""
    some = np.argpartition(-logits, min(count, logits.shape[-1]) - 1, axis=-1)[..., :count]  # sorting all is slow
    order = np.argsort(-np.take_along_axis(logits, some, -1), axis=-1, kind="stable")
    ids = np.take_along_axis(some, order, -1)
    return Likeliest(ids, np.take_along_axis(softmax(logits), ids, -1).astype(np.float32))


def inspect(
    bundle: Bundle,
    ids: Sequence[int],
    following: int,
    *,
    shown: int,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    most_weights: int = 900_000,
) -> InnerValues:
    """Runs a bundle's graph over a text without a past.

    Args:
        bundle: An opened bundle.
        ids: The text, (S,).
        following: The token after it.
        shown: W, or more than S.
        layers: Attention calls whose weights are kept; None for as many as fit, spread over the depth.
        heads: Heads whose weights are kept; None for all, or for the first ones that fit.
        most_weights: How many weights of attention fit, without those of masked tokens.

    Raises:
        InputError: There is no such layer or head, or the decoder keeps states of recurrences.
        ContractError: The weights of attention are not found.
        NumericsError: The logits are not finite.
    """
    if bundle.manifest.states:
        raise InputError(f"{bundle.path} keeps the states of recurrences, and the page shows attention only")
    graph = inspectable(ir.load(bundle.all_logits_graph), len(bundle.manifest.layers), shown)
    folder, first = bundle.all_logits_graph.parent, max(0, len(ids) - shown)
    session = _open(graph.model, folder)
    inner = [graph.embedding, graph.positions, graph.entering, *graph.streams]
    of_calls = [n for i, call in enumerate(graph.calls) for n in (call.weights, call.output, names.present_value(i))]
    found = _run(
        session, [names.LOGITS, *(name for name in inner if name is not None), *of_calls], _feeds(session, ids)
    )
    logits = found[names.LOGITS][0]
    if not np.isfinite(logits).all():
        raise NumericsError(f"the logits of {bundle.path} are not finite (NaN or infinity): its weights are damaged")
    rows = len(ids) - first
    head_count = min(len(found[call.weights]) for call in graph.calls)
    of_head = rows * (rows + 3) // 2
    some = range(max(1, min(head_count, most_weights // of_head)))
    chosen_heads = _chosen("head", some if heads is None else heads, head_count)
    fitting = max(1, min(len(graph.calls), most_weights // (of_head * len(chosen_heads))))
    spread = np.linspace(0, len(graph.calls) - 1, fitting).round().astype(int).tolist()
    chosen = _chosen("layer", spread if layers is None else layers, len(graph.calls))
    attention, errors = {}, {}
    for number in chosen:
        weights, errors[number] = _weights(found, graph, number, rows)
        attention[number] = weights[chosen_heads]
    embedding, positions, entering = (
        _rows(found.get(str(name)), first) for name in (graph.embedding, graph.positions, graph.entering)
    )
    next_ids = np.array([*ids[1:], following])[first:]
    half = any(value.name == graph.streams[-1] and "float16" in value.type for value in session.get_outputs())
    lens, lens_next, lens_error = _lens(graph, folder, found, first, next_ids, half)
    return InnerValues(
        list(ids), first, logits[first:], attention, chosen_heads, errors, len(graph.calls), head_count,
        embedding, positions, entering, lens, lens_next, lens_error,
    )  # fmt: skip


def _chosen(what: str, asked: Sequence[int], count: int) -> list[int]:
    """The asked numbers, sorted. Raises InputError, which counts from 1 as the page does, if one is too large."""
    if max(asked) >= count:
        raise InputError(f"there is no {what} {max(asked) + 1}: this decoder has {count}, from 1 on")
    return sorted(set(asked))


# --- running ------------------------------------------------------------------------------------------------------
def _open(model: ir.Model, folder: Path) -> Any:
    """Opens a graph in memory whose weights are in files of `folder`."""
    entries = {"session.model_external_initializers_file_folder_path": str(folder.absolute())}
    # The usual order runs the slices of the weights last, and holds the weights of all layers until then.
    return cpu_session(ir.to_proto(model).SerializeToString(), entries, by_priority=True)


def _feeds(session: Any, ids: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    given = {value.name: value for value in session.get_inputs()}
    half = any("float16" in value.type for value in given.values())
    shapes = {name: value.shape for name, value in given.items()}
    feeds = window_feeds(shapes, np.array(ids), np.float16 if half else np.float32)
    return {name: array for name, array in feeds.items() if name in given}


def _run(session: Any, wanted: Sequence[str], feeds: dict[str, npt.NDArray[Any]]) -> dict[str, Floats]:
    wanted = list(dict.fromkeys(wanted))
    found = zip(wanted, session.run(wanted, feeds), strict=True)
    return {name: array.astype(np.float32, copy=False) for name, array in found if array.dtype.kind == "f"}


def _rows(array: Floats | None, first: int) -> Floats | None:
    """The rows (W, E) of a value with the tokens on its last axis but one."""
    return None if array is None else array.reshape(-1, array.shape[-1])[first:]


# --- attention ----------------------------------------------------------------------------------------------------
def _weights(found: dict[str, Floats], graph: Inspectable, number: int, rows: int) -> tuple[Floats, float]:
    """Returns an attention call's weights (H, W, S), and how far weights @ values is from the call's result."""
    call, values = graph.calls[number], found[names.present_value(number)][0]  # (K, S, D)
    length = values.shape[1]
    weights = found[call.weights]
    mixed = weights @ np.repeat(values, len(weights) // len(values), 0)  # (H, W, D)
    output = found[call.output]
    if output.ndim == 3:  # (1, S, H * D)
        output = output.reshape(length, len(weights), -1).transpose(1, 0, 2)
    return weights, relative_difference(output.reshape(len(weights), length, -1)[:, length - rows :], mixed)


# --- the logit lens -----------------------------------------------------------------------------------------------
def _lens(
    graph: Inspectable, folder: Path, found: dict[str, Floats], first: int, following: Ids, half: bool
) -> tuple[list[Likeliest | None], list[Floats | None], float | None]:
    """Returns `lens`, `lens_next` for the tokens `following` (W,), and `lens_error` of an InnerValues."""
    streams = [graph.entering, *graph.streams]
    none: list[Any] = [None] * len(streams)
    if graph.head is None:
        return none, none, None
    graph.head.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT16 if half else ir.DataType.FLOAT)
    session, logits = _open(graph.head, folder), found[names.LOGITS][0, first:]
    (given,) = session.get_inputs()
    width = found[str(graph.streams[-1])].shape
    lens, chances, last = list(none), list(none), logits
    for number, name in enumerate(streams):
        stream = found.get(str(name))
        if stream is None or stream.shape != width:
            continue
        (rows,) = session.run(None, {given.name: stream[:, first:].astype(np.float16 if half else np.float32)})
        last = rows[0].astype(np.float32)
        lens[number] = likeliest(last, 3)
        chances[number] = np.take_along_axis(softmax(last), following[:, None], -1)[:, 0].astype(np.float32)
    return lens, chances, logits_difference(logits, last)
