"""Reads and writes a checkpoint folder so that a kill at any moment leaves a complete one.

    checkpoint/  pastkey.json           the manifest: size and sha256 of every file, the progress of training
                 config.json  model.safetensors  tokenizer.json  tokenizer_config.json
                 training/state.safetensors          the optimizer's moments
                 training/tokens-train.bin, tokens-val.bin

A fine-tuned model of transformers has the files of its own folder instead of those of the second line, and a LoRA
adapter those of peft (adapter_config.json, adapter_model.safetensors): "layout" in the manifest says which.

A save writes each changed file as NAME.new, then replaces pastkey.json, which commits the save, then renames every
NAME.new to NAME. A process that opens the folder in between reads the listed content from NAME.new. A NAME.new that the
manifest does not list belongs to a save that was not committed, or to the next one. Only the training process, which
holds the folder's lock, renames or removes files. There are no pickles.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import safetensors.torch
import torch
from torch import Tensor

import pastkey
from pastkey.contract import names
from pastkey.contract.config import ModelConfig
from pastkey.errors import IntegrityError
from pastkey.files.durable import locked, remove_leftovers, sync_folder, write_json
from pastkey.files.folder import (
    FileRecord,
    check_hashes,
    check_sizes,
    file_record,
    parse_records,
    read_json,
    read_manifest,
)
from pastkey.files.folder import sha256 as file_sha256
from pastkey.files.memory import require_memory_for
from pastkey.files.reading import reading
from pastkey.files.safetensors_header import read_header

from .model import Decoder

if TYPE_CHECKING:
    from .pretrained import Pretrained

FORMAT_VERSION = 2
TRANSFORMERS: Final = "transformers"  # the layouts
PEFT: Final = "peft"
STATE = "training/state.safetensors"
TOKENS_TRAIN = "training/tokens-train.bin"
TOKENS_VAL = "training/tokens-val.bin"
METRICS = "metrics.jsonl"
LOSS_CURVE = "loss.png"

_TRAINING = "training/"
_MODEL_FILES = (names.CONFIG, names.WEIGHTS, names.TOKENIZER, names.TOKENIZER_CONFIG)
_PENDING = ".new"
_SAVING = "training/saving.new"  # a folder into which a library writes its files
T = TypeVar("T")
Loaded = tuple[Mapping[str, Any], ModelConfig, dict[str, Tensor]]  # manifest, configuration, weights


@dataclass(frozen=True)
class Checkpoint:
    """The verified content of a checkpoint folder."""

    path: Path
    config: ModelConfig
    model: Decoder  # in eval mode
    training: Mapping[str, Any]  # "step", "settings", "data", "figures"

    @property
    def tokenizer_path(self) -> Path:
        """tokenizer.json."""
        return self.path / names.TOKENIZER


@dataclass(frozen=True)
class TrainingState:
    """The state that training needs besides the weights to continue as if it had never stopped."""

    step: int  # optimizer steps done
    optimizer: Mapping[str, Tensor]  # the moments, by parameter name
    settings: Mapping[str, Any]  # of TrainConfig
    data: Mapping[str, Any]  # fingerprint and counts of the corpus
    figures: Mapping[str, Any]  # losses at this step


# --- writing ------------------------------------------------------------------------------------------------------
def save_checkpoint(
    folder: Path, model: Decoder | Pretrained, state: TrainingState, *, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Saves the model and state to `folder` atomically. The tokenizer and token files must be there already.

    `weights` are those of a model that is divided among processes. An error, such as a full disk, leaves the folder's
    earlier checkpoint unchanged.
    """
    try:
        _save(folder, model, state, weights)
    finally:
        shutil.rmtree(folder / _SAVING, ignore_errors=True)


def _save(
    folder: Path, model: Decoder | Pretrained, state: TrainingState, weights: Mapping[str, Tensor] | None
) -> None:
    layout = None if isinstance(model, Decoder) else model.layout
    changed = _decoder_files(model, weights) if isinstance(model, Decoder) else _files_of(model, folder / _SAVING)
    # An empty safetensors file is invalid, and at step 0 there are no moments yet.
    changed[STATE] = safetensors.torch.save(dict(state.optimizer) or {"none": torch.zeros(1)})
    records = {name: record for name, record in _known_or_prepared(folder).items() if name not in changed}
    model_files = [name for name in (*records, *changed) if not name.startswith(_TRAINING)]
    training_files = [name for name in (*records, *changed) if name.startswith(_TRAINING)]
    records |= {name: _record(content) for name, content in changed.items()}
    manifest = {
        "kind": "checkpoint",
        "format_version": FORMAT_VERSION,
        "pastkey_version": pastkey.__version__,
        **({} if layout is None else {"layout": layout}),
        "files": {name: asdict(records[name]) for name in model_files},
        "training": {
            "step": state.step,
            "settings": dict(state.settings),
            "data": dict(state.data),
            "figures": dict(state.figures),
            "files": {name: asdict(records[name]) for name in training_files},
        },
    }
    try:
        for name, content in changed.items():
            _write_through(_pending(folder / name), content)
        for place in {(folder / name).parent for name in changed}:
            sync_folder(place)
        write_json(folder / names.MANIFEST, manifest)
    except BaseException:
        # The manifest may exist although its writing was interrupted. Then these files are the checkpoint.
        if _known_records(folder) != records:
            for name in changed:
                _pending(folder / name).unlink(missing_ok=True)
        raise
    sync_folder(folder)
    for name in changed:
        _pending(folder / name).replace(folder / name)


