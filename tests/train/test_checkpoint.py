"""A checkpoint is whole at every moment, and a reader names what is not."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pastkey.contract import names
from pastkey.contract.config import ModelConfig
from pastkey.errors import InputError, IntegrityError, InUseError, MissingFileError, PastkeyError
from pastkey.files.durable import locked
from pastkey.files.folder import file_records
from pastkey.train import checkpoint as module
from pastkey.train.checkpoint import STATE, TOKENS_VAL, check_settled, load_checkpoint, load_optimizer, save_checkpoint
from pastkey.train.model import Decoder

from ..crash import Killed, at_every_operation
from .helpers import bare_checkpoint, files, no_state

SIZES: dict[str, Any] = {
    "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def decoder(seed: int, **changes: Any) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(ModelConfig(**(SIZES | changes)))


def weights(model: torch.nn.Module) -> float:
    return sum(tensor.double().sum().item() for tensor in model.state_dict().values())


@pytest.fixture
def saved(tmp_path):
    folder = bare_checkpoint(tmp_path / "checkpoint")
    save_checkpoint(folder, decoder(1), no_state(5, val_loss=1.5))
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_what_was_saved_is_loaded(tied, tmp_path):
    model = decoder(3, tie_word_embeddings=tied)
    folder = bare_checkpoint(tmp_path / "c")
    save_checkpoint(folder, model, no_state(7))
    loaded = load_checkpoint(str(folder))
    assert loaded.config == model.config
    assert loaded.training["step"] == 7
    assert loaded.tokenizer_path == folder / "tokenizer.json"
    assert not loaded.model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.model.parameters(), strict=True))
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == tied
    with safe_open(folder / names.WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118 (not a dict)


# --- what is refused ----------------------------------------------------------------------------------------------
def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the manifest."""

    def spoil(folder: Path) -> None:
        manifest = json.loads((folder / names.MANIFEST).read_text())
        change(manifest)
        (folder / names.MANIFEST).write_text(json.dumps(manifest))

    return spoil


def listed(name: str, content: bytes) -> Callable[[Path], None]:
    """Replaces a file by another, as the manifest states."""

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content)
        rewritten(lambda manifest: manifest["files"].update(file_records(folder, [name])))(folder)

    return spoil


def configured(**changes: Any) -> Callable[[Path], None]:
    config = ModelConfig(**SIZES).to_json() | changes
    return listed(names.CONFIG, json.dumps(config).encode())


