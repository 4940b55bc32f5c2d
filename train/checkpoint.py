"""A checkpoint folder: how it is written so that a kill at any moment leaves a whole one, and how it is read.

    checkpoint/  pastkey.json           the manifest: size and sha256 of every file, how far training came
                 config.json  model.safetensors  tokenizer.json  tokenizer_config.json
                 training/state.safetensors          the optimizer's moments
                 training/tokens-train.bin, tokens-val.bin

A save writes each file that changes as NAME.new, then replaces pastkey.json, which is the one moment that counts, then
renames every NAME.new to NAME. Whoever opens the folder in between finds the listed content under NAME.new and does
the renaming that is left; a NAME.new that the manifest does not list is the rest of a save that never happened.
No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

import pastkey
from pastkey import names
from pastkey.config import ModelConfig
from pastkey.errors import IntegrityError
from pastkey.folder import (
    FileRecord,
    check_hashes,
    check_sizes,
    file_record,
    parse_records,
    read_json,
    read_manifest,
    write_json,
)
from pastkey.folder import sha256 as file_sha256

from .model import Decoder

FORMAT_VERSION = 1
STATE = "training/state.safetensors"
TOKENS_TRAIN = "training/tokens-train.bin"
TOKENS_VAL = "training/tokens-val.bin"
METRICS = "metrics.jsonl"
LOSS_CURVE = "loss.png"

_MODEL_FILES = (names.CONFIG, names.WEIGHTS, names.TOKENIZER, names.TOKENIZER_CONFIG)
_PENDING = ".new"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds, verified."""

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
    """What training needs, beside the weights, to go on as if it had never stopped."""

    step: int  # optimizer steps done
    optimizer: Mapping[str, Tensor]  # the moments, by parameter name
    settings: Mapping[str, Any]  # TrainConfig
    data: Mapping[str, Any]  # fingerprint and counts of the corpus
    figures: Mapping[str, Any]  # losses at this step


# --- writing ------------------------------------------------------------------------------------------------------
def save_checkpoint(folder: Path, model: Decoder, state: TrainingState) -> None:
    """Makes `folder` hold this model and state, in one step. The tokenizer and token files must be there already.

    An error, a full disk for one, leaves the folder's earlier checkpoint as it was.
    """
    changed = {
        names.CONFIG: (json.dumps(model.config.to_json(), indent=2) + "\n").encode(),
        names.WEIGHTS: _weights(model),
        # An empty safetensors file is not valid, and at step 0 there are no moments yet.
        STATE: safetensors.torch.save(dict(state.optimizer) or {"none": next(model.parameters()).new_zeros(1)}),
    }
    unchanged = (names.TOKENIZER, names.TOKENIZER_CONFIG, TOKENS_TRAIN, TOKENS_VAL)
    known = _known_records(folder)
    records = {name: known.get(name) or file_record(folder / name) for name in unchanged}
    records |= {name: FileRecord(len(content), sha256(content).hexdigest()) for name, content in changed.items()}
    manifest = {
        "kind": "checkpoint",
        "format_version": FORMAT_VERSION,
        "pastkey_version": pastkey.__version__,
        "files": {name: asdict(records[name]) for name in _MODEL_FILES},
        "training": {
            "step": state.step,
            "settings": dict(state.settings),
            "data": dict(state.data),
            "figures": dict(state.figures),
            "files": {name: asdict(records[name]) for name in (STATE, TOKENS_TRAIN, TOKENS_VAL)},
        },
    }
    try:
        for name, content in changed.items():
            _write_through(_pending(folder / name), content)
        write_json(folder / names.MANIFEST, manifest)
    except BaseException:
        for name in changed:
            _pending(folder / name).unlink(missing_ok=True)
        raise
    _sync_folder(folder)
    _roll_forward(folder, changed)


def discard_unfinished(folder: Path) -> None:
    """Removes what a killed save left behind. Only for the process that trains: it may delete another's work."""
    manifest = read_manifest(folder, "checkpoint", FORMAT_VERSION)
    records = _all_records(folder, manifest)
    _finish_save(folder, records)
    for name in (*records, names.MANIFEST):
        _pending(folder / name).unlink(missing_ok=True)


def _weights(model: Decoder) -> bytes:
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # the same tensor as the embedding, stored once
    # transformers refuses a file that does not say which framework's layout its tensors have.
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def _known_records(folder: Path) -> dict[str, FileRecord]:
    """The records of the checkpoint before this one, so that token files are hashed once and not at every save."""
    if not (folder / names.MANIFEST).exists():
        return {}
    return _all_records(folder, read_json(folder / names.MANIFEST))


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _pending(path: Path) -> Path:
    return path.with_name(path.name + _PENDING)


def _roll_forward(folder: Path, listed: Iterable[str]) -> None:
    for name in listed:
        with contextlib.suppress(FileNotFoundError):  # a reader was faster
            _pending(folder / name).replace(folder / name)


def _sync_folder(folder: Path) -> None:
    """Puts renames on the disk itself. Not every system can open a folder; there a power cut may cost one save."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- reading ------------------------------------------------------------------------------------------------------
def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint after checking version, paths, sizes and hashes. The model comes in eval mode.

    Raises MissingFileError, InputError or IntegrityError, each naming the file.
    """
    folder = Path(path)
    manifest = read_manifest(folder, "checkpoint", FORMAT_VERSION)
    _finish_save(folder, _all_records(folder, manifest))
    records = parse_records(folder, manifest.get("files"))
    _check(folder, records, _MODEL_FILES)
    config = ModelConfig.from_json(read_json(folder / names.CONFIG))
    tensors = safetensors.torch.load_file(folder / names.WEIGHTS)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model = Decoder(config)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise IntegrityError(f"{folder / names.WEIGHTS} does not fit {folder / names.CONFIG}: {reason}") from None
    return Checkpoint(folder, config, model.eval(), manifest.get("training", {}))


def load_optimizer(path: Path, training: Mapping[str, Any]) -> dict[str, Tensor]:
    """The optimizer's moments by parameter name, after checking every file that only training reads."""
    records = parse_records(path, training.get("files"))
    _check(path, records, (STATE, TOKENS_TRAIN, TOKENS_VAL))
    return safetensors.torch.load_file(path / STATE)


def _check(folder: Path, records: Mapping[str, FileRecord], needed: Iterable[str]) -> None:
    for name in needed:
        if name not in records:
            raise IntegrityError(f"{folder / names.MANIFEST} does not list {name}: it was altered or cut short")
    check_sizes(folder, records)
    check_hashes(folder, records)


def _all_records(folder: Path, manifest: Mapping[str, Any]) -> dict[str, FileRecord]:
    training = manifest.get("training")
    training_files = training.get("files", {}) if isinstance(training, dict) else {}
    return parse_records(folder, manifest.get("files")) | parse_records(folder, training_files)


def _finish_save(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Renames each NAME.new that holds what the manifest lists: its save was committed, then cut short."""
    for name, record in records.items():
        pending = _pending(folder / name)
        with contextlib.suppress(FileNotFoundError):  # none, or the training process just renamed it
            if pending.stat().st_size == record.size and file_sha256(pending) == record.sha256:
                pending.replace(folder / name)