def finish_or_discard(folder: Path) -> None:
    """Finishes a killed run's committed save, and removes the files of an uncommitted one.

    Only the process that holds the folder's lock may call it: it would remove another's work as a dead one's.
    """
    records = _all_records(folder, read_manifest(folder, "checkpoint", FORMAT_VERSION))
    for name, actual in _where(folder, records).items():
        if actual != name:
            (folder / actual).replace(folder / name)
        _pending(folder / name).unlink(missing_ok=True)
    for name in (names.MANIFEST, LOSS_CURVE):
        remove_leftovers(folder / name)
    shutil.rmtree(folder / _SAVING, ignore_errors=True)


def _decoder_files(model: Decoder, weights: Mapping[str, Tensor] | None) -> dict[str, bytes | Path]:
    config = (json.dumps(model.config.to_json(), indent=2) + "\n").encode()
    return {names.CONFIG: config, names.WEIGHTS: _weights(model, model.state_dict() if weights is None else weights)}


def _files_of(model: Pretrained, folder: Path) -> dict[str, bytes | Path]:
    """Returns the files that a model of another layout has written into this folder, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save(folder)
    return {path.name: path for path in sorted(folder.iterdir())}


def _record(content: bytes | Path) -> FileRecord:
    if isinstance(content, Path):
        return file_record(content)
    return FileRecord(len(content), sha256(content).hexdigest())


def _known_or_prepared(folder: Path) -> dict[str, FileRecord]:
    """Returns the records of the files that no save changes: those of the tokenizer and of the tokens.

    Before the first save they are all files of the folder; afterwards they are not hashed again.
    """
    known = _known_records(folder)
    if known:
        return known
    prepared = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != _PENDING)
    files = (path.relative_to(folder).as_posix() for path in prepared)
    return {name: file_record(folder / name) for name in files if not name.startswith((METRICS, LOSS_CURVE, _SAVING))}


def _weights(model: Decoder, weights: Mapping[str, Tensor]) -> bytes:
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # the same tensor as the embedding, stored once
    # transformers rejects a file that does not name the framework of its tensors' layout.
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def _known_records(folder: Path) -> dict[str, FileRecord]:
    """Returns the records of the previous checkpoint, so that token files are hashed once and not at every save."""
    if not (folder / names.MANIFEST).exists():
        return {}
    return _all_records(folder, read_json(folder / names.MANIFEST))


def _write_through(path: Path, content: bytes | Path) -> None:
    """Writes bytes, or moves a file, and flushes them to the disk."""
    if isinstance(content, Path):
        content.replace(path)
    with path.open("ab" if isinstance(content, Path) else "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _pending(path: Path) -> Path:
    return path.with_name(path.name + _PENDING)


# --- reading ------------------------------------------------------------------------------------------------------
def layout_of(folder: Path) -> str | None:
    """Returns TRANSFORMERS or PEFT for a fine-tuned checkpoint, None for any other folder or file."""
    if not (folder / names.MANIFEST).is_file():
        return None
    layout = read_json(folder / names.MANIFEST).get("layout")
    return layout if layout in (TRANSFORMERS, PEFT) else None


def check_files(folder: Path) -> Mapping[str, Any]:
    """Returns "training" of a checkpoint of any layout after checking the files of its model. As `load_checkpoint`."""
    manifest = read_manifest(folder, "checkpoint", FORMAT_VERSION)
    records = parse_records(folder, manifest.get("files"))
    check_sizes(folder, records)
    check_hashes(folder, records)
    return _training_of(folder, manifest)


def check_settled(folder: Path) -> Mapping[str, Any]:
    """As `check_files`, after finishing the save of a killed run. Raises InUseError while a run is saving."""
    if any(folder.rglob(f"*{_PENDING}")):  # otherwise the folder may be read-only
        with locked(folder):
            finish_or_discard(folder)
    return check_files(folder)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint after checking version, paths, sizes and hashes. The model is in eval mode.

    Does not change the folder, and may run while another process trains there: the model is from one save. Raises
    MissingFileError, InputError or IntegrityError, each naming the file.
    """
    folder = Path(path)
    manifest, config, tensors = _of_one_save(folder, lambda manifest: _model_of(folder, manifest))
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model = Decoder(config)
    model.load_state_dict(tensors)
    return Checkpoint(folder, config, model.eval(), _training_of(folder, manifest))


