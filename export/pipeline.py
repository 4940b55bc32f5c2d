"""checkpoint/ -> bundle/, from end to end: the main function of the stage, to be read aloud.

observe -> rehearse -> trace -> clean -> write fp32 -> verify [-> quantize -> write int8 -> verify] -> bundle/
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

import pastkey
from pastkey import names
from pastkey.bundle import Bundle, Manifest
from pastkey.errors import InputError
from pastkey.folder import file_records, parse_records, refuse_existing, whole_folder, write_json

from .files import count_operators, write_configurations, write_graphs
from .graft import IR_VERSION, OPSET, GraphChoice, choose_graph, trace
from .observe import Observation, observe
from .passes import clean
from .quantize import quantize
from .rehearse import rehearse
from .source import Source, check_tokenizer, open_source
from .verify import Verification, verify

# The oldest onnxruntime that what is exported was run on; 8-bit MatMulNBits itself came with 1.22.
MIN_ONNXRUNTIME = "1.23.0"

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
    progress: Progress | None = None,
) -> Report:
    """Exports a decoder to a bundle folder and proves that the bundle computes what the source computes.

    `module_or_path` is a torch.nn.Module with forward(input_ids (B, T), position_ids (B, T)) -> logits (B, T, V) whose
    attention is F.scaled_dot_product_attention(q, k, v, is_causal=True); a checkpoint folder; or "file.py:factory".
    `precision`: "int8" or "fp32". `target`: "cpu", "cuda", "webgpu" or "portable". `graph`: "auto", "fused" or
    "standard". `context_length` in tokens is required for a module. `progress` is called with each stage's name.

    Nothing is left behind on failure. Raises InputError, MissingFileError, ExistingFolderError, IntegrityError,
    ContractError (the cache cannot be grafted onto the module) or ParityError (the bundle differs from the source).
    """
    started = time.perf_counter()
    say = progress or (lambda stage: None)
    _check_choices(precision, target, graph)
    refuse_existing(Path(out), force=force)
    source = open_source(module_or_path, tokenizer=tokenizer, context_length=context_length)

    say(f"observe the attention calls of {source.name}")
    observation = observe(source.module, source.context_length)
    check_tokenizer(source, observation.vocab_size)
    choice = choose_graph(graph, target, observation)
    rehearse(source.module, observation, source.context_length)

    say(f"trace the {choice.graph} graph of {len(observation.layers)} layers ({choice.reason})")
    model = trace(source.module, observation, choice.graph, source.context_length)
    clean(model, source.module, observation.geometry, observation.vocab_size)

    with whole_folder(Path(out), force=force) as folder:
        job = _Job(source, observation, choice, target, say)
        fp32 = folder if precision == "fp32" else folder / ".fp32"
        bundle, fp32_bytes = job.write(model, fp32, "fp32")
        verification = job.verify(bundle)
        parity, weight_bytes = {"fp32": verification.to_json()}, fp32_bytes
        if precision == "int8":
            model = ir.load(bundle.common_graph)
            quantize(model)
            bundle, weight_bytes = job.write(model, folder, "int8")
            verification = job.verify(bundle)
            parity["int8"] = verification.to_json()
            shutil.rmtree(fp32)
        manifest = job.finish(bundle, parity, verification.quality)
    return Report(Path(out), manifest, verification, weight_bytes, fp32_bytes, time.perf_counter() - started)


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


@dataclass(frozen=True)
class _Job:
    """What the steps of one export share."""

    source: Source
    observation: Observation
    choice: GraphChoice
    target: str
    say: Progress

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
            opset=OPSET,
            ir_version=IR_VERSION,
            min_onnxruntime=MIN_ONNXRUNTIME,
            bos_token_id=source.bos_token_id,
            eos_token_ids=source.eos_token_ids,
            operators=count_operators(model),
        )
        weight_bytes = write_graphs(model, folder, precision)
        return Bundle(folder, manifest), weight_bytes

    def verify(self, bundle: Bundle) -> Verification:
        """Raises ParityError when the bundle does not compute what its source computes."""
        self.say(f"verify {bundle.manifest.precision}: prefill, decode, chunks, batch, greedy")
        verification = verify(bundle, self.source.module, layers=self.observation.layers)
        verification.require_ok(f"the {bundle.manifest.precision} export of {self.source.name}")
        return verification

    def finish(self, bundle: Bundle, parity: dict[str, Any], quality: dict[str, float]) -> Manifest:
        """Writes the configurations and, last of all, the manifest with every file's hash."""
        folder = bundle.path
        manifest = dataclasses.replace(bundle.manifest, parity=parity, quality=quality)
        write_configurations(folder, self.source, manifest, [layer.heads for layer in self.observation.layers])
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        records = parse_records(folder, file_records(folder, files))
        manifest = dataclasses.replace(manifest, files=records)
        write_json(folder / names.MANIFEST, manifest.to_json())
        return manifest
