"""checkpoint/ -> bundle/, from end to end: the main function of the stage, to be read aloud.

observe -> rehearse -> trace -> clean -> write fp32 -> verify
    [-> calibrate -> quantize -> write int8 or int4 -> verify] -> bundle/
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

import pastkey
from pastkey import names
from pastkey.bundle import Bundle, Manifest
from pastkey.errors import ContractError, InputError, ParityError, PastkeyError, first_line
from pastkey.folder import file_records, parse_records, refuse_existing, whole_folder, write_json
from pastkey.runtime import providers
from pastkey.runtime.ort import RunError

from . import int4, optimum
from .budget import check_budget, make_int8
from .calibrate import WINDOWS, calibration_text, read_calibration
from .files import count_operators, write_configurations, write_graphs
from .fuse import fuse, where_rotated
from .graft import IR_VERSION, GraphChoice, choose_graph, trace
from .int8_cache import add_int8_cache
from .observe import Observation, observe
from .passes import clean
from .rehearse import rehearse
from .resources import parameters, require_disk, require_memory
from .sensitivity import Sensitivity
from .source import Source, check_tokenizer, open_source
from .tables import check_tables, write_table
from .verify import Verification, verify

# The oldest onnxruntime that what is exported was run on; 8-bit MatMulNBits itself came with 1.22.
MIN_ONNXRUNTIME = "1.23.0"
# GroupQueryAttention of 1.23 sees another window: 1.23.2 gave other logits, 1.24.4 the right ones.
MIN_ONNXRUNTIME_WITH_WINDOWS = "1.24.2"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """What an export made and measured."""

    path: Path
    manifest: Manifest
    verification: Verification
    weight_bytes: int  # of this bundle
    fp32_weight_bytes: int  # of the same graph in float32
    seconds: float
    sensitivity: Sensitivity | None = None  # what each matrix costs, where that was measured

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": str(self.path),
            "source": self.manifest.source,
            "precision": self.manifest.precision,
            "graph": self.manifest.graph,
            "graph_reason": self.manifest.graph_reason,
            "layers": len(self.manifest.layers),
            "weight_bytes": self.weight_bytes,
            "fp32_weight_bytes": self.fp32_weight_bytes,
            "seconds": self.seconds,
            "parity": dict(self.manifest.parity),
            "quality": dict(self.manifest.quality),
        }


def export(
    module_or_path: nn.Module | str | Path,
    out: str | Path,
    precision: str = "int8",
    target: str = "cpu",
    graph: str = "auto",
    tokenizer: str | Path | None = None,
    context_length: int | None = None,
    force: bool = False,
    *,
    calibration: str | Path | None = None,
    max_kl: float | None = None,
    sensitivity: Sequence[str | Path] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Exports a decoder to a bundle folder and proves that the bundle computes what the source computes.

    `module_or_path` is a torch.nn.Module with forward(input_ids (B, T), position_ids (B, T)) -> logits (B, T, V) whose
    attention is F.scaled_dot_product_attention(q, k, v, is_causal=True); a transformers model for causal language
    modelling; or the path of a checkpoint folder, a Hugging Face folder, a .gguf file, a llama2.c
    .bin (`tokenizer` may then be the one of its own format), or "file.py:factory".
    `precision`: "int8", "int4" or "fp32". `target`: "cpu", "cuda", "webgpu" or "portable". `graph`: "auto", "fused" or
    "standard". `context_length` in tokens is required for a module. `calibration` is a text file that int8 or int4 is
    made for and measured on, instead of text that the model itself writes. `max_kl` in nats bounds what it may cost
    there: the matrices that cost most stay in float32, or of int4 in int8, until it does not cost more. `sensitivity`
    names files, .json or .png, for a table of what each matrix costs. `progress` is called with each stage's name.

    Nothing is left behind on failure. Raises InputError, MissingFileError, ExistingFolderError, IntegrityError,
    ProviderError (the target is not on this machine), ResourceError (too little memory or disk), ContractError (the
    cache cannot be grafted onto it), NumericsError (a weight that is no number), ParityError (the bundle differs from
    the source) or QualityError (`max_kl` cannot be met, of int4 with every product in int8).
    """
    started = time.perf_counter()
    say = progress or (lambda stage: None)
    _check_choices(precision, target, graph)
    if calibration is not None and precision == "fp32":
        raise InputError("float32 needs no calibration: leave out --calibration, or export with --precision int8")
    check_budget(max_kl, precision)
    tables = check_tables(sensitivity, precision, out, [module_or_path, tokenizer, calibration])
    by_matrix = max_kl is not None or bool(tables)
    refuse_existing(Path(out), force=force)
    if isinstance(module_or_path, (str, Path)) and Path(out).resolve() == Path(module_or_path).resolve():
        raise InputError(f"{out} is what is to be exported, and would be replaced: choose another --out")
    say("open the source")
    source = open_source(
        module_or_path,
        tokenizer=tokenizer,
        context_length=context_length,
        trust_remote_code=trust_remote_code,
        say=say,
        before_loading=lambda weights: require_disk(Path(out), weights, precision, by_matrix=by_matrix),
    )

    windows = int4.WINDOWS if precision == "int4" else WINDOWS
    calibration_ids = None if calibration is None else read_calibration(calibration, source.tokenizer, windows)
    weights = parameters(source.module)
    require_memory(weights, loaded_for=precision)
    require_disk(Path(out), weights, precision, by_matrix=by_matrix)
    made = _make_graph(source, target, graph, say)

    with whole_folder(Path(out), force=force) as folder:
        job = _Job(made.source, made.observation, made.choice, target, say)
        fp32 = folder if precision == "fp32" else folder / ".fp32"
        bundle, fp32_bytes = job.write(made.model, fp32, "fp32")
        verification = job.verify(bundle, but=("batch",) if made.by_optimum else ())
        if not verification.ok:  # positions that count a batch's padding, too: ALiBi by columns
            job = dataclasses.replace(job, padding=False)
            bundle = Bundle(bundle.path, dataclasses.replace(bundle.manifest, padding=False))
            verification = job.verify(bundle)
        parity, weight_bytes, quality, table = {"fp32": verification.to_json()}, fp32_bytes, dict[str, Any](), None
        if precision != "fp32":
            say(f"calibrate {precision} on {calibration or 'text of the model itself'}")
            text = calibration_text(bundle, calibration_ids, windows)
            writing = functools.partial(job.write, folder=folder, precision=precision)
            exact = bundle
            if precision == "int4":
                small = int4.make_int4(exact, text, writing, say, max_kl=max_kl)
            else:
                small = make_int8(exact, text, writing, say, max_kl=max_kl, by_matrix=bool(tables))
            bundle, weight_bytes, quality, table = small.bundle, small.weight_bytes, small.quality, small.sensitivity
            verification = job.verify(bundle)
            parity[precision] = verification.to_json()
            quality |= add_int8_cache(exact, bundle, text, say)
            shutil.rmtree(fp32)
        manifest = job.finish(bundle, parity, quality)
        for path in tables:
            assert table is not None
            write_table(path, table)
    return Report(Path(out), manifest, verification, weight_bytes, fp32_bytes, time.perf_counter() - started, table)


