"""The cost of a prefill in ONNX's Scan, which runs recurrences of any form token by token."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from pastkey.contract import names
from pastkey.contract.bundle import Bundle

from ..graph.edit import IR_VERSION, OPSET
from ..graph.session import cpu_session, window_feeds

_TOKENS: Final = 512
_HEAD: Final = 64  # the size of a head of LinearAttention
_ROUNDS: Final = 5  # the fastest one counts


def scan_cost(bundle: Bundle) -> str | None:
    """A sentence on the cost of a prefill in Scan compared with LinearAttention of that size; None without a Scan."""
    count = bundle.manifest.operators.get("Scan", 0)
    if not count:
        return None
    tokens = min(_TOKENS, bundle.manifest.context_length)
    kept = [state.shape[0] for state in bundle.manifest.states if state.kind == names.FLAT_STATE]
    whole, scans = _timed(bundle.all_logits_graph, tokens)
    other = sum(_linear_attention(size, tokens) for size in kept)
    taken = f"a prefill of {tokens} tokens needs {1000 * whole:.1f} ms, {1000 * scans:.1f} ms of it there"
    times = f"{scans / other:.1f} times as long as LinearAttention with states of that size"
    return f"recurrences that run token by token, in Scan: {count}; {taken}, {times}"


def _timed(path: Path, tokens: int) -> tuple[float, float]:
    """The seconds of a prefill, and those in Scan: the difference to the other operators.

    A profile names the time of each operator. It slows a Scan down, whose operators are many and small.
    """
    with TemporaryDirectory() as folder:
        plain, profiled = cpu_session(path), cpu_session(path, profile=Path(folder) / "run")
        feeds = window_feeds({value.name: value.shape for value in plain.get_inputs()}, np.zeros(tokens, np.int64))
        whole = _fastest(plain, feeds)
        _fastest(profiled, feeds)
        events = json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8"))
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    scans = [(event["ts"], event["ts"] + event["dur"]) for event in nodes if event["args"]["op_name"] == "Scan"]
    beside = [event["dur"] for event in nodes if not any(start <= event["ts"] < end for start, end in scans)]
    each = len(beside) // _ROUNDS
    others = min(sum(beside[i * each : (i + 1) * each]) for i in range(_ROUNDS))
    return whole, max(whole - others / 1e6, 0.0)


def _fastest(session: Any, feeds: Mapping[str, Any]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        session.run(None, feeds)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _linear_attention(size: int, tokens: int) -> float:
    """The seconds of LinearAttention with a state of about `size` numbers."""
    width = min(_HEAD, max(1, math.isqrt(size)))
    heads = math.ceil(size / width**2)
    widths = [heads * width] * 3 + [heads]
    given = {name: np.full((1, tokens, n), -0.1, np.float32) for name, n in zip("qkvg", widths, strict=True)}
    given["state"] = np.zeros((1, heads, width, width), np.float32)
    values = {
        name: ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, array in given.items()
    }
    node = ir.node(
        "LinearAttention",
        [values[name] for name in ("q", "k", "v", "state", "g")],
        {"q_num_heads": heads, "kv_num_heads": heads, "scale": 1.0, "update_rule": "gated"},
        domain="com.microsoft",
        num_outputs=2,
    )
    opsets = {"": OPSET, "com.microsoft": 1}
    graph = ir.Graph([*values.values()], node.outputs[:1], nodes=[node], opset_imports=opsets)
    session = cpu_session(ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString())
    return _fastest(session, given)
