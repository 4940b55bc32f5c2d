"""Grafts a KV cache onto the attention calls while torch traces the module.

Call number i reads past_key_values.i.key/.value, emits the attention node, and yields present.i.key/.value. The
module's own code needs no cache, and no graph is searched for attention patterns.

Two graphs, one mechanism:

    fused      com.microsoft.GroupQueryAttention; past and present may be one buffer, written in place
    standard   ONNX-standard operators only: concatenation, two MatMuls and a softmax; any head size, any padding
"""

from __future__ import annotations

import contextlib
import functools
import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.onnx import ops

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry
from pastkey.errors import ContractError
from pastkey.providers import TARGETS
from pastkey.quiet import quiet

from ..graph.edit import OPSET, weight
from ..graph.simplify import simplify
from ..graph.stored import StoredWeight, StoredWeights, stored_weights
from .attention import AttentionCall, RowsCall, causes_of, intercept, raw_scores, repeated, visible
from .constants import fold_constants
from .probe.observe import CacheLayer, Observation, evaluating, name_of
from .states import StateCall
from .streamed import load
from .time_axis.program.traced import mask_detection, whole_objects

# Sizes of the example inputs. Each dynamic dimension needs at least 2, or torch treats it as a constant.
_BATCH, _PAST, _NEW = 2, 5, 3

_LOWEST = -1e30  # lower bound of a bias: -inf would turn a fully masked row into NaN
_FLOAT, _INT32 = 1, 6  # ONNX element types
_VIEWS = (torch.ops.aten.reshape.default, torch.ops.aten.chunk.default)  # composed ones that give the same graph


@dataclass(frozen=True)
class GraphChoice:
    """The chosen graph, and the reason that the manifest states."""

    graph: str
    reason: str


def choose_graph(asked: str, target: str, observation: Observation) -> GraphChoice:
    """`asked` is "auto" or a graph's name. Raises ContractError if the asked graph does not support the module."""
    if observation.states and not TARGETS[target].states:
        raise ContractError(
            f"the operators that keep the states of recurrences were not run on {target}: export with --target cpu"
        )
    if observation.rows and asked != "fused":
        return GraphChoice("standard", "rows are kept in addition to the keys and values of attention")
    unsupported = (
        "rows that are kept in addition to keys and values"
        if observation.rows
        else next((found for layer in observation.layers if (found := _unsupported_by_fused(layer, target))), None)
    )
    if asked == "fused" and unsupported:
        raise ContractError(f"the fused graph does not support {unsupported}: use --graph standard, or auto")
    if asked != "auto":
        return GraphChoice(asked, "asked for")
    row = TARGETS[target]
    if not row.takes_fused:
        return GraphChoice("standard", f"target {target}: {row.why_standard}")
    if unsupported:
        return GraphChoice("standard", f"GroupQueryAttention does not support {unsupported}")
    return GraphChoice("fused", f"target {target}: one shared cache buffer, written in place")


def _unsupported_by_fused(layer: CacheLayer, target: str) -> str | None:
    geometry = layer.geometry
    if layer.special is not None:
        return layer.special
    if geometry.key_head_size != geometry.value_head_size:
        return f"keys of size {geometry.key_head_size} and values of size {geometry.value_head_size}"
    if geometry.key_head_size % 8:
        return f"a head size of {geometry.key_head_size}, not a multiple of 8"
    left_out = [name for name in TARGETS[target].ignores.get("GroupQueryAttention", ()) if name in layer.attributes]
    return f"{left_out[0]}, which {target} ignores" if left_out else None