@dataclass(frozen=True)
class _Made:
    """A clean float32 graph of the source."""

    source: Source
    model: ir.Model
    observation: Observation
    choice: GraphChoice
    by_optimum: bool = False


def _make_graph(source: Source, target: str, graph: str, say: Progress) -> _Made:
    try:
        return _graft(source, target, graph, say)
    except ContractError as error:
        if source.folder is None:
            raise
        if not optimum.is_installed():
            raise ContractError(
                f"{error}; optimum's exporter knows some models that the graft cannot take: in a virtual environment "
                f"of its own type  {optimum.INSTALL}  and then this command again"
            ) from error
        if graph == "fused":
            raise
        say(f"the graft cannot take it ({error}): ask optimum's exporter")
        return _by_optimum(source)


def _graft(source: Source, target: str, graph: str, say: Progress) -> _Made:
    say(f"observe the attention calls of {source.name}")
    observation = observe(source.module, source.context_length)
    check_tokenizer(source, observation.vocab_size)
    choice = choose_graph(graph, target, observation)
    rehearse(source.module, observation, source.context_length)
    say(f"trace the {choice.graph} graph of {len(observation.layers)} layers ({choice.reason})")
    model = trace(source.module, observation, choice.graph, source.context_length)
    if choice.graph == "fused":
        fuse(model, source.context_length)
        choice = dataclasses.replace(choice, reason=f"{choice.reason}; {where_rotated(model)}")
    clean(model, source.module, observation.geometry, observation.vocab_size)
    return _Made(source, model, observation, choice)