REFUSED: dict[str, tuple[Callable[[Path], object], type[PastkeyError], str]] = {
    "removed": (lambda f: (f / names.CONFIG).unlink(), IntegrityError, "config.json is missing"),
    "altered": (lambda f: (f / names.TOKENIZER).write_text("[]"), IntegrityError, "tokenizer.json was altered"),
    "no folder": (shutil.rmtree, MissingFileError, "no such checkpoint"),
    "a newer version": (rewritten(lambda m: m.update(format_version=3)), IntegrityError, "upgrade pastkey"),
    "a bundle": (rewritten(lambda m: m.update(kind="bundle")), InputError, "name the checkpoint it came from"),
    "no training": (rewritten(lambda m: m.update(training=3)), IntegrityError, "no valid 'training'"),
    "a file that is not listed": (
        rewritten(lambda m: m["files"].pop(names.WEIGHTS)), IntegrityError, "does not list model.safetensors",
    ),
    "a file outside": (
        rewritten(lambda m: m["training"]["files"].update({"../x": {}})), IntegrityError, "not a path inside",
    ),
    "other sizes": (configured(vocab_size=17), IntegrityError, "and (17, 8) by the second"),
    "more layers": (configured(num_hidden_layers=9), IntegrityError, "norm.weight has the shape None in the first"),
    "sizes that overflow": (
        configured(vocab_size=2**31 - 1, hidden_size=2**31 - 1), IntegrityError, "model.safetensors does not fit",
    ),
    "impossible layers": (configured(num_hidden_layers=10**30), InputError, "num_hidden_layers is 10000"),
    "a cut header": (listed(names.WEIGHTS, b"1" * 20), IntegrityError, "cannot be read as safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("spoilt", REFUSED)
def test_a_spoilt_checkpoint_is_refused_before_a_layer_is_made(spoilt, saved, monkeypatch):
    spoil, error, word = REFUSED[spoilt]
    spoil(saved)
    made = module.Decoder

    def nowhere(config: ModelConfig) -> Decoder:
        assert torch.empty(0).device.type == "meta"
        return made(config)

    if spoilt != "no training":
        monkeypatch.setattr(module, "Decoder", nowhere)
    with pytest.raises(error, match=re.escape(word)):
        load_checkpoint(saved)


def test_the_model_loads_without_the_training_state_which_training_asks_for(saved):
    training = load_checkpoint(saved).training
    (saved / TOKENS_VAL).unlink()
    assert load_checkpoint(saved).training == training
    with pytest.raises(IntegrityError, match=r"tokens-val\.bin is missing"):
        load_optimizer(saved, training)
    rewritten(lambda manifest: manifest["training"]["files"].pop(STATE))(saved)
    with pytest.raises(IntegrityError, match=r"does not list training/state"):
        load_optimizer(saved, load_checkpoint(saved).training)


# --- ended at any operation ---------------------------------------------------------------------------------------
@dataclasses.dataclass
class Adapter:
    """A model with another layout."""

    seed: int
    layout: str = module.PEFT

    def save(self, folder: Path) -> None:
        for name in (names.ADAPTER_CONFIG, names.ADAPTER_WEIGHTS):
            (folder / name).write_text(f"{name} of {self.seed}")


def read(folder: Path) -> tuple[int, object]:
    """The step of a checkpoint, and something of the model of that step."""
    if module.layout_of(folder) is None:
        checkpoint = load_checkpoint(folder)
        load_optimizer(folder, checkpoint.training)
        return checkpoint.training["step"], weights(checkpoint.model)
    step = check_settled(folder)["step"]
    return step, [(folder / name).read_text() for name in (names.ADAPTER_CONFIG, names.ADAPTER_WEIGHTS)]


# Three files and their folders, the manifest, its folder, and the renames of the three; a layout's folder before that.
DECODER = [*5 * ["fsync"], "open", "fsync", "replace", "fsync", *3 * ["replace"]]
ADAPTER = ["mkdir", *2 * ["replace", "fsync"], *DECODER[2:], "rmdir"]


@pytest.mark.parametrize("error", [Killed(), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")], ids=repr)
@pytest.mark.parametrize(("model", "operations"), [(decoder, DECODER), (Adapter, ADAPTER)])
def test_a_save_that_ends_at_any_operation_leaves_the_old_or_the_new(model, operations, error, tmp_path):
    expected = {}
    for step in (5, 6):
        whole = bare_checkpoint(tmp_path / f"whole {step}")
        save_checkpoint(whole, model(step), no_state(step))
        expected[step] = read(whole)
    make = functools.partial(shutil.copytree, tmp_path / "whole 5", dirs_exist_ok=True)
    save = functools.partial(save_checkpoint, model=model(6), state=no_state(6))
    ends, steps = [*at_every_operation(tmp_path, make, save, error)], []
    assert ends[-1][1] == operations
    for folder, _ in ends:
        before = files(folder)
        step, found = read(folder)
        steps.append(step)
        assert (step, found) == expected[step]
        if model is decoder:  # whose readers change nothing
            assert files(folder) == before
        assert not isinstance(error, OSError) or step == 6 or not [file for file in before if file.suffix == ".new"]
        module.finish_or_discard(folder)
        assert not list(folder.rglob("*.new"))
        assert read(folder) == (step, found)
    assert steps == sorted(steps)
    assert {*steps} == {5, 6}
    save_checkpoint(folder, model(7), no_state(7))
    assert read(folder)[0] == 7


def test_a_running_process_is_not_taken_for_a_dead_one(saved):
    pending = saved / (STATE + ".new")
    pending.write_bytes(b"half of the next")
    with locked(saved), pytest.raises(InUseError):
        check_settled(saved)
    assert pending.exists()
    assert check_settled(saved)["step"] == 5
    assert not pending.exists()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_save_while_a_reader_reads_gives_the_model_of_one_save(moment, saved, monkeypatch):
    loaded = module.safetensors.torch.load_file

    def saving(path: Path) -> Any:
        monkeypatch.setattr(module.safetensors.torch, "load_file", loaded)
        if moment == "after":
            tensors = loaded(path)
        save_checkpoint(saved, decoder(2), no_state(6))
        return tensors if moment == "after" else loaded(path)

    monkeypatch.setattr(module.safetensors.torch, "load_file", saving)
    checkpoint = load_checkpoint(saved)
    assert (checkpoint.training["step"], weights(checkpoint.model)) == (6, weights(decoder(2)))
    training = checkpoint.training
    save_checkpoint(saved, decoder(3), no_state(7))
    with pytest.raises(IntegrityError, match="was saved anew since its model was read"):
        load_optimizer(saved, training)
