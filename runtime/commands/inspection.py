"""`pastkey inspect`: the parts of a bundle, and where its operators run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from pastkey.command import Command, print_json, print_table, without_control
from pastkey.contract import names
from pastkey.contract.bundle import Manifest, open_bundle
from pastkey.errors import ProviderError
from pastkey.precisions import PRECISIONS

from ..options import PlacementOptions
from ..sandbox.relay import run_limited
from .flags import add_bundle, add_device, limits_of, opening_of

if TYPE_CHECKING:
    from ..engine.decoder_graph import DecoderGraph


@dataclass(frozen=True)
class Share:
    """The part of a graph that one execution provider runs."""

    graph: str  # its file in the bundle
    provider: str  # short name
    nodes: int
    operators: dict[str, int]  # operator -> nodes, before the provider fuses or compiles them


@dataclass(frozen=True)
class BundleReport:
    """A bundle's sizes, operators and placement."""

    manifest: Manifest
    weight_bytes: int  # of the external-data files, or of the graph that holds its weights itself
    total_bytes: int  # of all files
    kv_bytes_per_token: int
    kv_bytes_at_context: int  # of one text's cache at its largest
    overflow: str  # how a text beyond the context, and tokens that no window sees, are dropped
    shares: tuple[Share, ...]  # of each graph that `generate` runs, first that of the prompt; most nodes first
    kernels: str  # that run the graph: the native ones or onnxruntime's
    native_left_out: str = ""  # why the native kernels do not run it, if their golden logits are wrong
    # On a device other than the CPU, or of native kernels: right, prefill wrong, or wrong.
    golden_logits: str | None = None
    refusal: str | None = None  # the sentence of `run`, where it refuses the bundle on this device

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def inspect(
    path: str | Path,
    **placement: Unpack[PlacementOptions],
) -> BundleReport:
    """Opens a bundle, looks where each operator is placed, and proves it on its device.

    Args:
        path: A bundle.
        **placement: Where it runs, as for `load`.

    Raises:
        MissingFileError: No bundle is there.
        IntegrityError: The bundle was altered, or its graph cannot be loaded.
        ProviderError: A provider is not here, did not start, or is not given this bundle's graph, or leaves some of it.
        InputError: An impossible number of threads.
    """
    from ..engine.engine import Engine
    from ..engine.golden import native_refusal, require_golden
    from ..providers.open import operators_of
    from ..providers.placement import CPU, short_name

    bundle = open_bundle(path)
    manifest = bundle.manifest
    sizes = {name: record.size for name, record in manifest.files.items()}
    weights = sum(size for name, size in sizes.items() if names.is_weights_file(name))
    weights = weights or sizes[PRECISIONS[manifest.precision].graph]
    golden_logits = refusal = None
    engine = Engine(bundle, **placement)
    native = engine.graph.native is not None
    why = native_refusal(engine, bundle) if native else ""
    if native or engine.providers[0] != CPU:
        golden_logits = "wrong" if why else "right"
    try:
        require_golden(engine, bundle)
        if engine.graph.one_by_one and golden_logits is not None and not native:
            golden_logits = "prefill wrong"
    except ProviderError as error:
        refusal = str(error)
        golden_logits = "wrong"
    left_out = why if native and engine.graph.native is None else manifest.native_left_out
    shares = [
        Share(graph.relative_to(bundle.path).as_posix(), short_name(name), sum(operators.values()), dict(operators))
        for graph, session in engine.graph.sessions.items()
        for name, operators in sorted(operators_of(session).items(), key=lambda placed: -sum(placed[1].values()))
    ]
    return BundleReport(
        manifest=manifest,
        weight_bytes=weights,
        total_bytes=sum(sizes.values()),
        kv_bytes_per_token=engine.graph.bytes_per_token,
        kv_bytes_at_context=engine.graph.cache_bytes(manifest.context_length),
        overflow=_overflow(engine.graph),
        shares=tuple(shares),
        kernels=engine.graph.kernels,
        native_left_out=left_out,
        golden_logits=golden_logits,
        refusal=refusal,
    )


