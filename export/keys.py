"""The keys of an export's finished steps: each is the sha256 of all that the step depends on.

That is the source's identity, the program with its libraries, and options. `store.py` keeps the entry of a key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import pastkey
import pastkey.runtime
import pastkey.train
from pastkey.contract import names
from pastkey.contract.source_files import adapter_base, source_files
from pastkey.errors import IntegrityError
from pastkey.files.folder import hub_id
from pastkey.runtime.providers.ort import onnxruntime

from .settings import ExportConfig, split_factory
from .source.hub import HubModel
from .source.pretrained import code_references

_EDGE = 1 << 20  # bytes at either end of a file that are hashed

# Options that no step depends on, and those that only the text and the matrices depend on.
_NO_STEP = (
    "force", "cache", "network", "format", "generate", "provider_options", "session_options",
    "allow_fallback", "max_kl", "sensitivity", "shard_size",
)  # fmt: skip
_FROM_TEXT = ("precision", "calibration")
# Options, some of which name files, that the float32 graph and its proof do not depend on once its form is known.
_NOT_OF_GRAPH = ("target", "chunk", "tokenizer", "chat_template", "eos", "adapters")

Identity = dict[str, Any]


def identity(source: nn.Module | str | Path | HubModel, config: ExportConfig) -> Identity | None:
    """Returns the facts that tell a source from a changed one, with the files that options name.

    None for a module and for a model on the Hub whose commit is not known yet.

    Of each file: size, time of change, and the sha256 of its first and last megabyte.
    """
    if isinstance(source, nn.Module):
        return None
    if not isinstance(source, HubModel) and (split_factory(str(source)) or hub_id(str(source))) is not None:
        return None
    found: Identity = {}
    if _reads_elsewhere(source.folder if isinstance(source, HubModel) else Path(source), code=config.trust_remote_code):
        found["another repository"] = None  # whose state is not known, so that no step has a key
    if isinstance(source, HubModel):
        found["commit"] = [source.name, source.revision]
    else:
        found |= {name: _state(file) for name, file in source_files(Path(source).resolve()).items()}
    for option in ("tokenizer", "chat_template", "calibration"):
        given = getattr(config, option)
        path = None if given is None else Path(str(given).partition(".py:")[0])
        if path is not None and path.exists():
            found |= {f"--{option} {name}": _state(file) for name, file in source_files(path.resolve()).items()}
    return found


def _reads_elsewhere(folder: Path, *, code: bool) -> bool:
    """Whether a source reads its base, or with `code` its Python code, from another repository on the Hub."""
    base = Path(adapter_base(folder) or folder)
    return not base.exists() or (code and any("--" in name for name in code_references(base)))


def _state(file: Path) -> list[Any]:
    with file.open("rb") as opened:
        status = os.fstat(opened.fileno())
        digest = hashlib.sha256(opened.read(_EDGE))
        if status.st_size > _EDGE:
            opened.seek(max(_EDGE, status.st_size - _EDGE))
            digest.update(opened.read(_EDGE))
    return [status.st_size, status.st_mtime_ns, digest.hexdigest()]


def require_unchanged(source: nn.Module | str | Path | HubModel, config: ExportConfig, before: Identity | None) -> None:
    """Raises IntegrityError if the source's files changed since `before`.

    A checkpoint of pastkey may change: training may continue, and all of it is read at once.
    """
    if before is None or isinstance(source, (nn.Module, HubModel)) or (Path(source) / names.MANIFEST).exists():
        return
    after = identity(source, config) or {}
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise IntegrityError(
            f"{source} changed while it was exported ({changed[0]}): export it again when nothing writes to it"
        )


@dataclass(frozen=True)
class Keys:
    """The keys of one export's steps; None for a step that is always made."""

    graph: str | None = None  # of the float32 graph and its proof, for every precision and target
    text: str | None = None  # of the text that the model writes
    matrices: str | None = None  # of those that GPTQ rounds


def keys_of(config: ExportConfig, source: Identity | None, graph: str) -> Keys:
    """Returns the keys of an export; without an identity or a cache there are none. `graph` is the graph's form."""
    if source is None or None in source.values() or not config.cache:
        return Keys()
    program = _program()
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NO_STEP}
    later = [options.pop(name) for name in _FROM_TEXT]
    of_graph = {name: value for name, value in options.items() if name not in _NOT_OF_GRAPH}
    files = {name: state for name, state in source.items() if not name.startswith("--")}
    text = [program, source, options, later]
    return Keys(
        graph=_hash([program, files, of_graph, graph]),
        text=_hash([*text, "text"]) if config.calibration is None else None,  # otherwise it is the user's
        matrices=_hash([*text, "matrices"]),
    )


def _program() -> list[str]:
    """Returns the makers of steps and proofs: pastkey, its code while a version is developed, libraries and the CPU.

    Two CPUs round the sums of a kernel differently, so the same step has other last bits, and another KL divergence.
    """
    rooms = (__file__, pastkey.__file__, pastkey.runtime.__file__, pastkey.train.__file__)
    files = [file for room in rooms for file in sorted(Path(str(room)).parent.rglob("*.py"))]
    code = [file.read_text(encoding="utf-8") for file in files]
    found: list[str] = [pastkey.__version__, _hash(code), torch.__version__, onnxruntime.__version__]
    found += [platform.machine(), *np.show_config(mode="dicts").get("SIMD Extensions", {}).get("found", ())]
    for library in ("numpy", "onnx", "onnx-ir", "onnxscript", "safetensors", "tokenizers", "transformers", "gguf"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(importlib.metadata.version(library))
    return found


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
