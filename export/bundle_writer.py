"""Writes and verifies the bundles of one export: float32, and the precisions derived from it."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

import pastkey
from pastkey.contract import names
from pastkey.contract.bundle import Bundle, CacheShift, Manifest
from pastkey.contract.provider_options import in_manifest, not_kept
from pastkey.errors import ParityError, PastkeyError, StartError, first_line
from pastkey.files.durable import write_json
from pastkey.files.folder import file_records, parse_records
from pastkey.files.memory import give_back_memory
from pastkey.precisions import PRECISIONS
from pastkey.providers import TARGETS, Form
from pastkey.runtime import Engine
from pastkey.runtime.engine.golden import Golden, native_refusal, require_golden
from pastkey.runtime.options import SessionSettings
from pastkey.runtime.providers import placement as ep
from pastkey.runtime.providers.inference import RunFailedError
from pastkey.runtime.providers.native import kernels_for
from pastkey.runtime.providers.ort import RunError, onnxruntime

from .compat.configs import write_configurations
from .graft.probe.observe import Observation
from .graft.trace import GraphChoice
from .graph.edit import IR_VERSION
from .graph.write.save import count_operators, write_graphs
from .measure.metrics import Ids
from .measure.predictors import IN_PLACE
from .measure.verify import Verification, verify
from .progress import Progress, form_of
from .quantize.adapters import take_adaptable, write_adapter_graph
from .quantize.exact import exact_engine
from .settings import ExportConfig
from .source.source import Source

_GOLDEN_SHARE = 0.01  # maximum size of golden logits, relative to the weights
MIN_ONNXRUNTIME = "1.24.1"  # the oldest that the runtime accepts
NEWEST_OPSET = 23  # that MIN_ONNXRUNTIME supports; a given graph may be newer
# GroupQueryAttention of 1.23 applies another window. 1.24.4 returned the right logits.
MIN_ONNXRUNTIME_WITH_WINDOWS = "1.24.2"
MIN_ONNXRUNTIME_WITH_STATES = "1.25.1"  # which has LinearAttention and CausalConvWithState on the CPU


@dataclass(frozen=True)
class ExportedDecoder:
    """The cleaned float32 graph of a source."""

    source: Source
    model: ir.Model
    observation: Observation
    choice: GraphChoice
    shift: CacheShift  # whether and how old tokens can be dropped from a cache
    padding: bool = True  # whether rows of different lengths may share a batch
    hidden_size: int | None = None  # H, if the graph has an output head


@dataclass(frozen=True)
class BundleWriter:
    """Writes and verifies the bundles of one export: float32, and the precisions derived from it."""

    decoder: ExportedDecoder
    config: ExportConfig
    progress: Progress
    short: Ids | None = None  # the text of a quick export's proof

    def write(self, model: ir.Model, folder: Path, precision: str = "fp32") -> tuple[Bundle, int]:
        """Writes the graphs of one precision. Returns the bundle so far, and the bytes of its weights."""
        self.progress.stage(f"write {precision} weights")
        source, observation, choice = self.decoder.source, self.decoder.observation, self.decoder.choice
        windows = choice.graph == "fused" and any(layer.window for layer in observation.layers)
        manifest = Manifest(
            pastkey_version=pastkey.__version__,
            source=source.name,
            revision=source.revision,
            quick=self.config.quick,
            precision=precision,
            target="cpu",  # the export runs it there; `configure` sets the bundle's target
            graph=choice.graph,
            graph_reason=choice.reason,
            vocab_size=observation.vocab_size,
            context_length=source.context_length,
            layers=observation.geometry,
            rows=observation.rows,
            states=observation.states,
            windows=_windows(observation, source.context_length),
            shift=self.decoder.shift,
            opset=model.opset_imports[""],
            ir_version=IR_VERSION,
            min_onnxruntime=_oldest_onnxruntime(
                model.opset_imports[""], windows=windows, states=bool(observation.states)
            ),
            call=source.call,
            proved=source.proved or None,
            bos_token_id=source.bos_token_id,
            eos_token_ids=source.eos_token_ids,
            padding=self.decoder.padding,
            hidden_size=self.decoder.hidden_size if self.config.hidden_states else None,
            operators=count_operators(model),
        )
        shard_size = self.config.shard_bytes if precision == self.config.precision else None
        adaptable = take_adaptable(model)
        evicting = manifest.context_length if self.config.target == "cpu" else None  # a device keeps all rows
        weight_bytes = write_graphs(
            model, folder, precision, manifest.hidden_size, shard_size, evicting, self.progress.advance
        )
        if self.config.adapters and precision == self.config.precision:
            write_adapter_graph(model, adaptable, folder / names.ADAPTER_GRAPH)
        return Bundle(folder, manifest), weight_bytes

    def verify(self, bundle: Bundle) -> Verification:
        """Raises ParityError if the bundle's results differ from its source's."""
        precision, source = bundle.manifest.precision, self.decoder.source
        give_back_memory()
        self.progress.stage(f"verify {form_of(bundle)}: prefill, decode, chunks, batch, greedy")
        try:
            layers = self.decoder.observation.layers
            options = _session_options(precision)
            verification = verify(
                bundle,
                source.module,
                layers=layers,
                short=self.short,
                progress=self.progress,
                providers="cpu",
                session_options=options,
            )
        except RunError as error:
            if isinstance(error, PastkeyError) and not isinstance(error, RunFailedError):
                raise
            reason = first_line(error.__cause__ or error)
            raise ParityError(
                f"onnxruntime cannot run the {precision} export of {source.name} ({reason}): try --graph standard"
            ) from error
        verification.require_ok(f"the {precision} export of {source.name}")
        return verification

    def configure(self, bundle: Bundle, fp32: Bundle, parity: dict[str, Any], quality: dict[str, Any]) -> Bundle:
        """Writes golden logits, configurations and the tokenizer. Returns the bundle for its target.

        `fp32` is the float32 bundle that it was made from.
        """
        folder = bundle.path
        manifest = dataclasses.replace(
            bundle.manifest,
            target=self.config.target,
            provider_options=in_manifest(self.config.target, dict(self.config.provider_options or ())),
            parity=parity,
            quality=quality,
        )
        _golden(bundle, manifest, fp32).save(folder / names.GOLDEN)
        heads = [layer.heads for layer in self.decoder.observation.layers]
        write_configurations(folder, self.decoder.source, manifest, heads)
        return dataclasses.replace(bundle, manifest=manifest)

    def finish(self, bundle: Bundle) -> Bundle:
        """Writes the manifest with every file's hash, as the last file."""
        folder = bundle.path
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        records = parse_records(folder, file_records(folder, files))
        manifest = dataclasses.replace(bundle.manifest, files=records)
        write_json(folder / names.MANIFEST, manifest.to_json())
        return dataclasses.replace(bundle, manifest=manifest)

    def proved_on_target(self, bundle: Bundle) -> Bundle:
        """Verifies a finished bundle on its target if this machine has it; otherwise the first load does.

        Returns it without a native graph that computes other logits.
        """
        target = bundle.manifest.target
        row = TARGETS[target]
        if row.short == "cpu":
            if (kernels := kernels_for(bundle, ep.CPU, None)) is not None:
                self.progress.stage(f"prove the bundle on {kernels}")
                if why := native_refusal(Engine(bundle), bundle):
                    return self._without_native(bundle, why)
            return bundle
        config = self.config
        options = dict(config.provider_options or ())
        if sentence := not_kept(row.short, options):
            self.progress.warn(sentence)
        if row.name not in ep.available():
            self.progress.warn(f"{target} is not on this machine: the bundle is proved there when it is loaded first")
            return bundle
        self.progress.stage(f"prove the bundle on {target}")
        # Including options that the manifest does not store.
        manifest = dataclasses.replace(bundle.manifest, provider_options=options)
        try:
            engine = Engine(
                dataclasses.replace(bundle, manifest=manifest),
                session_options=dict(config.session_options or ()),
                allow_fallback=config.allow_fallback,
            )
        except StartError as error:
            self.progress.warn(f"{error}; the bundle is proved on {target} when it is loaded first")
            return bundle
        require_golden(engine, bundle)
        return bundle

    def _without_native(self, bundle: Bundle, why: str) -> Bundle:
        self.progress.warn(f"without the native graph, so onnxruntime's kernels run the bundle: {why}")
        (bundle.path / names.NATIVE_GRAPH).unlink()
        files = {name: record for name, record in bundle.manifest.files.items() if name != names.NATIVE_GRAPH}
        manifest = dataclasses.replace(bundle.manifest, native=None, native_left_out=why, files=files)
        write_json(bundle.path / names.MANIFEST, manifest.to_json())
        return dataclasses.replace(bundle, manifest=manifest)