def _overflow(graph: DecoderGraph) -> str:
    """For people: which tokens leave the cache, and when."""
    manifest = graph.manifest
    shift = manifest.shift
    told = "a full context can be shifted (context_overflow)"
    if shift.refused:
        told = f"a full context cannot be shifted: {shift.refused}"
    if not (local := [window for window in manifest.windows if window]):
        return told
    kept = "all before them" if graph.windows is None else f"{graph.window_rows} at most"
    return (
        f"a token sees the last {max(local)} in {len(local)} of {len(manifest.layers)} attention calls, whose cache "
        f"keeps {kept}; {told}"
    )


# --- for a person -----------------------------------------------------------------------------------------------------
def print_inspection(inspection: BundleReport) -> None:
    """Shows it to a person, on standard output."""
    from ..engine.caches.states import state_bytes  # which imports onnxruntime

    manifest = inspection.manifest
    per_token = inspection.kv_bytes_per_token
    form = f"{manifest.source}: {manifest.precision}, {manifest.graph} graph ({manifest.graph_reason})"
    print(without_control(form))
    print(
        f"vocabulary {manifest.vocab_size}, context {manifest.context_length}, "
        f"{len(manifest.layers)} attention calls, opset {manifest.opset}, onnxruntime >= {manifest.min_onnxruntime}"
    )
    if manifest.proved is not None:
        print(f"decoding with a cache gave the source's own logits on texts of up to {manifest.proved} tokens")
    if manifest.quick:
        print("exported with --quick: weights rounded to nearest without calibration, and proved on a short text")
    print()
    files = sorted(manifest.files.items(), key=lambda item: -item[1].size)
    print_table(
        ("bytes", "file"),
        *((f"{record.size:,}", name) for name, record in files),
        (f"{inspection.total_bytes:,}", f"together; weights {inspection.weight_bytes:,}"),
        (f"{per_token:,}", f"of keys and values per token, {inspection.kv_bytes_at_context:,} at the full context"),
        *(
            [(f"{state_bytes(manifest.states):,}", "of states of recurrences, whatever the length")]
            if manifest.states
            else []
        ),
        (f"{manifest.context_length:,}", f"tokens of context: {inspection.overflow}"),
    )
    print()
    print_table(
        ("graph", "provider", "nodes", "operators"),
        *(
            (
                Path(share.graph).stem if manifest.static else "",
                share.provider,
                f"{share.nodes}",
                ", ".join(f"{count} {name}" for name, count in share.operators.items()),
            )
            for share in inspection.shares
        ),
    )
    print(f"\nkernels: {inspection.kernels}")
    if inspection.native_left_out:
        print(f"without the native kernels: {inspection.native_left_out}")
    if inspection.golden_logits is not None:
        print(f"golden logits on this device: {inspection.golden_logits}")
    checks = [
        (precision, name, "ok" if check["ok"] else "DIFFERS", _figure(check["value"]), _figure(check["limit"]),
         check["measure"].replace("_", " "))
        for precision, proof in manifest.parity.items()
        for name, check in proof["checks"].items()
    ]  # fmt: skip
    if checks:
        print("\nas the export proved it")
        print_table(("graph of", "check", "", "value", "limit", "measure"), *checks)
    if manifest.quality:
        print("\nwhat quantization costs")
        shown = {name: value for name, value in manifest.quality.items() if name != "weights"}
        print_table(("", ""), *((name.replace("_", " "), _figure(value)) for name, value in shown.items()))
    if weights := manifest.quality.get("weights"):
        print("\nthe weights of the source")
        print_table(("matrices", "", "the first"), *((f"{len(each)}", what, each[0]) for what, each in weights.items()))


def _figure(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_figure(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


# --- the command ------------------------------------------------------------------------------------------------------
def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_device(parser)


def _run(arguments: argparse.Namespace) -> int:
    if (limits := limits_of(arguments)) is not None:
        return run_limited("inspect", _run, arguments, limits)
    opening = opening_of(arguments)
    inspection = inspect(arguments.bundle, **opening)
    if arguments.json:
        print_json(inspection.to_json())
    else:
        print_inspection(inspection)
    if inspection.refusal is not None:
        raise ProviderError(inspection.refusal)
    return 0


inspect_command = Command(_add_arguments, _run)
