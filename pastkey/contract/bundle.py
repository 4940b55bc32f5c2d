"""The bundle's manifest, which `export` writes and `run` reads. Only this module knows its fields."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ..errors import InputError, IntegrityError
from ..files.external_data import check_contexts, check_external_data, check_heads
from ..files.folder import FileRecord, check_hashes, check_sizes, parse_records, read_json, read_manifest
from ..precisions import PRECISIONS
from ..providers import TARGETS
from ..typed import Between, Size, TokenId, parse
from ..values import as_path, require
from . import names
from .provider_options import require_in_manifest

# bundle/  pastkey.json                       this manifest
#          config.json  generation_config.json  tokenizer.json  tokenizer_config.json  genai_config.json
#          onnx/model.onnx | onnx/model_quantized.onnx      logits of every position, for every loader
#          onnx/pastkey.onnx                                logits of the last positions, for `generate`
#          onnx/pastkey_native.onnx                         the same for pastkey's kernel library
#          onnx/pastkey_adapters.onnx                       the same with LoRA adapters as inputs
#          onnx/pastkey_decode.onnx  onnx/pastkey_prefill.onnx   instead, if the graph is static
#          onnx/*.onnx_data                                 the weights, once
#          onnx/pastkey.ort                                 the graph for `generate` with its weights, by --format ort

_LEFT_BEHIND = (".DS_Store", "Thumbs.db", "desktop.ini")  # macOS and Windows leave them in folders

TokenCount = Annotated[int, Between(0)]  # also a number of nodes
_RELEASE = r"[0-9]{1,6}(\.[0-9]{1,6}){0,3}[A-Za-z0-9.+-]{0,40}"
# Goes up with every change of a field or of a graph's inputs. No other version is read.
FORMAT_VERSION = 8


@dataclass(frozen=True)
class KVGeometry:
    """The cache of one attention call, observed by running the module."""

    kv_heads: Size  # K
    key_head_size: Size  # D of the keys
    value_head_size: Size  # D of the values


@dataclass(frozen=True)
class RowsGeometry:
    """The cache of a short causal convolution or a shift: the last rows of its input."""

    rows: Size  # maximum number
    size: Size  # F


@dataclass(frozen=True)
class StateGeometry:
    """A state of one size, whatever the number of tokens."""

    kind: str  # names.CONV_STATE, names.RECURRENT_STATE or names.FLAT_STATE
    shape: tuple[Size, ...]  # of one sequence


@dataclass(frozen=True)
class KeyRotation:
    """How cached keys rotate with their position: RoPE."""

    layers: tuple[TokenCount, ...]  # the attention calls, from 0
    first: TokenCount  # the first channel of the head that rotates
    interleaved: bool  # True: pairs of neighbouring channels; False: pairs across the two halves
    angles: tuple[Annotated[float, Between(-math.pi, math.pi)], ...]  # radians per token, of each pair


@dataclass(frozen=True)
class CacheShift:
    """How the oldest tokens can be dropped from a cache, measured by running the module at export."""

    refused: str = ""  # why they cannot be dropped
    rotations: tuple[KeyRotation, ...] = ()  # of the keys that rotate; other keys do not change


@dataclass(frozen=True)
class StaticShape:
    """The sizes of the static graphs, in addition to the context, which is their past."""

    chunk: Size  # tokens of a prefill run
    masked: Annotated[float, Between(-1e38, -1.0)]  # added to the score of an unseen token
    windows: tuple[TokenCount, ...]  # of the masks, in tokens; 0 for all earlier ones


@dataclass(frozen=True)
class Compiled:
    """The device that the static graphs were compiled for."""

    provider: str  # the execution provider's short name
    options: Mapping[str, str]  # its options, as `provider_options` allows: the chip, for example
    onnxruntime: str  # the release that compiled them

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.provider} ({options}) by onnxruntime {self.onnxruntime}"


@dataclass(frozen=True)
class Manifest:
    """The manifest of a bundle. `parity` and `quality` hold the figures measured at export."""

    pastkey_version: str
    source: str  # the source's name: a checkpoint's, a module's class, or ORG/NAME on the Hugging Face Hub
    precision: str  # of the weights: a key of PRECISIONS
    target: str  # where it runs: one of `providers.TARGETS`
    graph: str  # its form: one of names.GRAPHS
    graph_reason: str  # the reason for this graph
    vocab_size: Size
    context_length: Size  # tokens
    layers: tuple[KVGeometry, ...]  # one per attention call, in order
    opset: Size
    ir_version: Size
    min_onnxruntime: str  # the oldest onnxruntime that loads the graphs
    shift: CacheShift
    rows: tuple[RowsGeometry, ...] = ()  # caches of rows in addition to keys and values, in order
    states: tuple[StateGeometry, ...] = ()  # in order; in float32
    windows: tuple[TokenCount, ...] = ()  # tokens that each attention call sees, with the new one; 0 for all, as ()
    static: StaticShape | None = None  # sizes of the static graphs
    compiled: Compiled | None = None  # if context binaries replace the static graphs
    provider_options: Mapping[str, str] = field(default_factory=dict)  # options of the target's provider
    revision: str = ""  # the source's commit on the Hub
    quick: bool = False  # exported with --quick: rounded to nearest, and proved on a short text
    proved: Size | None = None  # tokens of the longest text on which the source was compared, cached, with its own call
    call: str = ""  # the author's call, unless it is forward(input_ids, position_ids)
    bos_token_id: TokenId | None = None  # the BOS token; the bundle's tokenizer puts it in front of a prompt itself
    eos_token_ids: tuple[TokenId, ...] = ()  # generation ends at any of these
    padding: bool = True  # whether rows of different lengths may share a batch
    hidden_size: Size | None = None  # H, if pastkey's own graph outputs the last hidden states
    native: Size | None = None  # version of pastkey's own operators, if there is a graph for the kernel library
    native_left_out: str = ""  # why an export removed that graph
    operators: Mapping[str, TokenCount] = field(default_factory=dict)  # operator -> nodes, as exported
    parity: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)  # path relative to the folder -> size, sha256

    @property
    def window(self) -> int | None:
        """Tokens that the widest window sees, if every attention call has one and nothing else is kept."""
        every = all(self.windows) and not self.rows and not self.states
        return max(self.windows) if self.windows and every else None

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bundle", "format_version": FORMAT_VERSION} | dataclasses.asdict(self)


@dataclass(frozen=True)
class Bundle:
    """A bundle folder and its manifest; `open_bundle` has also checked the files' paths and sizes."""

    path: Path
    manifest: Manifest

    @property
    def all_logits_graph(self) -> Path:
        """The graph with the logits of every position."""
        return self.path / PRECISIONS[self.manifest.precision].graph

    @property
    def last_logits_graph(self) -> Path:
        """The graph with the logits of the last positions only."""
        return self.path / names.LAST_LOGITS_GRAPH

    @property
    def static_graphs(self) -> tuple[Path, Path]:
        """The graph of one new token, and that of a chunk."""
        return self.path / names.STATIC_DECODE_GRAPH, self.path / names.STATIC_PREFILL_GRAPH

    @property
    def native_graph(self) -> Path | None:
        """The graph for pastkey's kernel library, or None for a bundle without one."""
        return None if self.manifest.native is None else self.path / names.NATIVE_GRAPH

    @property
    def adapter_graph(self) -> Path | None:
        """The graph for LoRA adapters, or None for a bundle without one."""
        return self.path / names.ADAPTER_GRAPH if names.ADAPTER_GRAPH in self.manifest.files else None

    @property
    def tokenizer(self) -> Path | None:
        """tokenizer.json, or None for a bundle without a tokenizer."""
        return self.path / names.TOKENIZER if names.TOKENIZER in self.manifest.files else None


