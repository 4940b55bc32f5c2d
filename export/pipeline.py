"""The export pipeline, checkpoint/ -> bundle/.

open -> observe -> trace -> fuse -> clean -> write fp32 -> verify
    [-> float16 -> verify, or calibrate -> quantize -> write -> verify]
    [-> static graphs -> verify] [-> ORT format]
    -> golden logits -> configurations [-> whole generation] -> manifest -> prove on the target
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import onnx_ir as ir
from torch import nn

from pastkey.contract.bundle import Bundle, Manifest, parse_manifest
from pastkey.errors import InputError, NumericsError
from pastkey.files.durable import refuse_existing, remove_leftovers, whole_folder, write_json
from pastkey.files.folder import hub_id
from pastkey.files.memory import keeping_memory
from pastkey.providers import TARGETS
from pastkey.runtime import Engine
from pastkey.runtime.providers import placement as providers

from .bundle_writer import BundleWriter
from .generation.write import write_generation
from .grafting import decoder_of, grafted, observed, require_head, require_masks
from .graph.float16 import LARGEST, to_float16
from .graph.static.qdq import in_int8, quantize_static
from .graph.static.static import write_static_graphs
from .graph.write.native import add_native_graph
from .keys import Identity, identity, keys_of, require_unchanged
from .measure.metrics import Ids
from .measure.paths import short_texts
from .measure.predictors import IN_PLACE
from .measure.scans import scan_cost
from .measure.verify import Verification
from .ort_format import write_ort_format
from .progress import SILENT, UNKNOWN, Progress, Recorder, planned
from .quantize.calibrate.activations import probing
from .quantize.calibrate.calibration import CalibrationText, calibration_text, measured, read_calibration
from .quantize.int4 import make_int4
from .quantize.int8 import make_int8
from .quantize.kept import make_kept
from .quantize.quick import make_quick
from .quantize.ranking.sensitivity import Sensitivity
from .quantize.rounding.lattice import is_on_lattice
from .quantize.search import Quantized
from .resources import needs, parameters, require_room
from .settings import STATIC_CHUNK, ExportConfig, ExportOptions
from .source.hub import HubModel, find
from .source.open import open_source
from .source.source import Opening, Source
from .store import Store, unbound

_RECURRENT = ("GRU", "LSTM", "RNN", "Scan")  # ONNX's operators, which read float32
_FP32_FOLDER = ".fp32"  # in a bundle's folder until it is whole: the float32 bundle that others are made from


@dataclass(frozen=True)
class Report:
    """The result of an export."""

    path: Path
    manifest: Manifest
    verification: Verification
    weight_bytes: int  # of this bundle
    fp32_weight_bytes: int  # of the same graph in float32
    seconds: float
    sensitivity: Sensitivity | None = None  # of each matrix, if it was measured
    warnings: tuple[str, ...] = ()  # a sentence each

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": str(self.path),
            "source": self.manifest.source,
            "revision": self.manifest.revision,
            "precision": self.manifest.precision,
            "graph": self.manifest.graph,
            "graph_reason": self.manifest.graph_reason,
            "layers": len(self.manifest.layers),
            "weight_bytes": self.weight_bytes,
            "fp32_weight_bytes": self.fp32_weight_bytes,
            "seconds": self.seconds,
            "parity": dict(self.manifest.parity),
            "quality": dict(self.manifest.quality),
            "warnings": list(self.warnings),
        }


def export(
    module_or_path: nn.Module | str | Path,
    out: str | Path,
    precision: str | None = ExportConfig.precision,
    *,
    progress: Progress = SILENT,
    **options: Unpack[ExportOptions],
) -> Report:
    """Exports a decoder to a bundle folder, and verifies that its results equal the source's.

    A failed export leaves nothing at `out`. Matrices that GPTQ rounded for int4 stay in a hidden folder next to `out`.
    The same call continues from them, and removes them when the bundle is whole.

    Args:
        module_or_path: A decoder as a torch.nn.Module, whatever its call looks like; a transformers model for causal
            language modelling; the path of a checkpoint, Hugging Face or ONNX folder, a .gguf file, a llama2.c .bin,
            or "file.py:factory" or "notebook.ipynb:expression"; or "ORG/NAME" on the Hugging Face Hub, as text.
        out: The bundle's folder.
        precision: "int8", "int4", "fp16", "fp32" or "source", of the weights. "source" keeps the blocks of a quantized
            source without rounding. None: "source" for such a source, otherwise "int8".
        progress: Receives each stage, its progress, and warnings.
        **options: See ExportOptions.

    Raises:
        InputError: An invalid argument.
        MissingFileError, ExistingFolderError, IntegrityError: A missing or damaged source, or an existing target.
        ProviderError: The target's execution provider does not run all of the graph, or returns different results.
        ResourceError: Too little memory or disk, or the Hub cannot be reached.
        ContractError: A module that the cache cannot be grafted onto.
        NumericsError: A weight that is NaN or infinity, or a value that overflows float16.
        ParityError: The bundle differs from the source.
        QualityError: `max_kl` cannot be met.
    """
    return export_found(module_or_path, Path(out), ExportConfig(precision, **options), progress)


def export_found(
    module_or_path: nn.Module | str | Path | HubModel, out: Path, config: ExportConfig, shown: Progress
) -> Report:
    """Exports as `export` does, also a model that was looked up on the Hub. `shown` is its `progress`."""
    started, progress = time.perf_counter(), Recorder(shown)
    remove_leftovers(out)
    _refuse_early(module_or_path, out, config)
    if isinstance(module_or_path, str) and hub_id(module_or_path) is not None:
        module_or_path = find(module_or_path, progress, network=config.network)
    source, before = _open(module_or_path, out, config, progress)
    config = _with_precision(config, source, progress)
    calibration = _read_calibration(source, config)
    source, observation, choice = observed(source, config.common, progress)
    store, proof = Store(out, keys_of(config, before, choice.graph), progress), None
    with store.opened(), whole_folder(out, force=config.force) as folder:
        if (found := store.graph(source.module)) is None:
            decoder = grafted(source, observation, choice, progress)
        else:
            model, record = found
            shift = parse_manifest(folder, record["manifest"]).shift
            decoder = decoder_of(source, observation, choice, model, record["hidden_size"], shift)
            proof = Verification.from_json(record["verification"])
        require_masks(decoder, config)
        require_head(decoder, config)
        writer = BundleWriter(decoder, config, progress)
        artifacts = _make_artifacts(writer, folder, calibration, store, proof)
        last = artifacts[-1]
        if config.format == "ort":
            write_ort_format(last.bundle, progress)
        parity = {made.bundle.manifest.precision: made.verification.to_json() for made in artifacts}
        bundle = writer.configure(last.bundle, artifacts[0].bundle, parity, last.quality)
        if config.generate:
            write_generation(bundle, progress)
        require_unchanged(module_or_path, config, before)
        shutil.rmtree(folder / _FP32_FOLDER, ignore_errors=True)
        bundle = writer.finish(bundle)
        bundle = writer.proved_on_target(bundle)
        if (cost := scan_cost(bundle)) is not None:
            progress.warn(cost)
        if config.quantized and (left := [kind for kind in _RECURRENT if bundle.manifest.operators.get(kind)]):
            progress.say(f"the weights of {' and '.join(left)} stay in float32")
        if config.sensitivity is not None and last.sensitivity is not None:
            write_json(Path(config.sensitivity), last.sensitivity.to_json())
    return Report(
        path=out,
        manifest=bundle.manifest,
        verification=last.verification,
        weight_bytes=last.weight_bytes,
        fp32_weight_bytes=artifacts[0].weight_bytes,
        seconds=time.perf_counter() - started,
        sensitivity=last.sensitivity,
        warnings=tuple(progress.warnings),
    )


@dataclass(frozen=True)
class Artifact:
    """The graphs of one precision: written, measured and verified."""

    bundle: Bundle
    weight_bytes: int
    verification: Verification
    quality: dict[str, Any] = field(default_factory=dict)  # against float32, of the manifest
    sensitivity: Sensitivity | None = None


def _make_artifacts(
    writer: BundleWriter, folder: Path, calibration: list[int] | None, store: Store, proof: Verification | None
) -> list[Artifact]:
    """Makes the float32 artifact, those derived from it, and static graphs. The last is the bundle in `folder`.

    `proof` is that of the float32 graph, if an earlier export made it.
    """
    config, progress = writer.config, writer.progress
    precision = config.row
    beside = _beside(folder, config)
    graph = unbound(writer.decoder.model, writer.decoder.source.module) if proof is None else None
    fp32, weight_bytes = writer.write(writer.decoder.model, beside)
    short = (
        short_texts(Engine(fp32, session_options=IN_PLACE), _SHORT_TEXTS, progress)
        if _is_measured_short(config)
        else []
    )
    short_proof = dataclasses.replace(writer, short=short[0]) if short else writer
    if config.quick:
        writer = short_proof
    made = Artifact(fp32, weight_bytes, proof or writer.verify(fp32))
    verification = made.verification.to_json()
    record = {
        "manifest": fp32.manifest.to_json(),
        "hidden_size": writer.decoder.hidden_size,
        "verification": verification,
    }
    store.keep_graph(graph, record)
    artifacts = [made]
    if precision.name == "fp16":
        artifacts.append(_make_fp16(fp32, folder, writer))
    if precision.quantized:
        text = _calibration_text(fp32, calibration, short, store, config, progress)
        artifacts.append(_make_quantized(fp32, folder, short_proof, text, store))
    if config.static:
        artifacts.append(_make_static(artifacts[0], writer))
        if precision.quantized:
            artifacts.append(_make_static_int8(artifacts[-1].bundle, folder, artifacts[1], writer, text))
    return artifacts


def _beside(folder: Path, config: ExportConfig) -> Path:
    """Returns the folder of the float32 bundle, which is the bundle itself if float32 is asked for."""
    return folder if config.precision == "fp32" else folder / _FP32_FOLDER


# --- opening ------------------------------------------------------------------------------------------------------
def _refuse_early(module_or_path: nn.Module | str | Path | HubModel, out: Path, config: ExportConfig) -> None:
    """Raises the errors that can be found before any work."""
    table = None if config.sensitivity is None else Path(config.sensitivity).resolve()
    if table is not None and (table.is_dir() or not table.parent.is_dir() or out.resolve() in table.parents):
        raise InputError(f"--sensitivity {table}: expected a file outside {out}, in an existing folder")
    providers.require_values(TARGETS[config.target], dict(config.provider_options or ()))
    refuse_existing(out, force=config.force)
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    if not os.access(parent, os.W_OK):
        raise InputError(f"{parent} cannot be written, so that {out.name} cannot be made there: choose another --out")
    if isinstance(module_or_path, (str, Path)) and out.resolve() == Path(module_or_path).resolve():
        raise InputError(f"{out} is the source of this export, and would be replaced: choose another --out")


@keeping_memory()
def _open(
    module_or_path: nn.Module | str | Path | HubModel, out: Path, config: ExportConfig, progress: Progress
) -> tuple[Source, Identity | None]:
    """Returns the source, and its identity before its weights were read."""
    progress.plan(planned(config, UNKNOWN))
    progress.stage("open the source")

    said, before = False, None

    def check(weights: int, resident_bytes: int, temporary_bytes: int, allocated: int = 0) -> None:
        nonlocal said, before
        needed = needs(weights, config, resident_bytes=resident_bytes, temporary_bytes=temporary_bytes)
        require_room(out, needed, allocated=allocated)
        if not said:
            progress.say(str(needed))
            fetched = isinstance(module_or_path, HubModel) and not module_or_path.has_weights
            progress.plan(planned(config, weights, fetched=fetched))
            before = identity(module_or_path, config)  # now that links out of its folder are refused
        said = True

    same = ("tokenizer", "context_length", "chat_template", "weights", "trust_remote_code", "network")
    given: dict[str, Any] = {name: getattr(config, name) for name in same} | {"eos": config.eos_tokens}
    opening = Opening(**given, say=progress.warn, progress=progress, before_loading=check)
    source = open_source(module_or_path, opening)
    for sentence in source.warnings:
        progress.warn(sentence)
    weights = parameters(source.module)
    check(weights, source.resident_bytes, 0, allocated=source.resident_bytes)
    return source, before


def _with_precision(config: ExportConfig, source: Source, progress: Progress) -> ExportConfig:
    """Returns the settings with a precision. Raises InputError if that of this source excludes other options."""
    if config.precision not in (None, "source"):
        return config
    quantized = bool(source.packed) or is_on_lattice(source.module)
    if config.precision == "source" and not quantized:
        raise InputError(
            f"--precision source keeps the blocks of integers of a quantized source, and {source.name} has none: leave "
            "it out, or give --precision int8 or int4"
        )
    chosen = config.chosen(quantized=quantized)
    if config.precision != chosen.precision == "source":
        progress.say("its weights are quantized already and stay unchanged; --precision int8 rounds them again")
    return chosen


def _read_calibration(source: Source, config: ExportConfig) -> list[int] | None:
    if config.calibration is None:
        return None
    return read_calibration(config.calibration, source.tokenizer, config.row.calibration_windows)


# --- fp16 ---------------------------------------------------------------------------------------------------------
_RANGE_TOKENS = 64  # random tokens that the range of values is measured on
_MASKED = 1e30  # larger magnitudes are masks


def _make_fp16(fp32: Bundle, folder: Path, writer: BundleWriter) -> Artifact:
    """A verified float16 bundle in `folder`, made from a verified float32 one."""
    model = ir.load(fp32.all_logits_graph)
    _require_range(fp32, to_float16(model))
    bundle, weight_bytes = writer.write(model, folder, "fp16")
    verification = writer.verify(bundle)
    return Artifact(bundle, weight_bytes, verification, verification.quality)


def _require_range(fp32: Bundle, halved: Sequence[str]) -> None:
    """Raises NumericsError if a value would overflow in float16. The CPU computes in float32 and cannot show it.

    `halved` are the names of the values, which are measured in the float32 graph.
    """
    count = min(_RANGE_TOKENS, fp32.manifest.context_length)
    ids = np.random.default_rng(0).integers(0, fp32.manifest.vocab_size, count)
    with probing(ir.load(fp32.all_logits_graph), fp32.all_logits_graph.parent, halved) as probe:
        for name, rows in probe(ids).items():
            # Masks hold the lowest float32, which becomes the lowest float16.
            largest = float(np.abs(rows[np.abs(rows) < _MASKED]).max(initial=0))
            if largest > LARGEST:
                raise NumericsError(
                    f"the value {name} reaches {largest:.3g}, and float16 ends at {LARGEST:,.0f}: export with "
                    "--precision fp32, or int8"
                )


# --- static graphs ------------------------------------------------------------------------------------------------
def _make_static(made: Artifact, writer: BundleWriter) -> Artifact:
    """Adds the static graphs to a verified float32 bundle of the standard graph, and verifies them."""
    fp32, config = made.bundle, writer.config
    context = fp32.manifest.context_length
    chunk = min(config.chunk or STATIC_CHUNK, context)
    sizes = f"1 and {chunk} new tokens over a past of {context}"
    row = TARGETS[config.target]
    options = {**row.options, **dict(config.provider_options or ())}
    chip = f", for {', '.join(f'{k} {v}' for k, v in options.items())}" if options else ""
    writer.progress.stage(f"write the static graphs of {sizes}{chip}")
    shape = write_static_graphs(
        fp32, chunk, by_host=not row.reads_tables, shard_size=config.shard_bytes if config.precision == "fp32" else None
    )
    asked = "asked for" if config.graph == "static" else f"target {config.target}: sizes are fixed there"
    manifest = dataclasses.replace(fp32.manifest, graph="static", graph_reason=f"{asked}; {sizes}", static=shape)
    bundle = dataclasses.replace(fp32, manifest=manifest)
    return dataclasses.replace(made, bundle=bundle, verification=writer.verify(bundle))


def _make_static_int8(
    fp32: Bundle, folder: Path, made: Artifact, writer: BundleWriter, text: CalibrationText
) -> Artifact:
    """Quantizes the static float32 graphs to int8, in addition to the int8 graph for other programs in `made`."""
    writer.progress.stage("quantize the static graphs to int8")
    quantize_static(fp32, folder, text.calibration_set, writer.config.shard_bytes)
    made.bundle.last_logits_graph.unlink()
    static = in_int8(fp32).manifest
    manifest = dataclasses.replace(
        made.bundle.manifest, graph=static.graph, graph_reason=static.graph_reason, static=static.static
    )
    bundle = dataclasses.replace(made.bundle, manifest=manifest)
    quality = measured(fp32, bundle, text, writer.progress)
    return dataclasses.replace(made, bundle=bundle, quality=quality, verification=writer.verify(bundle))


# --- quantized -----------------------------------------------------------------------------------------------------
_SHORT_TEXTS = 2  # windows where nothing is calibrated: one to measure on, and one for the ranges of a static graph


def _is_measured_short(config: ExportConfig) -> bool:
    """Whether no text decides anything: a short one is enough to measure on, and to prove float32's proof again."""
    return config.quick or (config.quantized and not config.row.calibrated)