def _windows(observation: Observation, context_length: int) -> tuple[int, ...]:
    """For each attention call the tokens that it sees, 0 for the whole context; none if all see that."""
    windows = [layer.window or 0 for layer in observation.layers]
    local = [window if window < context_length else 0 for window in windows]
    return tuple(local) if any(local) else ()


def _oldest_onnxruntime(opset: int, *, windows: bool, states: bool) -> str:
    """Returns the oldest onnxruntime for a graph: of a newer opset than MIN_ONNXRUNTIME's, the one that verifies it."""
    if opset > NEWEST_OPSET:
        return str(onnxruntime.__version__)
    if states:
        return MIN_ONNXRUNTIME_WITH_STATES
    return MIN_ONNXRUNTIME_WITH_WINDOWS if windows else MIN_ONNXRUNTIME


def _golden(bundle: Bundle, manifest: Manifest, fp32: Bundle) -> Golden:
    """Computes the golden logits, for as many positions as fit into 1 % of the weights' bytes."""
    files = bundle.all_logits_graph.parent.iterdir()
    weights = sum(path.stat().st_size for path in files if names.is_weights_file(path.name))
    rows = int(_GOLDEN_SHARE * weights) // (4 * manifest.vocab_size)
    # On a GPU only the weights are quantized: activations are float32 there and on the CPU.
    exact = PRECISIONS[manifest.precision].quantized and TARGETS[manifest.target].form is Form.GPU
    like = "fp32" if exact else manifest.precision
    if like == "fp32" and TARGETS[manifest.target].npu:  # NPUs compute in float16
        like = "fp16"
    engine = Engine(bundle, providers="cpu", native=False, session_options=_session_options(manifest.precision))
    rounds = PRECISIONS[like].quantized and manifest.static is None
    # Where nothing was rounded, float32 has the same weights, and is not read into memory.
    whole = not any("rounded" in what for what in manifest.quality.get("weights", ()))
    kept = rounds and whole and manifest.precision == "source"
    same = Engine(fp32, providers="cpu", native=False, session_options=IN_PLACE) if kept else None
    with exact_engine(bundle) if rounds and not kept else contextlib.nullcontext(same) as reference:
        return Golden.computed(engine, rows, PRECISIONS[like].golden_limit, reference)


def _session_options(precision: str) -> SessionSettings | None:
    """Float32 weights are read where they are mapped; others are used as users open them."""
    return IN_PLACE if precision == "fp32" else None
