"""The finished steps of an export, from which `--resume` goes on after a kill or a failure.

They are files of the unfinished folder, each step with a record in its STEPS. A record has the step's key: the sha256
of the source's identity, the program, and the options that the step depends on. A step with another key, and all steps
after it, are made again. Entries of the cache have keys of the same kind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pastkey
from pastkey.contract import names
from pastkey.contract.source_files import source_files
from pastkey.errors import InputError, IntegrityError
from pastkey.files.durable import STEPS, sync_tree, write_json
from pastkey.files.folder import hub_id, read_json
from pastkey.runtime.providers.ort import onnxruntime

from .export_cache import ExportCache
from .progress import Progress
from .settings import ExportConfig, split_factory
from .source.hub import HubModel

FP32, TEXT, QUANTIZED = "fp32", "text", "quantized"  # the steps, in their order
FP32_FOLDER = ".fp32"  # of the float32 bundle that others are made from
_SHOWN = {FP32: "the float32 graph", TEXT: "the calibration text", QUANTIZED: "the quantized weights"}
_EDGE = 1 << 20  # bytes at either end of a file that are hashed

# Options that no step depends on, and those that only the steps from this one on depend on.
_NO_STEP = (
    "force", "resume", "cache", "network", "format", "generate", "provider_options", "session_options",
    "allow_fallback",
)  # fmt: skip
_FROM_TEXT, _FROM_QUANTIZED = ("precision", "calibration"), ("max_kl", "sensitivity", "shard_size")
# Options, some of which name files, that the float32 graph and its proof do not depend on once its form is known.
_NOT_OF_GRAPH = ("target", "chunk", "tokenizer", "chat_template", "eos", "adapters")

Identity = dict[str, Any]


def identity(source: nn.Module | str | Path | HubModel, config: ExportConfig) -> Identity | None:
    """Returns what tells a source from a changed one, with the files that options name.

    None for a module and for a model on the Hub whose commit is not known yet.

    Of each file: size, time of change, and the sha256 of its first and last megabyte.
    """
    if isinstance(source, nn.Module):
        return None
    if not isinstance(source, HubModel) and (split_factory(str(source)) or hub_id(str(source))) is not None:
        return None
    found: Identity = {}
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

    A checkpoint of pastkey may change: training goes on, and all of it is read at once.
    """
    if before is None or isinstance(source, (nn.Module, HubModel)) or (Path(source) / names.MANIFEST).exists():
        return
    after = identity(source, config) or {}
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise IntegrityError(
            f"{source} changed while it was exported ({changed[0]}): export it again when nothing writes to it"
        )


class Steps:
    """The finished steps of the export in a folder. Without an identity of the source there are none.

    Attributes:
        cache: What earlier exports kept for this one.
    """

    def __init__(
        self, folder: Path, config: ExportConfig, source: Identity | None, progress: Progress, graph: str = ""
    ) -> None:
        """Removes everything from the folder that belongs to no step of this source and these options.

        `graph` is the form of the float32 graph.
        """
        self._folder, self._records, self._synced = folder, folder / STEPS, config.resume
        self._keys = {} if source is None else _keys(config, source)
        of_graph = of_text = None
        if config.cache and source is not None:
            of_graph = _graph_key(config, source, graph)
            of_text = self._keys[TEXT] if config.calibration is None else None  # else it is read from the user's file
        self.cache = ExportCache(progress, graph=of_graph, text=of_text)
        self._found: dict[str, dict[str, Any]] = {}
        for name, key in self._keys.items():
            record = self._read(name)
            if record is None or record["key"] != key:
                break
            self._found[name] = record
        self._remove_others()
        if self._found:
            progress.say(f"resumed: {', '.join(_SHOWN[name] for name in self._found)} of the export before")

    def found(self, name: str) -> Any:
        """Returns the content that a finished step was recorded with; None if the step is not finished."""
        return self._found[name]["content"] if name in self._found else None

    def finish(self, name: str, content: dict[str, Any], made: Path | None = None) -> None:
        """Records a step, with the files below `made`."""
        if name not in self._keys:
            return
        files = [] if made is None else [path for path in sorted(made.rglob("*")) if path.is_file()]
        if made is not None and self._synced:  # otherwise a power cut may leave files that are shorter, as sizes show
            sync_tree(made)
        sizes = {path.relative_to(self._folder).as_posix(): path.stat().st_size for path in files}
        self._records.mkdir(exist_ok=True)
        write_json(self._records / f"{name}.json", {"key": self._keys[name], "files": sizes, "content": content})

    def remove(self) -> None:
        """Removes the records, and what only they need, from the folder that is to be a bundle."""
        shutil.rmtree(self._records, ignore_errors=True)
        shutil.rmtree(self._folder / FP32_FOLDER, ignore_errors=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        """Returns a record whose files are there."""
        try:
            record = read_json(self._records / f"{name}.json")
            sizes = {name: (self._folder / name).stat().st_size for name in record["files"]}
        except (OSError, InputError, IntegrityError, LookupError, TypeError):
            return None
        return record if sizes == record["files"] else None

    def _remove_others(self) -> None:
        kept = {self._records / f"{name}.json" for name in self._found}
        kept |= {self._folder / name for record in self._found.values() for name in record["files"]}
        for place, folders, files in os.walk(self._folder, topdown=False):
            for file in files:
                if Path(place, file) not in kept:
                    Path(place, file).unlink()
            for folder in folders:
                with contextlib.suppress(OSError):  # one that is not empty
                    Path(place, folder).rmdir()


def _keys(config: ExportConfig, source: Identity) -> dict[str, str]:
    """Returns the key of each step of an export."""
    options, later = _options(config)
    first = [_program(), source, options, later if config.precision == "fp32" else None]  # then it is the bundle itself
    text = [*first, [later[name] for name in _FROM_TEXT]]
    quantized = [*text, [later[name] for name in _FROM_QUANTIZED]]
    return {name: _hash(key) for name, key in ((FP32, first), (TEXT, text), (QUANTIZED, quantized))}


def _graph_key(config: ExportConfig, source: Identity, graph: str) -> str:
    """Returns the key of the float32 graph and its proof, for every precision and target that it is made for."""
    options, _ = _options(config)
    own = {name: value for name, value in options.items() if name not in _NOT_OF_GRAPH}
    files = {name: state for name, state in source.items() if not name.startswith("--")}
    return _hash([_program(), files, own, graph])


def _options(config: ExportConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options that the first step depends on, and those that only later ones do."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NO_STEP}
    return options, {name: options.pop(name) for name in (*_FROM_TEXT, *_FROM_QUANTIZED)}


def _program() -> list[str]:
    """Returns what makes the steps: pastkey, its code while a version is developed, and the libraries below it."""
    code = _hash([file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.rglob("*.py"))])
    found: list[str] = [pastkey.__version__, code, torch.__version__, onnxruntime.__version__]
    for library in ("onnxscript", "transformers", "gguf"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(importlib.metadata.version(library))
    return found


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
