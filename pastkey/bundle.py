"""The bundle's manifest: what `export` writes and `run` reads. The one place that knows its fields.

bundle/  pastkey.json                       this manifest
         config.json  generation_config.json  tokenizer.json  tokenizer_config.json  genai_config.json
         onnx/model.onnx | onnx/model_quantized.onnx      logits of every position, for every loader
         onnx/pastkey.onnx                                logits of the last positions, for `generate`
         onnx/pastkey_decode.onnx  onnx/pastkey_prefill.onnx   in its place, where the graph is static
         onnx/*.onnx_data                                 the weights, once
         onnx/pastkey.ort                                 the graph for `generate` with its weights, by --format ort
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import names
from .errors import IntegrityError
from .external_data import check_external_data
from .folder import FileRecord, check_hashes, check_sizes, parse_records, read_manifest
from .values import is_int, require

_LEFT_BEHIND = (".DS_Store", "Thumbs.db", "desktop.ini")  # what Macs and Windows leave in a folder that was looked at

FORMAT_VERSION = 2  # 2: lengths in place of the mask in pastkey's own fused graphs, and golden logits


@dataclass(frozen=True)
class KVGeometry:
    """The cache of one attention call, observed by running the module."""

    kv_heads: int  # K
    key_head_size: int  # D of the keys
    value_head_size: int  # D of the values


@dataclass(frozen=True)
class StateGeometry:
    """The cache of a short causal convolution or a shift: the last rows of what it reads."""

    rows: int  # at most
    size: int  # F


@dataclass(frozen=True)
class StaticShape:
    """The sizes of the static graphs, beside the context, which is their past."""

    chunk: int  # tokens of a run of prefill
    masked: float  # what is added to the score of a token that is not seen
    windows: tuple[int, ...]  # of the masks, in tokens; 0 for all earlier ones


@dataclass(frozen=True)
class Compiled:
    """What the static graphs were compiled for."""

    provider: str  # the execution provider's short name
    options: Mapping[str, str]  # its own: the chip, say
    onnxruntime: str  # the release that compiled them

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.provider} ({options}) by onnxruntime {self.onnxruntime}"


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself. `parity` and `quality` hold the figures measured at export."""

    pastkey_version: str
    source: str  # what was exported: a checkpoint's name, or a module's class
    precision: str  # names.PRECISIONS
    target: str  # names.TARGETS
    graph: str  # names.GRAPHS
    graph_reason: str  # why this graph
    vocab_size: int
    context_length: int  # tokens
    layers: tuple[KVGeometry, ...]  # one per attention call, in order
    opset: int
    ir_version: int
    min_onnxruntime: str  # the oldest onnxruntime that loads the graphs
    states: tuple[StateGeometry, ...] = ()  # beside those of attention, in order
    static: StaticShape | None = None  # of the static graphs
    compiled: Compiled | None = None  # where they are no graphs but context binaries
    provider_options: Mapping[str, str] = field(default_factory=dict)  # of the target's provider, where none are given
    call: str = ""  # how the author calls the module, where that is not forward(input_ids, position_ids)
    bos_token_id: int | None = None  # the BOS token; the bundle's tokenizer puts it in front of a prompt itself
    eos_token_ids: tuple[int, ...] = ()  # generation ends at any of these
    padding: bool = True  # whether rows of different lengths may share a batch
    operators: Mapping[str, int] = field(default_factory=dict)  # operator -> nodes, as exported
    parity: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)  # path relative to the folder -> size, sha256

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bundle", "format_version": FORMAT_VERSION} | dataclasses.asdict(self)


@dataclass(frozen=True)
class Bundle:
    """A bundle folder and its manifest; `open_bundle` has checked the files' paths and sizes too."""

    path: Path
    manifest: Manifest

    @property
    def all_logits_graph(self) -> Path:
        """The graph with the logits of every position."""
        return self.path / names.ALL_LOGITS_GRAPH[self.manifest.precision]

    @property
    def last_logits_graph(self) -> Path:
        """The graph with the logits of the last positions only."""
        return self.path / names.LAST_LOGITS_GRAPH

    @property
    def static_graphs(self) -> tuple[Path, Path]:
        """The graph of one new token, and that of a chunk."""
        return self.path / names.STATIC_DECODE_GRAPH, self.path / names.STATIC_PREFILL_GRAPH

    @property
    def int8_kv_graph(self) -> Path | None:
        """The graph with an int8 cache, or None for a bundle without one."""
        path = self.path / names.INT8_KV_GRAPH
        return path if path.is_file() else None

    @property
    def tokenizer(self) -> Path | None:
        """tokenizer.json, or None for a bundle without a tokenizer."""
        return self.path / names.TOKENIZER if names.TOKENIZER in self.manifest.files else None


def read_bundle(path: str | Path) -> Bundle:
    """Reads the manifest alone and looks at no other file. Raises MissingFileError, InputError or IntegrityError."""
    folder = Path(path)
    return Bundle(folder, _parse(folder, read_manifest(folder, "bundle", FORMAT_VERSION)))