def read_bundle(path: str | Path) -> Bundle:
    """Reads only the manifest. Raises MissingFileError, InputError or IntegrityError."""
    folder = as_path(path, expected="the path of a bundle folder")
    return Bundle(folder, parse_manifest(folder, read_manifest(folder, "bundle", FORMAT_VERSION)))


def is_bundle(path: str | Path) -> bool:
    """Whether this is a bundle's folder. A checkpoint has a manifest as well."""
    manifest = Path(path) / names.MANIFEST
    return manifest.is_file() and read_json(manifest).get("kind") == "bundle"


def open_bundle(path: str | Path, *, verify: bool | None = None) -> Bundle:
    """Reads and checks a bundle before onnxruntime opens it.

    Version, paths, sizes, and the locations of the graphs' weights are always checked. Hashes are remembered from an
    earlier load (None), computed now (True), or skipped (False). Raises MissingFileError, InputError or IntegrityError.
    """
    bundle = read_bundle(path)
    folder, manifest = bundle.path, bundle.manifest
    own = bundle.static_graphs if manifest.graph == "static" else (bundle.last_logits_graph,)
    native = () if bundle.native_graph is None else (bundle.native_graph,)
    for needed in (bundle.all_logits_graph, *own, *native):
        if needed.relative_to(folder).as_posix() not in manifest.files:
            raise IntegrityError(f"{folder / names.MANIFEST} does not list {needed.relative_to(folder).as_posix()}")
    for file in bundle.all_logits_graph.parent.glob("*"):
        if file.name in _LEFT_BEHIND or file.name.startswith("._"):
            continue  # no graph can name them: the locations of weights are checked below
        if file.relative_to(folder).as_posix() not in manifest.files:
            raise IntegrityError(f"{file} is not listed in {names.MANIFEST}: it was added, or the list was altered")
    check_sizes(folder, manifest.files)
    if verify is not False:
        check_hashes(folder, manifest.files, remembered=not verify)
    check_external_data(folder, manifest.files)
    check_contexts(folder, manifest.files, compiled=manifest.compiled is not None)
    if manifest.states:
        heads = [state.shape[0] for state in manifest.states if state.kind == names.RECURRENT_STATE]
        check_heads(folder, manifest.files, max([*heads, *(layer.kv_heads for layer in manifest.layers)], default=0))
    return bundle