def _calibration_text(
    fp32: Bundle,
    calibration: list[int] | None,
    short: Sequence[Ids],
    store: Store,
    config: ExportConfig,
    progress: Progress,
) -> CalibrationText:
    if _is_measured_short(config):
        if calibration is None:
            return CalibrationText("own", tuple(short[1:]), tuple(short[:1]))
        return calibration_text(fp32, calibration, _SHORT_TEXTS, progress)
    if (known := store.text()) is not None:
        return CalibrationText.from_json(known)
    progress.stage(f"calibrate {config.precision} on {config.calibration or 'text of the model itself'}")
    text = calibration_text(fp32, calibration, config.row.calibration_windows, progress)
    store.keep_text(text.to_json())
    return text


def _make_quantized(fp32: Bundle, folder: Path, writer: BundleWriter, text: CalibrationText, store: Store) -> Artifact:
    """A verified quantized bundle in `folder`, made from a verified float32 one."""
    config, precision = writer.config.common, writer.config.row.name
    write = functools.partial(writer.write, folder=folder, precision=precision)
    makers: dict[str, Callable[..., Quantized]] = {
        "int8": make_int8,
        "int4": functools.partial(make_int4, finished=store.matrices),
        "source": functools.partial(make_kept, writer.decoder.source.packed),
    }
    make = make_quick if config.quick and config.row.calibrated else makers[precision]
    made = make(fp32, text, write, config, writer.progress)
    verification = writer.verify(made.bundle)
    bundle = add_native_graph(made.bundle) if config.target == "cpu" else made.bundle
    return Artifact(bundle, made.weight_bytes, verification, made.quality, made.sensitivity)