def _training_of(folder: Path, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    training = manifest.get("training", {})
    if not isinstance(training, dict):
        raise IntegrityError(f"{folder / names.MANIFEST} has no valid 'training': it was altered or cut short")
    return training


def _model_of(folder: Path, manifest: Mapping[str, Any]) -> Loaded:
    _all_records(folder, manifest)  # checks that no path of the other files leads out either
    actual = _check(folder, parse_records(folder, manifest.get("files")), _MODEL_FILES)
    config = ModelConfig.from_json(read_json(folder / actual[names.CONFIG]))
    return manifest, config, _load_tensors(folder / actual[names.WEIGHTS], config)


def _of_one_save(folder: Path, read: Callable[[Mapping[str, Any]], T]) -> T:
    """Returns the result of `read` for a manifest and the files that it names. Reads again if a save came in between.

    A manifest that is the same afterwards names the files that were read: a save replaces it before any of them.
    """
    manifest = read_manifest(folder, "checkpoint", FORMAT_VERSION)
    with contextlib.suppress(IntegrityError, OSError):
        found = read(manifest)
        if read_json(folder / names.MANIFEST) == manifest:
            return found
    manifest = read_manifest(folder, "checkpoint", FORMAT_VERSION)
    found = read(manifest)
    if read_json(folder / names.MANIFEST) != manifest:
        raise IntegrityError(f"{folder} is being saved: read it again")
    return found


def load_optimizer(path: Path, training: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the optimizer's moments by parameter name, after checking every file that only training reads.

    `training` is from `load_checkpoint`. Raises IntegrityError if a later save has replaced it.
    """

    def read(manifest: Mapping[str, Any]) -> dict[str, Tensor]:
        if manifest.get("training") != training:
            raise IntegrityError(f"{path} was saved anew since its model was read: read the model again")
        actual = _check(path, parse_records(path, training.get("files")), (STATE, TOKENS_TRAIN, TOKENS_VAL))
        return _load_tensors(path / actual[STATE])

    return _of_one_save(path, read)


def _load_tensors(file: Path, config: ModelConfig | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file: those of a decoder of `config`, if given."""
    with reading(file, "safetensors"):
        header = read_header(file)
    if config is not None:
        _require_fits(file, {name: tensor.shape for name, tensor in header.items()}, config)
    require_memory_for(file, file.stat().st_size + 4 * sum(tensor.elements for tensor in header.values()))
    with reading(file, "safetensors"):
        tensors: dict[str, Tensor] = safetensors.torch.load_file(file)
    return tensors


def _require_fits(file: Path, found: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Raises IntegrityError unless these are the shapes of a decoder's parameters. Makes it without memory."""
    expected: dict[str, tuple[int, ...]] = {}
    with contextlib.suppress(RuntimeError), torch.device("meta"):  # such as sizes whose product overflows
        expected = {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise IntegrityError(
                f"{file} does not fit {file.parent / names.CONFIG}: {name} has the shape {found.get(name)} in the "
                f"first, and {expected.get(name)} by the second; copy both again"
            )


def _check(folder: Path, records: Mapping[str, FileRecord], needed: Iterable[str]) -> dict[str, str]:
    """Checks each listed file, and returns where its content is: NAME, or NAME.new."""
    for name in needed:
        if name not in records:
            raise IntegrityError(f"{folder / names.MANIFEST} does not list {name}: it was altered or cut short")
    actual = _where(folder, records)
    found = {actual[name]: record for name, record in records.items()}
    check_sizes(folder, found)
    check_hashes(folder, found)
    return actual


def _all_records(folder: Path, manifest: Mapping[str, Any]) -> dict[str, FileRecord]:
    training = manifest.get("training")
    training_files = training.get("files", {}) if isinstance(training, dict) else {}
    return parse_records(folder, manifest.get("files")) | parse_records(folder, training_files)


def _where(folder: Path, records: Mapping[str, FileRecord]) -> dict[str, str]:
    """Returns for each listed file its own name, or NAME.new if that has the listed content."""
    actual = {}
    for name, record in records.items():
        pending = _pending(folder / name)
        actual[name] = name
        with contextlib.suppress(FileNotFoundError):  # it does not exist, or the training process just renamed it
            if pending.stat().st_size == record.size and file_sha256(pending) == record.sha256:
                actual[name] = name + _PENDING
    return actual