def parse_manifest(folder: Path, content: Mapping[str, Any]) -> Manifest:
    """Parses the manifest of a bundle in `folder`. Raises IntegrityError.

    Checks every field's type by its annotation, then combinations of fields.
    """
    values = {key: value for key, value in content.items() if key not in ("kind", "format_version")}
    values["files"] = parse_records(folder, values.get("files"))
    try:
        manifest = parse(Manifest, values, "the manifest")
        static, graph = manifest.static, manifest.graph
        require(manifest.precision in PRECISIONS, "precision", manifest.precision, "one of pastkey's")
        require(manifest.target in TARGETS, "target", manifest.target, f"one of {', '.join(TARGETS)}")
        require(graph in names.GRAPHS, "graph", graph, f"one of {', '.join(names.GRAPHS)}")
        require((graph == "static") == (static is not None), "static", static, "there where the graph is static")
        require(manifest.compiled is None or static is not None, "compiled", manifest.compiled, "of static graphs")
        require(not manifest.rows or graph == "standard", "rows", manifest.rows, "those of a standard graph")
        for state in manifest.states:
            ranks = {names.CONV_STATE: 2, names.RECURRENT_STATE: 3, names.FLAT_STATE: 1}
            require(ranks.get(state.kind) == len(state.shape), "states", state, "a kind of state with its shape")
        require(not manifest.states or static is None, "states", manifest.states, "those of a graph that is not static")
        calls = len(manifest.layers)
        require(len(manifest.windows) in (0, calls), "windows", manifest.windows, f"one for each of {calls} layers")
        hidden = manifest.hidden_size
        require(hidden is None or static is None, "hidden_size", hidden, "that of a graph that is not static")
        for rotation in manifest.shift.rotations:
            for call in rotation.layers:
                size = manifest.layers[call].key_head_size if call < len(manifest.layers) else 0
                end = rotation.first + 2 * len(rotation.angles)
                require(end <= size, "shift", f"channels up to {end} of attention call {call}", f"of {size} at most")
        release = manifest.min_onnxruntime
        require(bool(re.fullmatch(_RELEASE, release)), "min_onnxruntime", release, "a release, such as 1.26.0")
    except InputError as error:
        raise IntegrityError(
            f"{folder / names.MANIFEST} is not valid, since it was altered or cut short: {error}"
        ) from None
    require_in_manifest(manifest.target, manifest.provider_options, folder / names.MANIFEST)
    if manifest.compiled is not None:
        require_in_manifest(manifest.compiled.provider, manifest.compiled.options, folder / names.MANIFEST)
    return manifest