def _by_optimum(source: Source) -> _Made:
    assert source.folder is not None
    native = optimum.NativeDecoder(source.module)
    made = optimum.export_with_optimum(source.folder, native)
    check_tokenizer(source, made.observation.vocab_size)
    clean(made.model, native, made.observation.geometry, made.observation.vocab_size)
    choice = GraphChoice("standard", "by optimum's exporter, since the graft cannot take this model")
    return _Made(dataclasses.replace(source, module=native), made.model, made.observation, choice, True)


def _check_choices(precision: str, target: str, graph: str) -> None:
    for name, found, known in (
        ("precision", precision, names.PRECISIONS),
        ("target", target, names.TARGETS),
        ("graph", graph, ("auto", *names.GRAPHS)),
    ):
        if found not in known:
            raise InputError(f"{name} is {found!r}; it must be one of {', '.join(known)}")
    if target == "portable" and graph == "fused":
        raise InputError("the fused graph is made of one provider's operators: with --target portable use standard")
    if target == "portable" and precision != "fp32":
        raise InputError(
            f"--target portable promises ONNX-standard operators only, and {precision} is multiplied by MatMulNBits, "
            "which is onnxruntime's own: export with --precision fp32, or with --target cpu --graph standard"
        )
    providers.require_target(target)


@dataclass(frozen=True)
class _Job:
    """What the steps of one export share."""

    source: Source
    observation: Observation
    choice: GraphChoice
    target: str
    say: Progress
    padding: bool = True

    def write(self, model: ir.Model, folder: Path, precision: str) -> tuple[Bundle, int]:
        """Writes the graphs of one precision. Returns the bundle so far, and the bytes of its weights."""
        self.say(f"write {precision} weights")
        source, observation = self.source, self.observation
        manifest = Manifest(
            pastkey_version=pastkey.__version__,
            source=source.name,
            precision=precision,
            target=self.target,
            graph=self.choice.graph,
            graph_reason=self.choice.reason,
            vocab_size=observation.vocab_size,
            context_length=source.context_length,
            layers=observation.geometry,
            opset=model.opset_imports[""],
            ir_version=IR_VERSION,
            min_onnxruntime=self._min_onnxruntime(),
            bos_token_id=source.bos_token_id,
            eos_token_ids=source.eos_token_ids,
            padding=self.padding,
            operators=count_operators(model),
        )
        weight_bytes = write_graphs(model, folder, precision)
        return Bundle(folder, manifest), weight_bytes

    def _min_onnxruntime(self) -> str:
        windows = self.choice.graph == "fused" and any(layer.window for layer in self.observation.layers)
        return MIN_ONNXRUNTIME_WITH_WINDOWS if windows else MIN_ONNXRUNTIME

    def verify(self, bundle: Bundle, *, but: tuple[str, ...] = ()) -> Verification:
        """Raises ParityError when the bundle does not compute what its source computes, `but` for some checks."""
        self.say(f"verify {bundle.manifest.precision}: prefill, decode, chunks, batch, greedy")
        try:
            verification = verify(bundle, self.source.module, layers=self.observation.layers)
        except RunError as error:
            if isinstance(error, PastkeyError):
                raise
            raise ParityError(
                f"onnxruntime cannot run the {bundle.manifest.precision} export of {self.source.name} "
                f"({first_line(error)}): try --graph standard"
            ) from error
        if any(not check.ok and check.name not in but for check in verification.checks):
            verification.require_ok(f"the {bundle.manifest.precision} export of {self.source.name}")
        return verification

    def finish(self, bundle: Bundle, parity: dict[str, Any], quality: dict[str, Any]) -> Manifest:
        """Writes the configurations and, last of all, the manifest with every file's hash."""
        folder = bundle.path
        manifest = dataclasses.replace(bundle.manifest, parity=parity, quality=quality)
        write_configurations(folder, self.source, manifest, [layer.heads for layer in self.observation.layers])
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        records = parse_records(folder, file_records(folder, files))
        manifest = dataclasses.replace(manifest, files=records)
        write_json(folder / names.MANIFEST, manifest.to_json())
        return manifest
