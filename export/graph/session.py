"""Plain sessions of onnxruntime on the CPU, for graphs that are no bundle's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract import names
from pastkey.runtime.providers.ort import onnxruntime


def cpu_session(
    graph: Path | bytes,
    entries: Mapping[str, str] | None = None,
    *,
    threads: int = 0,
    library: str = "",
    by_priority: bool = False,
    profile: Path | None = None,
) -> Any:
    """Opens a graph's file or content, with entries of its configuration and a library of operators.

    `by_priority`: each node runs as soon as it can, not as late as a later one needs it. `profile`: where the times of
    all nodes are written, by end_profiling().
    """
    options = onnxruntime.SessionOptions()
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised
    if by_priority:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    for name, entry in (entries or {}).items():
        options.add_session_config_entry(name, entry)
    if library:
        options.register_custom_ops_library(library)
    content = graph if isinstance(graph, bytes) else str(graph)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def window_feeds(
    shapes: Mapping[str, Sequence[Any]],
    ids: npt.NDArray[np.int64],
    dtype: type[np.floating[Any]] = np.float32,
    past: int = 0,
) -> dict[str, npt.NDArray[Any]]:
    """Returns a graph's inputs for ids (T,) after `past` tokens, by the shapes of all inputs: numbers, names of sizes.

    Keys and values are zeros of `dtype`.
    """
    feeds: dict[str, npt.NDArray[Any]] = {
        names.INPUT_IDS: ids[None],
        names.ATTENTION_MASK: np.ones((1, past + len(ids)), np.int64),
        names.POSITION_IDS: np.arange(past, past + len(ids))[None],
    }
    zeros = {
        name: np.zeros([1, *(size if isinstance(size, int) else past for size in shape[1:])], dtype)
        for name, shape in shapes.items()
        if name not in feeds
    }
    return feeds | zeros
