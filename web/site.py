"""The files of the page for one bundle, and the index of a browser's downloads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from pastkey.contract import names
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.errors import InputError, MissingFileError

INDEX: Final = names.MANIFEST  # so that --force replaces a folder that pastkey wrote, and no other
GOLDEN: Final = "golden.f32"  # the golden logits (N, V), little-endian float32
FORMAT_VERSION: Final = 1
LARGEST: Final = 2**31 - 1  # bytes of a file: an ArrayBuffer of Chromium
# The options of pastkey.js's Sampler by the names of the runtime.
SAMPLING: Final = {
    "temperature": "temperature",
    "top_k": "topK",
    "top_p": "topP",
    "min_p": "minP",
    "repetition_penalty": "repetitionPenalty",
}
_HERE = Path(__file__).parent
PAGE, LIBRARIES = _HERE / "page", _HERE / "lib"


def site(bundle: str | Path | Bundle) -> Mapping[str, Path | bytes]:
    """The page of a bundle: address relative to the page -> a file, or its content. Nothing is copied.

    A server answers these addresses, and "index.html" for the folder itself.

    Args:
        bundle: A bundle's folder, or an opened bundle.

    Raises:
        MissingFileError: The bundle is not there, or this checkout lacks the JavaScript libraries.
        InputError: The bundle is too large for a browser.
        IntegrityError: A file of the bundle is damaged.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    golden, content = _golden(opened)
    files: dict[str, Path | bytes] = {name: opened.path / name for name in _wanted(opened)}
    files[GOLDEN] = content
    index = _index(opened, golden, content)
    return _own_files() | files | {INDEX: json.dumps(index, ensure_ascii=False, allow_nan=False).encode()}


def _own_files() -> dict[str, Path | bytes]:
    if not LIBRARIES.is_dir():
        raise MissingFileError(
            f"{LIBRARIES} is missing, which has onnxruntime-web and the tokenizer: type  make web-assets  in the "
            "checkout (it needs npm), or install pastkey's wheel, which contains them"
        )
    files: dict[str, Path | bytes] = {file.name: file for file in PAGE.iterdir()}
    return files | {f"lib/{file.name}": file for file in LIBRARIES.iterdir()}


def _wanted(bundle: Bundle) -> Iterator[str]:
    """The bundle's files that a browser downloads: the graph with the logits of every position, and the tokenizer."""
    if bundle.manifest.states:
        raise InputError(
            f"{bundle.path} keeps the states of recurrences, whose operators are not tested in a browser: give a "
            "decoder that has only attention"
        )
    graph, files = bundle.all_logits_graph.relative_to(bundle.path).as_posix(), bundle.manifest.files
    weights = (name for name in files if names.is_weights_file(name, graph))
    for name in (graph, *weights, *(name for name in files if name == names.TOKENIZER)):
        if files[name].size > LARGEST:
            raise InputError(
                f"{bundle.path / name} has {files[name].size / 1e9:.1f} GB, and a browser holds 2.1 GB in one file: "
                "export the model with --precision int8 or int4, or with --shard-size 2GB"
            )
        yield name


def slow_on_cpu(bundle: Bundle) -> bool:
    """Whether its weights are dequantized in every run: WebAssembly has no kernel of MatMulNBits."""
    return "MatMulNBits" in bundle.manifest.operators


def _golden(bundle: Bundle) -> tuple[dict[str, Any], bytes]:
    """The texts of the golden logits for the index, and the logits."""
    from pastkey.runtime.engine.golden import Golden

    golden = Golden.of(bundle)
    index = {"ids": golden.ids.tolist(), "ends": golden.ends.tolist(), "limit": golden.limit}
    return index, golden.logits.astype("<f4").tobytes()


def _chat_template(bundle: Bundle) -> tuple[str | None, dict[str, str]]:
    """The text of the template and its special tokens, or None where the page can only continue texts."""
    from pastkey.runtime.text.chat_template import template_of

    try:
        return template_of(bundle) if bundle.tokenizer is not None else (None, {})
    except InputError:
        return None, {}


def _index(bundle: Bundle, golden: Mapping[str, Any], logits: bytes) -> dict[str, Any]:
    """The facts that pastkey.js reads of the manifest and of the small files, and the files that it downloads."""
    from pastkey.runtime.model.generation_config import sampling_defaults

    manifest = bundle.manifest
    template, tokens = _chat_template(bundle)
    graph, *others = _wanted(bundle)
    files = {name: asdict(manifest.files[name]) for name in (graph, *others)}
    files[GOLDEN] = {"size": len(logits), "sha256": sha256(logits).hexdigest()}
    return {
        "kind": "web",
        "format_version": FORMAT_VERSION,
        "source": manifest.source,
        "precision": manifest.precision,
        "graph": manifest.graph,
        "vocab_size": manifest.vocab_size,
        "context_length": manifest.context_length,
        "layers": [asdict(layer) for layer in manifest.layers],
        "rows": [asdict(kept) for kept in manifest.rows],
        "eos_token_ids": list(manifest.eos_token_ids),
        "sampling": {SAMPLING[name]: value for name, value in sampling_defaults(bundle).items() if name in SAMPLING},
        "chat_template": template,
        "special_tokens": tokens,
        "golden": dict(golden),
        "graph_file": graph,
        "weights": [name for name in others if name != names.TOKENIZER],
        "tokenizer": names.TOKENIZER if names.TOKENIZER in others else None,
        "files": files,
    }