# --- tracing ------------------------------------------------------------------------------------------------------
def trace(
    module: nn.Module,
    observation: Observation,
    graph: str,
    context_length: int,
    say: Callable[[str], None] = lambda sentence: None,
) -> ir.Model:
    """Exports the module as a float32 ONNX graph with explicit past key values, named as in `contract.names`.

    Weights that stay in their file are `StoredWeight` initializers. If the trace read one of them, `say` is told, and
    all are loaded.

    Raises ContractError when torch cannot trace the module.
    """
    calls: list[int] = []
    grafted = _Grafted(module, graph, calls, observation.geometry)
    layers, rows, states = observation.geometry, observation.rows, observation.states
    new = min(_NEW, context_length)  # a longer input would overrun a position table
    arguments = (
        torch.zeros(_BATCH, new, dtype=torch.long),
        torch.ones(_BATCH, _PAST + new, dtype=torch.long),
        torch.zeros(_BATCH, new, dtype=torch.long),
        [torch.zeros(_BATCH, g.kv_heads, _PAST, size) for g in layers for size in (g.key_head_size, g.value_head_size)],
        [torch.zeros(_BATCH, _PAST, one.size) for one in rows],
        [torch.zeros(_BATCH, *state.shape) for state in states],
    )
    dim = torch.export.Dim
    batch, total, past = dim(names.BATCH), dim(names.TOTAL), dim(names.PAST)
    # A module may assert that T is within its context: tell torch that it always is.
    sequence = dim(names.SEQUENCE, max=max(context_length, _NEW))
    shapes = (
        {0: batch, 1: sequence},
        {0: batch, 1: total if graph == "fused" else dim.DYNAMIC},
        {0: batch, 1: sequence},
        [{0: batch, 2: past}] * (2 * len(layers)),
        [{0: batch, 1: dim.DYNAMIC} for _ in rows],
        [{0: batch} for _ in states],
    )
    inputs = [names.INPUT_IDS, names.ATTENTION_MASK, names.POSITION_IDS]
    outputs = [names.LOGITS]
    for i in range(len(layers)):
        inputs += [names.past_key(i), names.past_value(i)]
        outputs += [names.present_key(i), names.present_value(i)]
    inputs += [names.past_conv(i) for i in range(len(rows))]
    outputs += [names.present_conv(i) for i in range(len(rows))]
    kept = names.past_states([state.kind for state in states])
    inputs += kept
    outputs += [names.present_of(past) for past in kept]
    with evaluating(module, traced=True), quiet(), mask_detection(causal=True), whole_objects(), _without_collecting():
        try:
            program = torch.export.export(
                grafted.eval(),
                arguments,
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            _undecomposed(program)
            to_onnx = functools.partial(
                torch.onnx.export,
                program,
                (),
                input_names=inputs,
                output_names=outputs,
                opset_version=OPSET,
                dynamo=True,
                optimize=False,  # `simplify` does it without changing numbers
                verbose=False,
            )
            try:
                exported = to_onnx()
            except Exception:
                if not fold_constants(program):
                    raise
                exported = to_onnx()
        except ContractError:
            raise
        except Exception as error:
            raise ContractError(_trace_sentence(module, error)) from error
    assert exported is not None
    if calls[-1] != len(layers):
        raise ContractError(
            f"{name_of(module)} made {calls[-1]} attention calls while traced and {len(layers)} when run: "
            "the calls must not depend on the input"
        )
    weights = stored_weights(module) or StoredWeights()
    simplify(exported.model, functools.partial(_reads_stored, weights))
    _require_float32(module, exported.model)
    if not weights.empty and not _bound(exported.model, weights):
        say(f"the trace of {name_of(module)} reads a large weight, so that all are loaded: it needs more memory")
        load(module)
        return trace(module, observation, graph, context_length)
    return exported.model


def _undecomposed(program: torch.export.ExportedProgram) -> None:
    """Keeps torch.onnx from decomposing operators where it knows them all: that traces the program twice more."""
    decompose = program.run_decompositions

    def run_decompositions(decomp_table: Mapping[Any, Any], **options: Any) -> torch.export.ExportedProgram:
        nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        conversions = [node for node in nodes if getattr(node.target, "overloadpacket", None) is torch.ops.aten.to]
        asked = {node.target for node in nodes} - {node.target for node in conversions}
        if any(op in decomp_table or _is_composed(op) for op in asked):
            decomposed: torch.export.ExportedProgram = decompose(decomp_table, **options)
            return decomposed
        for node in conversions:  # torch.onnx knows no `to`; nothing writes here, so that copies and views are alike
            given, dtype = node.args[0], node.meta["val"].dtype
            same = given.meta["val"].dtype == dtype
            node.target = torch.ops.aten.alias.default if same else torch.ops.aten._to_copy.default
            node.args, node.kwargs = (given,), {} if same else {"dtype": dtype}
        program.graph_module.recompile()
        return program

    vars(program)["run_decompositions"] = run_decompositions


def _is_composed(target: Any) -> bool:
    """Whether a called function writes into a tensor, runs a graph, or is a view that would become several nodes."""
    if not isinstance(target, torch._ops.OpOverload):
        return isinstance(target, torch._ops.HigherOrderOperator)
    view = target.is_view and target._can_decompose() and target not in _VIEWS
    return view or target._schema.is_mutable


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """While open, the garbage collector is off: it needs an eighth of a trace, because torch makes many objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        gc.collect()


def _reads_stored(weights: StoredWeights, node: ir.Node) -> bool:
    """Whether a node computes with numbers that are not in memory. A transposed matrix is a view."""
    given = [value.const_value for value in node.inputs if value is not None]
    return node.op_type != "Transpose" and any(_stored(weights, tensor) is not None for tensor in given)


def _stored(weights: StoredWeights, tensor: ir.TensorProtocol | None) -> StoredWeight | None:
    return weights.weight(getattr(tensor, "raw", None))


def _bound(model: ir.Model, weights: StoredWeights) -> bool:
    """Binds initializers to stored weights. Returns whether none of the others was made of hollow memory."""
    for value in model.graph.initializers.values():
        stored = _stored(weights, value.const_value)
        if stored is not None:
            stored.name = value.name
            value.const_value = stored
        elif value.dtype == ir.DataType.FLOAT and (array := weight(value)) is not None and np.isnan(array).any():
            return False
    return True


def _require_float32(module: nn.Module, model: ir.Model) -> None:
    for value in model.graph.initializers.values():
        if value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            raise ContractError(
                f"{name_of(module)} computes with {value.name} in {value.dtype.name.lower()}: leave out autocast "
                "and casts, the graph is made in float32"
            )


class _Grafted(nn.Module):
    """The module with its cache, as torch traces it."""

    def __init__(self, module: nn.Module, graph: str, calls: list[int], layers: Sequence[KVGeometry]) -> None:
        super().__init__()
        self.decoder = module  # named clean.DECODER: the prefix of the weights' names
        self._layers = layers
        self._attention = _FusedAttention if graph == "fused" else _StandardAttention
        self._calls = calls  # a list to append to: torch reverts attributes assigned in a trace

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[Tensor],
        past_rows: list[Tensor],
        past_states: list[Tensor],
    ) -> tuple[Tensor, ...]:
        attention = self._attention(attention_mask, input_ids.shape[1], past[0].shape[2]) if past else None
        present: list[Tensor] = []
        present_rows: list[Tensor] = []
        present_states: list[Tensor] = []

        def graft(call: AttentionCall) -> Tensor:
            if attention is None or len(present) == len(past):
                raise ContractError("the module made more attention calls while traced than when run")
            _require_observed(self.decoder, call, self._layers[len(present) // 2])
            output, key, value = attention(call, *past[len(present) : len(present) + 2])
            present.extend((key, value))
            return output

        def extend(call: RowsCall) -> Tensor:
            rows = torch.cat([past_rows[len(present_rows)], call.rows], 1)
            bounds = (torch.tensor([n]) for n in (-call.keep, torch.iinfo(torch.int64).max, 1))
            last = ops.symbolic("Slice", (rows, *bounds), dtype=torch.float32, shape=rows.shape)  # fewer at the start
            present_rows.append(last)
            return rows

        def remember(call: StateCall) -> Tensor:
            output, state = call.node(past_states[len(present_states)])
            present_states.append(state)
            return output

        with intercept(graft, rows=extend, states=remember):
            logits = self.decoder(input_ids, position_ids=position_ids)
        self._calls.append(len(present) // 2)
        return (logits, *present, *present_rows, *present_states)


def _require_observed(module: nn.Module, call: AttentionCall, observed: KVGeometry) -> None:
    """Compares geometries: transformers repeats keys and values for the query heads only while torch traces."""
    traced = KVGeometry(call.key.shape[1], call.key.shape[3], call.value.shape[3])
    if traced != observed:
        raise ContractError(
            f"the attention call at {call.where} has {traced.kv_heads} key/value heads of size {traced.key_head_size} "
            f"while {name_of(module)} is traced, and {observed.kv_heads} of size {observed.key_head_size} when it is "
            "run: where it wraps a transformers model, export that model itself, or its folder"
        )


class _FusedAttention:
    """GroupQueryAttention, https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md."""

    def __init__(self, attention_mask: Tensor, _new: int, _past: int) -> None:
        # seqlens_k (B,) int32: real tokens per row, minus one, as the operator expects
        self._last = (attention_mask.sum(1) - 1).to(torch.int32)
        # total_sequence_length, int32 scalar: read from the mask, since the past axis is a buffer's capacity here
        shape = ops.symbolic("Shape", (attention_mask,), {"start": 1, "end": 2}, dtype=torch.int64, shape=(1,))
        self._total = shape.squeeze(0).to(torch.int32)
        self._total_size = attention_mask.shape[1]

    def __call__(self, call: AttentionCall, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, new, size = call.query.shape
        kv_heads = call.key.shape[1]
        present = (batch, kv_heads, self._total_size, size)
        # Inputs 7 and 8 are rotary tables, 9 and 10 positions and a bias, which the graph does not use.
        sinks = () if call.sinks is None else (None, None, None, None, call.sinks)
        output, key, value = ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (
                *(t.transpose(1, 2).reshape(batch, new, -1) for t in (call.query, call.key, call.value)),
                past_key,
                past_value,
                self._last,
                self._total,
                *sinks,
            ),
            call.fused_attributes,
            dtypes=(_FLOAT, _FLOAT, _FLOAT),
            shapes=((batch, new, heads * size), present, present),
            version=1,
        )
        return output.view(batch, new, heads, size).transpose(1, 2), key, value


class _StandardAttention:
    """softmax(q kᵀ · scale) v over past and new tokens, in operators that every execution provider supports."""

    def __init__(self, attention_mask: Tensor, new: int, past: int) -> None:
        real = attention_mask > 0
        # By order in the cache instead of position_ids: padding in a row keeps its columns.
        causal = visible(new, past + new)  # (T, S)
        self._causal = (causal[None] & real[:, None, :])[:, None, None]  # (B, 1, 1, T, S)
        self._number = real.to(torch.int64).cumsum(1)  # (B, S), number of each real token in its row
        self._new = new
        self._allowed: dict[int | None, Tensor] = {None: self._causal}  # by window

    def _visible(self, window: int | None) -> Tensor:
        if window is not None and window not in self._allowed:
            distance = self._number[:, -self._new :, None] - self._number[:, None, :]  # (B, T, S)
            self._allowed[window] = self._causal & (distance < window)[:, None, None]
        return self._allowed[window]

    def __call__(self, call: AttentionCall, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = torch.cat([past_key, call.key], 2)  # (B, K, S, D)
        value = torch.cat([past_value, call.value], 2)  # (B, K, S, Dv)
        batch, heads, new, _ = call.query.shape
        kv_heads, total = key.shape[1], key.shape[2]
        if call.weights is not None:
            weights = call.weights(raw_scores(call, key), total)
            return weights @ repeated(value, weights.shape[1]), key, value
        # The query heads that share a key/value head become rows of one MatMul, so nothing is repeated.
        rows = (batch, kv_heads, call.groups * new)
        products = [(q * call.scale).reshape(*rows, q.shape[3]) @ k.transpose(2, 3) for q, k in call.keys(key, value)]
        scores = functools.reduce(torch.add, products)  # (B, K, G*T, S)
        scores = scores.view(batch, kv_heads, call.groups, new, total)
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if call.bias is not None:
            distance = self._number[:, -new:, None] - self._number[:, None, :]  # (B, T, S)
            bias = call.bias.clamp_min(_LOWEST)[:, distance.clamp(0, call.bias.shape[1] - 1)]  # (H or 1, B, T, S)
            bias = bias.transpose(0, 1)
            scores = scores + (bias[:, None] if len(call.bias) == 1 else bias.unflatten(1, (kv_heads, call.groups)))
        # The lowest finite number instead of -inf, which would turn a fully masked padding row into NaN.
        scores = torch.where(self._visible(call.window), scores, torch.finfo(scores.dtype).min)
        if call.sinks is not None:
            sinks = call.sinks.view(1, kv_heads, call.groups, 1, 1).expand(batch, -1, -1, new, 1)
            scores = torch.cat([scores, sinks], 4)
        weights = scores.softmax(-1)[..., :total].reshape(batch, kv_heads, call.groups * new, total)
        outputs = [(weights @ v).view(batch, heads, new, v.shape[3]) for v in call.values(key, value)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1), key, value


# --- torch's errors -----------------------------------------------------------------------------------------------
# torch's words for a dimension whose lengths a trace does not cover.
_GUARD = re.compile(r"^Not all values of (\w+) .* satisfy the generated guard (.*?)\.?$")


def _trace_sentence(module: nn.Module, error: BaseException) -> str:
    chain, where = causes_of(error)
    known = next((cause for cause in chain if isinstance(cause, ContractError)), None)
    if known is not None:
        return str(known)
    lines = [line.strip(" -") for line in str(chain[-1]).splitlines() if line.strip()] or [type(chain[-1]).__name__]
    # torch's first line on a broken constraint is about its logging, the second about the constraint.
    line = lines[1 if lines[0].startswith("Constraints violated") and len(lines) > 1 else 0]
    if (guarded := _GUARD.search(line)) is not None:
        low, high = (re.search(side, guarded[2]) for side in (r"(\d+) <= ", r" <= (\d+)"))
        ends = [f"{word} {end[1]}" for word, end in (("at least", low), ("at most", high)) if end]
        allowed = " and ".join(ends) or guarded[2]
        return (
            f"torch's trace of {name_of(module)} holds only where {guarded[1]} is {allowed}: forward must not "
            "branch on a length (if T > 1), make it a Python number, or read a fixed number of rows (x[:, 2:]): read "
            "lengths from tensor.shape and positions from position_ids"
        )
    if "data-dependent" in line:  # a dump of torch's symbols
        line = "the code there depends on the values of a tensor (a loop over chosen experts, a branch or a size)"
    if "complex" in line:
        line += " (keep rotary tables as real cos and sin, not as complex numbers)"
    return (
        f"torch could not trace {name_of(module)} with a symbolic length{f' at {where}' if where else ''}: "
        f"{line[:400]}; forward must not branch on values or lengths: read lengths from tensor.shape and positions "
        "from position_ids"
    )