def open_bundle(path: str | Path, *, verify: bool | None = None) -> Bundle:
    """Reads and checks a bundle before onnxruntime sees a byte of it.

    Version, paths, sizes, and where the graphs' weights lie are checked always. Hashes: remembered from an earlier load
    (None), hashed now (True), or left alone (False). Raises MissingFileError, InputError or IntegrityError.
    """
    bundle = read_bundle(path)
    folder, manifest = bundle.path, bundle.manifest
    own = bundle.static_graphs if manifest.graph == "static" else (bundle.last_logits_graph,)
    for needed in (bundle.all_logits_graph, *own):
        if needed.relative_to(folder).as_posix() not in manifest.files:
            raise IntegrityError(f"{folder / names.MANIFEST} does not list {needed.relative_to(folder).as_posix()}")
    for file in bundle.all_logits_graph.parent.glob("*"):
        if file.name in _LEFT_BEHIND or file.name.startswith("._"):
            continue  # no graph can name them: where its weights lie is checked below
        if file.relative_to(folder).as_posix() not in manifest.files:
            raise IntegrityError(f"{file} is not listed in {names.MANIFEST}: it was added, or the list was altered")
    check_sizes(folder, manifest.files)
    if verify is not False:
        check_hashes(folder, manifest.files, remembered=not verify)
    check_external_data(folder, manifest.files)
    return bundle


def _parse_static(content: Mapping[str, Any]) -> StaticShape:
    """Raises TypeError or ValueError."""
    static = StaticShape(**content)
    static = dataclasses.replace(static, windows=tuple(static.windows))
    require(is_int(static.chunk, 1), "chunk", static.chunk, "a whole number from 1")
    for window in static.windows:
        require(is_int(window, 0), "a window", window, "a whole number from 0")
    require(isinstance(static.masked, float) and static.masked < 0, "masked", static.masked, "a number below 0")
    return static


def _parse(folder: Path, content: Mapping[str, Any]) -> Manifest:
    fields = {f.name: f for f in dataclasses.fields(Manifest)}
    values = {key: value for key, value in content.items() if key not in ("kind", "format_version")}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    if unknown or missing:
        what = f"an unknown key {unknown[0]!r}" if unknown else f"no {missing[0]!r}"
        raise IntegrityError(f"{folder / names.MANIFEST} has {what}: it was altered or cut short")
    try:
        values["layers"] = tuple(KVGeometry(**layer) for layer in values["layers"])
        values["states"] = tuple(StateGeometry(**state) for state in values.get("states", ()))
        if (static := values.get("static")) is not None:
            values["static"] = static = _parse_static(static)
        if (compiled := values.get("compiled")) is not None:
            values["compiled"] = compiled = Compiled(**compiled)
            texts = [compiled.provider, compiled.onnxruntime, *compiled.options, *compiled.options.values()]
            require(all(isinstance(text, str) for text in texts), "compiled", values["compiled"], "made of texts")
            require(static is not None, "compiled", values["compiled"], "of static graphs")
        if (values["graph"] == "static") != (static is not None):
            raise ValueError(f"graph is {values['graph']!r} and static is {static!r}")
        sizes = [(name, values[name]) for name in ("vocab_size", "context_length", "opset", "ir_version")]
        sizes += [(name, size) for layer in values["layers"] for name, size in dataclasses.asdict(layer).items()]
        sizes += [(name, size) for state in values["states"] for name, size in dataclasses.asdict(state).items()]
        for name, size in sizes:
            require(is_int(size, 1), name, size, "a whole number from 1")
        values["eos_token_ids"] = tuple(values.get("eos_token_ids", ()))
        bos = values.get("bos_token_id")
        for token in (*values["eos_token_ids"], *(() if bos is None else (bos,))):
            require(is_int(token, 0), "a token id", token, "a whole number from 0")
        for name in ("pastkey_version", "source", "target", "graph_reason", "min_onnxruntime"):
            require(isinstance(values[name], str), name, values[name], "a text")
        require(isinstance(values.get("call", ""), str), "call", values.get("call"), "a text")
        for name in ("operators", "parity", "quality", "provider_options"):
            require(isinstance(values.get(name, {}), dict), name, values.get(name), "an object")
        if values["precision"] not in names.ALL_LOGITS_GRAPH:
            raise ValueError(f"precision is {values['precision']!r}")
        if not isinstance(values.get("padding", True), bool):
            raise ValueError(f"padding is {values['padding']!r}")
        if values["graph"] not in names.GRAPHS:
            raise ValueError(f"graph is {values['graph']!r}")
        if values["states"] and values["graph"] != "standard":
            raise ValueError(f"the {values['graph']} graph has no states")
    except (AttributeError, TypeError, ValueError) as error:
        raise IntegrityError(f"{folder / names.MANIFEST} is not valid: {error}") from None
    values["files"] = parse_records(folder, values.get("files"))
    return Manifest(**values)
