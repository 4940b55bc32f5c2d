"""Opens a bundle's graph as an onnxruntime session on the requested provider, and checks it against the manifest."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry, Manifest
from pastkey.errors import FallbackWarning, InputError, IntegrityError, MissingExtraError, ProviderError, first_line
from pastkey.files.reading import reading
from pastkey.precisions import PRECISIONS
from pastkey.values import is_unicode, parse_version, shown

from ..options import Choice, SessionSettings
from . import placement as ep
from .inference import OrtSession
from .ort import OrtError, RunError, onnxruntime, standard_output_to_error, upgrade_command
from .session_options import RECORD, WHOLE, require_free, set_options

# Threads that keep spinning after a run steal CPU time from other sessions and from the application.
_STOP_SPINNING = "session.force_spinning_stop"


def open_session(
    path: Path,
    manifest: Manifest,
    *,
    providers: Choice | Sequence[Choice] | None,
    threads: int,
    allow_fallback: bool = False,
    session_options: SessionSettings | None = None,
    library: str = "",
) -> Any:
    """Opens one graph of a bundle.

    Args:
        path: The graph.
        manifest: The bundle's manifest.
        providers: See `placement.resolve`.
        threads: Threads within an operator; 0 lets onnxruntime choose.
        allow_fallback: See `placement.resolve`.
        session_options: See `session_options`.
        library: Absolute path of a library with the graph's own operators, pastkey's.

    Returns:
        The onnxruntime.InferenceSession.

    Raises:
        MissingExtraError: The bundle needs a newer onnxruntime.
        ProviderError: A provider is not available, does not start, does not support this graph, or does not run all of
            it.
        IntegrityError: The graph cannot be loaded or differs from the manifest.
        InputError: A session option is unknown to onnxruntime or controlled by pastkey.
        MemoryError: There is too little memory for the weights.
    """
    if not is_unicode(str(path)):
        raise InputError(f"{path} is not UTF-8, and onnxruntime supports no other path: rename the folder")
    if parse_version(onnxruntime.__version__) < parse_version(manifest.min_onnxruntime):
        raise MissingExtraError(
            f"this bundle needs onnxruntime {manifest.min_onnxruntime} and {onnxruntime.__version__} is installed: "
            f"type  {upgrade_command()}  and try again"
        )
    given = dict(session_options or {})
    require_free(given)
    wanted = ep.for_bundle(manifest, providers, allow_fallback=allow_fallback)
    entries = {RECORD: "1"}

    def options(entries: Mapping[str, str]) -> Any:
        made = _options(threads, entries, given)
        if library:
            made.register_custom_ops_library(library)
        return made

    try:
        with reading(path, "an ONNX graph", but=RunError):  # such as names that are not UTF-8
            session = _create(path, options(entries | {WHOLE: "1"} if wanted.whole else entries), wanted)
    except RunError as error:
        if not isinstance(error, OrtError):  # a provider that finds no device raises a plain RuntimeError
            raise ep.not_started(wanted.providers[0][0], [ep.CPU]) from error
        reason = first_line(error)
        name = ep.short_name(wanted.providers[0][0])
        if name != "cpu":
            remedy = ep.remedy(name, manifest.target)
            again = f"{f'{remedy}, or ' if remedy else ''}use the provider 'cpu'"
            if wanted.whole:
                again += "; allow_fallback=True, or --allow-fallback, lets the CPU run the other operators"
            if manifest.compiled is not None:
                again = f"it was compiled for {manifest.compiled}: compile it again"
            raise ProviderError(f"the execution provider {name!r} cannot load {path}: {reason}; {again}") from error
        if "bad_alloc" in reason or "allocate memory" in reason:
            raise MemoryError(f"onnxruntime has too little memory to load {path}: {reason}") from error
        raise IntegrityError(f"onnxruntime {onnxruntime.__version__} cannot load {path}: {reason}") from error
    ep.require_active(wanted, session.get_providers())
    if wanted.tells and (left := operators_of(session).get(ep.CPU)):
        name = ep.short_name(wanted.providers[0][0])
        sentence = f"the execution provider {name!r} leaves {ep.counted(left)} to the CPU"
        warnings.warn(sentence, FallbackWarning, stacklevel=2)
    with reading(path, "an ONNX graph"):
        _cross_check(session, manifest, path)
    return session


def _options(threads: int, entries: Mapping[str, str], given: SessionSettings) -> Any:
    """`entries`: pastkey's own. `given`: the user's, which override them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # a decoder is a chain: no operators run in parallel
    # Errors only: the warnings about shapes of the shared buffer are harmless. pastkey itself reports operators left to
    # the CPU.
    options.log_severity_level = 4 if WHOLE in entries else 3
    set_options(options, {_STOP_SPINNING: "1", **entries, **given})
    return options


def _create(path: Path, options: Any, wanted: ep.Placement) -> Any:
    """Creates a session without onnxruntime's own fallback. Output of a provider's library goes to standard error."""
    plugins = [(name, given) for name, given in wanted.providers if ep.is_plugin(name)]
    elsewhere = any(name != ep.CPU for name, _ in wanted.providers)
    with standard_output_to_error() if elsewhere else contextlib.nullcontext():
        for name, given in plugins:
            options.add_provider_for_devices(ep.plugin_devices(name), {k: str(v) for k, v in given.items()})
        if plugins:  # onnxruntime accepts no list of providers with a plugin
            return OrtSession(str(path), options, enable_fallback=0)
        return OrtSession(str(path), options, providers=[*wanted.providers], enable_fallback=0)


def operators_of(session: Any) -> dict[str, Counter[str]]:
    """onnxruntime's name of a provider -> its operators, each with the number of its nodes."""
    found: dict[str, Counter[str]] = {}
    with contextlib.suppress(*OrtError):
        for subgraph in session.get_provider_graph_assignment_info():
            found.setdefault(subgraph.ep_name, Counter()).update(node.op_type for node in subgraph.get_nodes())
    return found


