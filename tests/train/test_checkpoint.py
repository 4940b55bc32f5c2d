"""A checkpoint is whole at every moment, and a reader names what is not."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pastkey.contract import names
from pastkey.contract.config import ModelConfig
from pastkey.errors import IntegrityError
from pastkey.files.folder import file_record
from pastkey.train import checkpoint as module
from pastkey.train.checkpoint import STATE, finish_or_discard, load_checkpoint, load_optimizer, save_checkpoint
from pastkey.train.model import Decoder

from ..shared import ROOT
from .helpers import bare_checkpoint, no_state


def decoder(seed: int, **changes: Any) -> Decoder:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    return Decoder(ModelConfig(**(sizes | heads | changes)))


def weights(model: Decoder) -> float:
    return sum(tensor.double().sum().item() for tensor in model.state_dict().values())


@pytest.fixture
def saved(tmp_path):
    folder = bare_checkpoint(tmp_path / "checkpoint")
    save_checkpoint(folder, decoder(1), no_state(5, val_loss=1.5))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "bias": True, "qkv_bias": True, "qk_norm": True, "num_hidden_layers": 3},
        {"position_encoding": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True},
        {"position_encoding": "sinusoidal", "norm": "none", "mlp": "none", "intermediate_size": 0},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "norm": "layernorm"},
    ],
)
def test_a_configuration_knows_how_many_weights_a_decoder_has(changes):
    model = decoder(0, **changes)
    assert model.config.weights == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 1000}, "it holds 672 weights, and the configuration is of"),
        ({"vocab_size": 2**31 - 1}, "and the configuration is of"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers is 1000000000000000000000000000000; it must be a number"),
    ],
)
def test_sizes_without_weights_are_refused_before_a_layer_is_made(changes, words, saved, monkeypatch):
    config = saved / names.CONFIG
    content = json.loads(config.read_text()) | changes
    config.write_text(json.dumps(content))
    manifest = json.loads((saved / names.MANIFEST).read_text())
    manifest["files"][names.CONFIG] = dataclasses.asdict(file_record(config))
    (saved / names.MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setattr(module, "Decoder", None)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(saved)


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
    assert not list(folder.rglob("*.new"))


def test_nothing_is_pickled(saved):
    files = [file for file in saved.rglob("*") if file.is_file()]
    assert files
    for file in files:
        assert not file.read_bytes().startswith((b"\x80", b"PK")), file  # pickle, torch.save


def test_the_model_loads_without_the_training_state(saved):
    shutil.rmtree(saved / "training")
    checkpoint = load_checkpoint(saved)
    with pytest.raises(IntegrityError, match=r"training/.* is missing"):
        load_optimizer(saved, checkpoint.training)


@pytest.mark.parametrize("name", [names.CONFIG, names.WEIGHTS, names.TOKENIZER, names.TOKENIZER_CONFIG])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_file_is_named(saved, name, damage):
    file = saved / name
    content = bytearray(file.read_bytes())
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "altered":
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(IntegrityError, match=rf"{name} .*{damage if damage != 'altered' else 'was altered'}"):
        load_checkpoint(saved)


def test_a_newer_version_asks_for_an_upgrade(saved):
    manifest = json.loads((saved / names.MANIFEST).read_text())
    (saved / names.MANIFEST).write_text(json.dumps(manifest | {"format_version": 3}))
    with pytest.raises(IntegrityError, match="upgrade pastkey"):
        load_checkpoint(saved)


def test_a_manifest_cannot_list_files_outside(saved):
    manifest = json.loads((saved / names.MANIFEST).read_text())
    manifest["training"]["files"]["../elsewhere"] = {"size": 1, "sha256": "0"}
    (saved / names.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="not a path inside"):
        load_checkpoint(saved)


def test_weights_that_do_not_fit_the_configuration_are_named(saved, tmp_path):
    folder = bare_checkpoint(tmp_path / "other")
    save_checkpoint(folder, decoder(1, hidden_size=10), no_state())
    manifest = json.loads((saved / names.MANIFEST).read_text())
    manifest["files"][names.CONFIG] = json.loads((folder / names.MANIFEST).read_text())["files"][names.CONFIG]
    shutil.copy(folder / names.CONFIG, saved / names.CONFIG)
    (saved / names.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=r"model\.safetensors does not fit"):
        load_checkpoint(saved)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may clean up after it."""


