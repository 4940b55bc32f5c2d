"""`pastkey inspect`: what a bundle is made of and where its operators run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from pastkey.command import Command, print_json, print_table
from pastkey.contract import names
from pastkey.contract.bundle import Manifest, open_bundle
from pastkey.errors import NumericsError, ProviderError
from pastkey.precisions import PRECISIONS

from ..options import PlacementOptions
from ..sandbox.relay import run_limited
from .flags import add_bundle, add_device, limits_of, opening_of

if TYPE_CHECKING:
    from ..engine.decoder_graph import DecoderGraph

_KERNEL = "_kernel_time"  # how onnxruntime's profile names an operator's run


@dataclass(frozen=True)
class Share:
    """What one execution provider runs of a graph."""

    graph: str  # its file in the bundle
    provider: str  # short name
    nodes: int
    # Of what these nodes read; what two of them share counts twice. Of a provider that compiles: the weights that no
    # other one reads. Of a context binary, which does not tell weights from code: its size.
    weight_bytes: int
    operators: dict[str, int]  # operator -> nodes


@dataclass(frozen=True)
class BundleReport:
    """A bundle's sizes, operators and placement."""

    manifest: Manifest
    weight_bytes: int  # of the external-data files, or of the graph that holds its weights itself
    total_bytes: int  # of all files
    kv_bytes_per_token: int
    kv_bytes_at_context: int  # of one text's cache at its largest
    overflow: str  # what becomes of a text that is longer than the context, and of what no window sees
    shares: tuple[Share, ...]  # of each optimised graph that `generate` runs, first that of the prompt; largest first
    kernels: str  # what runs the graph: the native kernels or onnxruntime
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
    """Opens a bundle, runs a few tokens to see where each operator is placed, and proves it on its device.

    Args:
        path: A bundle.
        **placement: Where it runs, as for `load`.

    Raises:
        MissingFileError: No bundle is there.
        IntegrityError: The bundle was altered, or its graph cannot be loaded.
        ProviderError: A provider is not here, did not start, or is not given this bundle's graph, or leaves some of it.
        InputError: An impossible number of threads.
        OSError: onnxruntime could not write its profile: the disk of the temporary folder is full.
    """
    from ..engine.engine import Engine
    from ..engine.golden import native_refusal, require_golden
    from ..providers.placement import CPU

    bundle = open_bundle(path)
    manifest = bundle.manifest
    sizes = {name: record.size for name, record in manifest.files.items()}
    weights = sum(size for name, size in sizes.items() if names.is_weights_file(name))
    weights = weights or sizes[PRECISIONS[manifest.precision].graph]
    golden_logits = refusal = None
    with tempfile.TemporaryDirectory(prefix="pastkey-") as folder:
        engine = Engine(bundle, profile_prefix=Path(folder) / "profile", **placement)
        on_cpu = engine.providers[0] == CPU
        left_out = manifest.native_left_out
        if engine.graph.native is not None:
            why = native_refusal(engine, bundle)
            golden_logits = "wrong" if why else "right"
            try:
                require_golden(engine, bundle)
            except ProviderError as error:
                refusal = str(error)
            if engine.graph.native is None:
                left_out = why
        with (
            contextlib.nullcontext() if on_cpu else contextlib.suppress(NumericsError)
        ):  # the proof below says what is wrong
            engine.prefill([0] * min(2, manifest.context_length))
            if len(engine.graph.sessions) > 1:
                engine.reset()
                engine.decode(0)
        shares: list[Share] = []
        for graph, session in engine.graph.sessions.items():
            profile = _read_profile(Path(session.end_profiling()))
            file = graph.relative_to(bundle.path).as_posix()
            compiled = (f"{file.removesuffix('.onnx')}_", ".bin")
            binary = sum(n for name, n in sizes.items() if name.startswith(compiled[0]) and name.endswith(compiled[1]))
            shares += read_shares(profile, file, binary or weights)
    if not on_cpu:
        try:
            require_golden(engine, bundle)
            golden_logits = "prefill wrong" if engine.graph.one_by_one else "right"
        except ProviderError as error:
            golden_logits, refusal = "wrong", str(error)
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
    """For people: what leaves the cache, and when."""
    manifest = graph.manifest
    shift, window = manifest.shift, manifest.window
    told = "a full context can be shifted (context_overflow)"
    if shift.refused:
        told = f"a full context cannot be shifted: {shift.refused}"
    if window is None:
        return told
    kept = "all before them" if graph.droppable_window is None else f"{graph.most_rows} at most"
    return f"a token sees the last {window}, and the cache keeps {kept}; {told}"


def _read_profile(path: Path) -> list[dict[str, Any]]:
    try:
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:  # onnxruntime does not tell when it cannot write
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path.parent)) from None
    return events


def read_shares(profile: Sequence[dict[str, Any]], graph: str, weights: int) -> tuple[Share, ...]:
    """Who ran what of a graph, from the events of an onnxruntime profile.

    A node that ran several times counts once. `weights` are the bytes of the graph's weights: a provider that compiles
    is recorded without any, and has those that are left.
    """
    from ..providers.placement import CPU, short_name

    nodes: dict[str, dict[str, Any]] = {}
    for event in profile:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            nodes[event["name"]] = event["args"]
    read = sum(int(args.get("parameter_size", 0)) for args in nodes.values())
    shares = []
    for provider in {args["provider"] for args in nodes.values()}:
        own = [args for args in nodes.values() if args["provider"] == provider]
        weight_bytes = sum(int(args.get("parameter_size", 0)) for args in own)
        if not weight_bytes and provider != CPU:
            weight_bytes = max(weights - read, 0)
        operators = dict(Counter(str(args["op_name"]) for args in own).most_common())
        shares.append(Share(graph, short_name(provider), len(own), weight_bytes, operators))
    return tuple(sorted(shares, key=lambda share: -share.weight_bytes))


# --- for a person -----------------------------------------------------------------------------------------------------
def print_inspection(inspection: BundleReport) -> None:
    """Shows it to a person, on standard output."""
    manifest = inspection.manifest
    per_token = inspection.kv_bytes_per_token
    print(f"{manifest.source}: {manifest.precision}, {manifest.graph} graph ({manifest.graph_reason})")
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
        (f"{manifest.context_length:,}", f"tokens of context: {inspection.overflow}"),
    )
    print()
    print_table(
        ("graph", "provider", "nodes", "weight bytes", "operators, as they run after optimisation"),
        *(
            (
                Path(share.graph).stem if manifest.static else "",
                share.provider,
                f"{share.nodes}",
                f"{share.weight_bytes:,}",
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
        quality = ((name.replace("_", " "), _figure(value)) for name, value in manifest.quality.items())
        print_table(("", ""), *quality)


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
        return run_limited("inspect", _run, arguments, limits, scratch=True)
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