def checked_threads(threads: int | None) -> int:
    """The number of threads within an operator: `threads`, or the default for None. Raises InputError."""
    most = max(256, os.cpu_count() or 1)  # thousands of threads would use up the memory
    if threads is not None and not 1 <= threads <= most:
        raise InputError(f"threads is {shown(threads)}; it must be 1 to {most}, and the physical cores are the fastest")
    return default_threads() if threads is None else threads


def default_threads() -> int:
    """The number of physical cores that this process may use; 0, which lets onnxruntime choose, if it is unknown."""
    if not hasattr(os, "sched_getaffinity"):
        return 0
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return len(cores)


def _cross_check(session: Any, manifest: Manifest, path: Path) -> None:
    """Raises IntegrityError if a tensor differs between graph and manifest, with both shapes."""
    found = {value.name: list(value.shape) for value in [*session.get_inputs(), *session.get_outputs()]}
    expected = _expected_static(session, manifest, path) if manifest.static else _expected(found, manifest, path)
    for name, shape in expected.items():
        if name not in found:
            raise IntegrityError(f"{path} has no tensor {name!r}, which the manifest names: export it again")
        # Sizes must agree. Names of dynamic axes may differ.
        same_rank = len(found[name]) == len(shape)
        if not same_rank or any(isinstance(b, int) and a != b for a, b in zip(found[name], shape, strict=True)):
            raise IntegrityError(
                f"{name!r} is {_show(found[name])} in {path} and {_show(shape)} in the manifest: export it again"
            )
    for name in sorted(set(found) - set(expected)):
        raise IntegrityError(f"{path} has the tensor {name!r}, which the manifest does not name: export it again")


Shapes = dict[str, list[int | str]]


def _expected(found: Mapping[str, Sequence[Any]], manifest: Manifest, path: Path) -> Shapes:
    expected: Shapes = {
        names.INPUT_IDS: [names.BATCH, names.SEQUENCE],
        names.POSITION_IDS: [names.BATCH, names.SEQUENCE],
    }
    expected |= _expected_cache(manifest.layers, names.BATCH, names.PAST, names.TOTAL)
    for i, kept in enumerate(manifest.rows):
        expected[names.past_conv(i)] = [names.BATCH, names.PAST_ROWS, kept.size]
        expected[names.present_conv(i)] = [names.BATCH, names.PRESENT_ROWS, kept.size]
    for past, state in zip(names.past_states([one.kind for one in manifest.states]), manifest.states, strict=True):
        expected[past] = expected[names.present_of(past)] = [names.BATCH, *state.shape]
    expected[names.LOGITS] = [names.BATCH, names.SEQUENCE, manifest.vocab_size]
    if names.SEQLENS_K in found:
        expected |= {names.SEQLENS_K: [names.BATCH], names.TOTAL_SEQUENCE_LENGTH: []}
    if names.EVICTED in found:
        expected[names.EVICTED] = [names.BATCH]
    if names.SEQLENS_K not in found or names.ATTENTION_MASK in found:
        expected[names.ATTENTION_MASK] = [names.BATCH, names.TOTAL]
    if path.name != Path(PRECISIONS[manifest.precision].graph).name:
        expected[names.LOGITS_START] = [1]
        if manifest.hidden_size is not None:
            expected[names.LAST_HIDDEN_STATE] = [names.BATCH, names.SEQUENCE, manifest.hidden_size]
    if path.name == Path(names.ADAPTER_GRAPH).name:
        expected |= {name: [*shape] for name, shape in found.items() if name.startswith(names.LORA_PREFIX)}
    if names.EMBEDDING_ROWS in found:
        expected[names.EMBEDDING_ROWS] = [names.BATCH, names.SEQUENCE, *found[names.EMBEDDING_ROWS][2:]]
    return expected


def _expected_static(session: Any, manifest: Manifest, path: Path) -> Shapes:
    """The tensors of a static graph, for one token or for a chunk. It has only the inputs that it uses."""
    static = manifest.static
    assert static is not None
    tokens, past = 1 if path.name == Path(names.STATIC_DECODE_GRAPH).name else static.chunk, manifest.context_length
    inputs: Shapes = {names.INPUT_IDS: [1, tokens], names.POSITION_IDS: [1, tokens]}
    inputs |= {names.static_mask(window): [1, 1, tokens, past + tokens] for window in static.windows}
    stored = session.get_modelmeta().custom_metadata_map.get(names.TABLES)
    tables = {} if stored is None else json.loads(stored)
    given = {value.name: list(value.shape) for value in session.get_inputs()}
    expected = {name: shape for name, shape in inputs.items() if name in given}
    expected |= {name: shape for name, shape in given.items() if name in tables}
    expected |= _expected_cache(manifest.layers, 1, past, tokens)
    expected[names.LOGITS] = [1, tokens, manifest.vocab_size]
    return expected


def _expected_cache(layers: Sequence[KVGeometry], batch: int | str, past: int | str, present: int | str) -> Shapes:
    """The shapes of keys and values. `past`, `present`: the numbers of tokens in inputs and outputs."""
    expected: Shapes = {}
    for i, layer in enumerate(layers):
        expected[names.past_key(i)] = [batch, layer.kv_heads, past, layer.key_head_size]
        expected[names.present_key(i)] = [batch, layer.kv_heads, present, layer.key_head_size]
        expected[names.past_value(i)] = [batch, layer.kv_heads, past, layer.value_head_size]
        expected[names.present_value(i)] = [batch, layer.kv_heads, present, layer.value_head_size]
    return expected


def _show(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
