"""The content of a bundle's files that other programs read: the graph's names and sizes, the configurations, the
tokenizer. Reads no weights and creates no session.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from tokenizers import Tokenizer

from pastkey.contract import names
from pastkey.contract.bundle import Bundle, KVGeometry
from pastkey.errors import IntegrityError, PastkeyError
from pastkey.files.external_data import external_data
from pastkey.files.folder import read_json
from pastkey.files.reading import panics_as_errors
from pastkey.files.tokenizer_file import open_tokenizer


@dataclass(frozen=True)
class Tensor:
    """An input or output: its dtype in numpy's spelling, and its axes, each a number or a name."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """The interface of the all-logits graph: inputs, outputs, and the files with its weights."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    weights: Mapping[str, int]  # file beside the graph -> its minimum size in bytes

    @property
    def layers(self) -> int:
        """The number of attention calls with a cache."""
        return sum(names.past_key(number) in self.inputs for number in range(len(self.inputs)))

    def geometry(self, layer: int) -> KVGeometry | None:
        """Returns a layer's cache geometry if its sizes are numbers."""
        key, value = self.inputs.get(names.past_key(layer)), self.inputs.get(names.past_value(layer))
        if key is None or value is None or len(key.shape) != 4 or len(value.shape) != 4:
            return None
        sizes = key.shape[1], key.shape[3], value.shape[3]
        if not all(isinstance(size, int) for size in sizes):
            return None
        return KVGeometry(*sizes)  # type: ignore[arg-type]  # mypy does not narrow by all()


@dataclass(frozen=True)
class Json:
    """One configuration file; `problem` is a sentence that says why there is no content."""

    content: Mapping[str, Any]
    problem: str | None = None

    def get(self, key: str, default: Any = None) -> Any:
        return self.content.get(key, default)

    def section(self, *keys: str) -> Mapping[str, Any]:
        """Returns the object under these keys, {} if there is none."""
        found: Any = self.content
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class BundleView:
    """Everything that the rules read."""

    bundle: Bundle
    graph: Graph | None  # None: the file is missing
    config: Json
    generation_config: Json
    genai_config: Json
    tokenizer: Json
    tokenizer_config: Json
    special_ids: tuple[int, ...]  # tokens that the tokenizer adds to a text by itself

    @property
    def has_tokenizer(self) -> bool:
        return self.tokenizer.problem is None

    @property
    def adds_bos(self) -> bool:
        """Whether a prompt begins with the BOS token in pastkey."""
        bos = self.bundle.manifest.bos_token_id
        return bos is not None and self.special_ids[:1] == (bos,)


def read_bundle_view(bundle: Bundle) -> BundleView:
    """Reads only the files that the manifest lists, since other files are not verified.

    A missing or unreadable configuration is recorded in its `problem`. An unreadable graph raises IntegrityError.
    """
    tokenizer = _json(bundle, names.TOKENIZER)
    return BundleView(
        bundle,
        _graph(bundle.all_logits_graph) if bundle.all_logits_graph.is_file() else None,
        config=_json(bundle, names.CONFIG),
        generation_config=_json(bundle, names.GENERATION_CONFIG),
        genai_config=_json(bundle, names.GENAI_CONFIG),
        tokenizer=tokenizer,
        tokenizer_config=_json(bundle, names.TOKENIZER_CONFIG),
        special_ids=() if tokenizer.problem else special_ids((bundle.path / names.TOKENIZER).read_bytes()),
    )


def _json(bundle: Bundle, name: str) -> Json:
    path = bundle.path / name
    if name not in bundle.manifest.files and path.is_file():
        return Json({}, f"{name} is not listed in {names.MANIFEST}: it was added, or the list was altered")
    try:
        return Json(read_json(path))
    except PastkeyError as error:
        return Json({}, str(error).replace(f"{path}", name))


def special_ids(tokenizer: bytes) -> tuple[int, ...]:
    """Returns the tokens that a tokenizer.json's post-processor adds to every text, () if it cannot be read."""
    try:
        with panics_as_errors():
            return tuple(open_tokenizer(Tokenizer, tokenizer, names.TOKENIZER).encode("").ids)
    except Exception:  # the library raises nothing more specific
        return ()


def _graph(path: Path) -> Graph:
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # the protobuf library raises several kinds
        raise IntegrityError(f"{path} is not an ONNX graph ({error}): it was cut short, copy it again") from None
    weights: dict[str, int] = {}
    for data in external_data(path):
        weights[data.location] = max(data.offset + data.length, weights.get(data.location, 0))
    return Graph(_tensors(model.graph.input), _tensors(model.graph.output), weights)


def _tensors(values: Any) -> dict[str, Tensor]:
    found = {}
    for value in values:
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name if kind.elem_type else "unknown"
        found[value.name] = Tensor(
            dtype, tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)
        )
    return found