def operations(monkeypatch: pytest.MonkeyPatch, limit: int) -> Iterator[None]:
    """Makes the process "die" before its `limit`-th change of the disk."""
    done = 0

    def counted(original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done > limit:
                raise Killed
            return original(*arguments, **options)

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    yield
    monkeypatch.undo()


@pytest.mark.parametrize("limit", range(14))
def test_a_save_cut_short_at_any_operation_leaves_the_old_or_the_new(saved, limit, monkeypatch):
    old, new = decoder(1), decoder(2)
    dying = operations(monkeypatch, limit)
    next(dying)
    killed = False
    try:
        save_checkpoint(saved, new, no_state(6))
    except Killed:
        killed = True
    next(dying, None)
    # Three fsyncs, those of two folders, the manifest's fsync and rename, a folder's fsync, three renames.
    assert killed == (limit < 11)
    before = {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()}
    checkpoint = load_checkpoint(saved)
    step = checkpoint.training["step"]
    assert step == (5 if limit < 7 else 6)
    assert weights(checkpoint.model) == weights(old if step == 5 else new)
    load_optimizer(saved, checkpoint.training)
    assert {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()} == before  # readers change nothing
    finish_or_discard(saved)
    assert load_checkpoint(saved).training["step"] == step
    assert not list(saved.rglob("*.new"))
    save_checkpoint(saved, decoder(3), no_state(7))
    assert weights(load_checkpoint(saved).model) == weights(decoder(3))


def test_a_reader_leaves_a_save_in_progress_alone(saved):
    pending = saved / (STATE + ".new")
    pending.write_bytes(b"half of the next")
    load_checkpoint(saved)
    assert pending.exists()
    finish_or_discard(saved)
    assert not pending.exists()


def cut_short(saved: Path, model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves `model` as step 6 by a process that dies before its first rename."""
    dying = operations(monkeypatch, 8)
    next(dying)
    with pytest.raises(Killed):
        save_checkpoint(saved, model, no_state(6))
    next(dying, None)


def test_a_reader_between_two_saves_cannot_put_half_of_the_next_in_the_place_of_a_good_file(saved, monkeypatch):
    """The reader sees NAME.new whole, and by the time that it reads it, the next save has begun to write it."""
    cut_short(saved, decoder(2), monkeypatch)
    checked = module._check

    def late(folder: Path, *arguments: Any) -> dict[str, str]:
        found = checked(folder, *arguments)
        monkeypatch.setattr(module, "_check", checked)
        finish_or_discard(folder)  # as the training process does, which then goes on
        (folder / (names.WEIGHTS + ".new")).write_bytes(b"half of the next")
        return found

    monkeypatch.setattr(module, "_check", late)
    checkpoint = load_checkpoint(saved)
    assert checkpoint.training["step"] == 6
    assert weights(checkpoint.model) == weights(decoder(2))
    assert (saved / (names.WEIGHTS + ".new")).read_bytes() == b"half of the next"
    assert weights(load_checkpoint(saved).model) == weights(decoder(2))


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


def test_one_that_is_saved_each_time_it_is_read_is_a_sentence(saved, monkeypatch):
    loaded, step = module.safetensors.torch.load_file, iter(range(6, 1000))

    def saving(path: Path) -> Any:
        tensors = loaded(path)
        save_checkpoint(saved, decoder(2), no_state(next(step)))
        return tensors

    monkeypatch.setattr(module.safetensors.torch, "load_file", saving)
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.2)
    with pytest.raises(IntegrityError, match="was saved anew each time that it was read"):
        load_checkpoint(saved)


SAVE = """
import sys
from pathlib import Path
from tests.train.helpers import no_state
from tests.train.test_checkpoint import decoder
from pastkey.train.checkpoint import save_checkpoint
models = [decoder(seed) for seed in (0, 1, 2)]
print("ready", flush=True)
for step in range(6, 100_000):
    save_checkpoint(Path(sys.argv[1]), models[step % 3], no_state(step))
"""


@pytest.mark.slow
def test_every_read_beside_a_process_that_saves_all_the_time_is_of_one_save(saved):
    sums = [weights(decoder(seed)) for seed in (0, 1, 2)]
    process = subprocess.Popen([sys.executable, "-c", SAVE, str(saved)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            steps = []
            for _ in range(60):
                checkpoint = load_checkpoint(saved)
                steps.append(checkpoint.training["step"])
                assert weights(checkpoint.model) == sums[steps[-1] % 3] or steps[-1] == 5
        finally:
            process.kill()
    assert steps == sorted(steps)
    assert len(set(steps)) > 10
    load_checkpoint(saved)


def test_a_save_cut_short_is_read_on_a_disk_that_takes_no_writing(saved, monkeypatch):
    cut_short(saved, decoder(2), monkeypatch)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("replace", "rename", "unlink", "write_bytes", "mkdir"):
        monkeypatch.setattr(Path, name, refused)
    checkpoint = load_checkpoint(saved)
    assert weights(checkpoint.model) == weights(decoder(2))
    load_optimizer(saved, checkpoint.training)


@pytest.mark.parametrize("committed", [False, True])
def test_an_interrupt_after_the_manifest_keeps_what_it_lists(committed, saved, monkeypatch):
    written = module.write_json

    def interrupted(path: Path, content: Any) -> None:
        if committed:
            written(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, decoder(2), no_state(6))
    monkeypatch.undo()
    assert weights(load_checkpoint(saved).model) == weights(decoder(2 if committed else 1))
    assert bool(list(saved.rglob("*.new"))) == committed
    finish_or_discard(saved)
    assert weights(load_checkpoint(saved).model) == weights(decoder(2 if committed else 1))


def test_a_full_disk_keeps_the_checkpoint_and_leaves_nothing(saved, monkeypatch):
    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:100])
        if path.name.startswith("state"):
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(module, "_write_through", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(saved, decoder(2), no_state(6))
    assert not list(saved.rglob("*.new"))
    assert weights(load_checkpoint(saved).model) == weights(decoder(1))
