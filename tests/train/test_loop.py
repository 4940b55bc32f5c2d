"""A run learns, is the same every time, and goes on after any interruption as if there had been none."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pastkey.errors import (
    ExistingFolderError,
    InputError,
    IntegrityError,
    MissingFileError,
    NumericsError,
)
from pastkey.train import loop
from pastkey.train.checkpoint import load_checkpoint, load_optimizer
from pastkey.train.data.prepare import LESSON_PROMPTS
from pastkey.train.data.token_files import DataInfo, SourceTokens
from pastkey.train.loss import next_token_loss
from pastkey.train.model import generate, positions_like
from pastkey.train.report import read_metrics
from pastkey.train.settings import TrainConfig
from pastkey.train.tokenizer import read_tokenizer

from .helpers import command, tiny, write_corpus


def losses(folder: Path) -> list[Any]:
    """Everything of the metrics that is the same for the same run."""
    return [tuple(row.items()) for row in read_metrics(folder)]


def same_weights(one: Path, two: Path) -> bool:
    a, b = load_checkpoint(one), load_checkpoint(two)
    moments = (load_optimizer(one, a.training), load_optimizer(two, b.training))
    return all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True)) and all(
        torch.equal(moments[0][name], moments[1][name]) for name in moments[0]
    )


# --- learning -----------------------------------------------------------------------------------------------------
def test_the_classic_lesson_is_learnt_with_a_clear_margin(tmp_path):
    figures = loop.train(TrainConfig.from_given({"preset": "classic"}), tmp_path / "c")
    assert figures["val_loss"] < 0.01  # every position of both sentences, prompt and answer
    checkpoint = load_checkpoint(tmp_path / "c")
    tokenizer = read_tokenizer(checkpoint.tokenizer_path)
    for prompt in LESSON_PROMPTS:
        ids = tokenizer.prompt(prompt)
        (answer,) = generate(checkpoint.model, torch.tensor([ids]), 4)
        assert tokenizer.decode(answer) == "awesome"
        whole = torch.tensor([[*ids, *answer]])
        with torch.no_grad():
            best = checkpoint.model(whole, positions_like(whole))[0, len(ids) - 1 :].topk(2).values
        assert ((best[:, 0] - best[:, 1]) > 5).all(), best  # int8 must not be able to turn the answer


def test_a_run_learns_and_reports(text, tmp_path):
    figures = loop.train(tiny(steps=150, save_every=75, learning_rate=0.01), tmp_path / "c", data=[text])
    first, last = (row["loss"] for row in (read_metrics(tmp_path / "c")[0], read_metrics(tmp_path / "c")[-2]))
    assert last < 0.6 * first
    assert figures["step"] == 150
    assert figures["val_loss"] < 0.6 * first
    # Characters of ASCII text are bytes: nats per token over ln 2, but for the EOS token that no byte pays for.
    assert figures["bits_per_byte"] == pytest.approx(figures["val_loss"] / math.log(2), rel=0.02)
    assert (tmp_path / "c" / "loss.png").read_bytes().startswith(b"\x89PNG")
    validations = [row for row in read_metrics(tmp_path / "c") if "val_loss" in row]
    assert [row["step"] for row in validations] == [75, 150]
    assert json.loads((tmp_path / "c" / "pastkey.json").read_text())["training"]["step"] == 150


@pytest.mark.parametrize(
    ("preset", "kind"), [("gpt2", "bpe"), ("llama", "word"), ("qwen2", "bpe"), ("qwen3", "bpe"), ("classic", "word")]
)
def test_every_preset_trains_on_text(preset, kind, text, tmp_path):
    config = tiny(preset=preset, tokenizer=kind, vocab_size=261, steps=2, context=8)
    loop.train(config, tmp_path / "c", data=[text])
    assert load_checkpoint(tmp_path / "c").config.max_position_embeddings == 8


def test_accumulated_batches_are_one_large_batch(text, tmp_path):
    loop.train(tiny(steps=1, batch_size=4, accumulate=3, save_every=1), tmp_path / "c", data=[text])
    row = read_metrics(tmp_path / "c")[0]
    training = load_checkpoint(tmp_path / "c").training
    config, info = TrainConfig(**training["settings"]), loop.DataInfo(**training["data"])
    shape = load_checkpoint(tmp_path / "c").config
    torch.manual_seed(config.seed)
    model = loop.Decoder(shape)
    tokens = loop.Tokens(tmp_path / "c" / loop.TOKENS_TRAIN, info, 32)
    batches = [tokens.draw(4, config.seed, part) for part in range(3)]
    loss = next_token_loss(model, (torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])))
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-4)


# --- interruption -------------------------------------------------------------------------------------------------
def test_the_same_seed_gives_the_same_run(text, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        loop.train(tiny(seed=seed), tmp_path / name, data=[text])
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_gradient_checkpointing_gives_the_same_run(text, tmp_path):
    for name, option in (("plain", False), ("less", True)):
        loop.train(tiny(steps=4, layers=2, gradient_checkpointing=option), tmp_path / name, data=[text])
    assert losses(tmp_path / "plain") == losses(tmp_path / "less")


class Stop(BaseException):
    pass


@pytest.mark.parametrize("stop_at", [4, 5, 7, 11])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(stop_at, text, tmp_path, monkeypatch):
    loop.train(tiny(), tmp_path / "whole", data=[text])
    original = loop.Run._one_step

    def stopping(run: loop.Run) -> dict[str, Any]:
        if run.step == stop_at:
            raise Stop
        return original(run)

    monkeypatch.setattr(loop.Run, "_one_step", stopping)
    with pytest.raises(Stop):
        loop.train(tiny(), tmp_path / "resumed", data=[text])
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "resumed").training["step"] == stop_at // 4 * 4
    loop.resume(tmp_path / "resumed", {})
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    assert same_weights(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_at_random_moments_goes_on_to_the_same_end(text, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, text), check=True, capture_output=True)
    rng = random.Random(1)
    kills = 0
    for _ in range(8):
        resuming = ["--resume"] if killed.exists() else []
        process = subprocess.Popen(
            [*command(killed, text), *resuming], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while not [*tmp_path.glob("*killed*/metrics.jsonl")] and process.poll() is None:
            time.sleep(0.01)
        if resuming:
            time.sleep(2.0)  # the start of Python and torch, where nothing is written
        time.sleep(rng.uniform(0, 1.0))
        if process.poll() is not None:
            # or it was killed after its last save, and there is nothing to go on with
            said = process.communicate()[1]
            assert process.returncode == 0 or "trained already, to step 24 of 24" in said
            break
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        if killed.exists():
            load_checkpoint(killed)
    else:
        resuming = ["--resume"] if killed.exists() else []  # a busy machine may have saved nothing yet
        done = subprocess.run([*command(killed, text), *resuming], capture_output=True, text=True)
        assert done.returncode == 0 or "trained already, to step 24 of 24" in done.stderr
    assert kills > 0
    assert losses(killed) == losses(whole)
    assert same_weights(killed, whole)


# --- what is refused ----------------------------------------------------------------------------------------------
def test_settings_of_a_run_cannot_change_when_it_is_resumed(text, tmp_path):
    out = tmp_path / "c"
    loop.train(tiny(steps=8), out, data=[text])
    with pytest.raises(InputError, match="started with preset llama, not gpt2"):
        loop.resume(out, {"preset": "gpt2", "steps": 12})
    with pytest.raises(InputError, match="started with batch_size 4, not 5"):
        loop.resume(out, {"batch_size": 5, "steps": 12})
    with pytest.raises(InputError, match=r"started on other text \(text\.txt\)"):
        loop.resume(out, {"steps": 12}, data=[write_corpus(tmp_path / "other.txt", 70)])
    with pytest.raises(InputError, match="trained already, to step 8 of 8"):
        loop.resume(out, {})
    assert loop.resume(out, {"steps": 12, "batch_size": 4, "threads": 1}, data=[text])["step"] == 12


def test_there_must_be_something_to_resume(text, tmp_path):
    with pytest.raises(MissingFileError, match="nothing to resume"):
        loop.resume(tmp_path / "none", {})
    loop.train(tiny(steps=4), tmp_path / "c", data=[text])
    (tmp_path / "c" / loop.TOKENS_VAL).write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"tokens-val\.bin"):
        loop.resume(tmp_path / "c", {"steps": 8})


def test_a_folder_that_exists_is_kept_unless_forced(text, tmp_path):
    out = tmp_path / "c"
    loop.train(tiny(steps=4), out, data=[text])
    with pytest.raises(ExistingFolderError, match="already exists"):
        loop.train(tiny(steps=4, seed=1), out, data=[text])
    with pytest.raises(MissingFileError):  # bad input does not cost the old checkpoint
        loop.train(tiny(steps=4, seed=1), out, data=[tmp_path / "none"], force=True)
    assert load_checkpoint(out).training["settings"]["seed"] == 0
    loop.train(tiny(steps=4, seed=1), out, data=[text], force=True)
    assert load_checkpoint(out).training["settings"]["seed"] == 1


def test_the_classic_lesson_refuses_settings_that_it_cannot_be_learnt_with(tmp_path):
    for settings, reason in (({"tokenizer": "bpe"}, "by words"), ({"context": 3}, "too short for the classic lesson")):
        with pytest.raises(InputError, match=reason):
            loop.train(TrainConfig.from_given({"preset": "classic", **settings}), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_a_number_ends_the_run_with_a_sentence(text, tmp_path):
    with pytest.raises(NumericsError, match=r"training broke at step \d+.*smaller --learning-rate"):
        loop.train(tiny(steps=60, learning_rate=1e30, warmup_steps=0, save_every=60), tmp_path / "c", data=[text])
    assert list(tmp_path.iterdir()) == [text]


def test_a_loss_that_rises_ends_the_run_and_keeps_the_last_good_checkpoint(text, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "schedule", lambda config, step: 1.0 if step < 100 else 300.0)
    with pytest.raises(
        NumericsError, match=r"diverges: the mean loss .* keeps step 100, --resume .* a smaller --learn"
    ):
        loop.train(tiny(steps=300, save_every=50), tmp_path / "c", data=[text])
    assert load_checkpoint(tmp_path / "c").training["step"] == 100
    monkeypatch.setattr(loop, "schedule", lambda config, step: 300.0)
    with pytest.raises(NumericsError, match=r"the last 10 steps .* at step 110, .* keeps step 100"):
        loop.resume(tmp_path / "c", {"save_every": 10})
    monkeypatch.undo()
    figures = loop.resume(tmp_path / "c", {"learning_rate": 1e-3, "steps": 150})
    assert figures["val_loss"] < 1.5


def test_a_loss_that_rises_from_the_first_step_on_ends_the_run(text, tmp_path, monkeypatch):
    loop.train(tiny(steps=100), tmp_path / "base", data=[text])
    monkeypatch.setattr(loop, "schedule", lambda config, step: 300.0)
    given = {"init": str(tmp_path / "base"), "steps": 40, "save_every": 20, "learning_rate": 5e-3}
    with pytest.raises(NumericsError, match=r"diverges: .* at step 20, and was [01]\.\d+; nothing was saved yet"):
        loop.train(TrainConfig.from_given(given), tmp_path / "c", data=[text])
    assert not (tmp_path / "c").exists()


def test_a_full_disk_keeps_what_was_saved_and_says_which_step(text, tmp_path, monkeypatch, capsys):
    save = loop.save_checkpoint

    def full(folder: Path, model: Any, state: Any, **more: Any) -> None:
        if state.step > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder, model, state, **more)

    monkeypatch.setattr(loop, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        loop.train(tiny(steps=8, save_every=4), tmp_path / "c", data=[text])
    assert f"{tmp_path / 'c'} keeps step 4, --resume goes on from it\n" in capsys.readouterr().err


def test_answers_without_text_have_a_loss_and_no_fault(tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_text('{"prompt": "ab", "completion": ""}\n{"prompt": "ba", "completion": ""}\n' * 20)
    figures = loop.train(tiny(steps=2, tokenizer="char"), tmp_path / "c", data=[data])
    assert figures["val_loss"] > 0


def test_targets_that_are_ignored_are_not_trained():
    inputs, targets = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[2, -100, -100], [-100, -100, -100]])
    model = loop.Decoder(tiny().model_config(9, None, 0))
    loss = next_token_loss(model, (inputs, targets))
    alone = next_token_loss(model, (inputs[:1, :1], targets[:1, :1]))
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    assert next_token_loss(model, (inputs[1:], targets[1:]), 1) == 0  # a process's rows may have none


@pytest.mark.parametrize("broken", ["one line", b"\xff\xfe"])
def test_a_bad_corpus_leaves_nothing(broken, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(broken.encode() if isinstance(broken, str) else broken)
    with pytest.raises(InputError):
        loop.train(tiny(), tmp_path / "deep" / "c", data=[file])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["text.txt"]
    assert not (tmp_path / "deep" / "c").exists()


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(text, tmp_path, monkeypatch):
    original = loop.save_checkpoint

    def full_at_8(folder: Path, model: Any, state: Any, **more: Any) -> None:
        if state.step >= 8:
            raise OSError(28, "No space left on device", str(folder))
        original(folder, model, state, **more)

    monkeypatch.setattr(loop, "save_checkpoint", full_at_8)
    with pytest.raises(OSError, match="No space left"):
        loop.train(tiny(), tmp_path / "c", data=[text])
    assert load_checkpoint(tmp_path / "c").training["step"] == 4


def test_training_puts_torch_back_as_it_was(text, tmp_path):
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    loop.train(tiny(steps=1), tmp_path / "c", data=[text])
    assert torch.rand(1) == expected
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_the_checkpoint_records_is_the_run(text, tmp_path):
    config = tiny(steps=4)
    loop.train(config, tmp_path / "c", data=[text])
    training = load_checkpoint(tmp_path / "c").training
    assert TrainConfig(**training["settings"]) == config
    assert dataclasses.asdict(config) == training["settings"]
    assert str(tmp_path) not in (tmp_path / "c" / "pastkey.json").read_text()
    shutil.rmtree(tmp_path / "c" / "training")
    with pytest.raises(IntegrityError, match=r"training.* is missing"):
        loop.resume(tmp_path / "c", {"steps": 8})


def test_minutes_plan_the_steps(text, tmp_path, monkeypatch):
    seconds = itertools.count()  # one passes at each look
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    figures = loop.train(dataclasses.replace(tiny(save_every=1000), minutes=2.0), tmp_path / "c", data=[text])
    training = load_checkpoint(tmp_path / "c").training
    assert 100 < figures["step"] == training["step"] == training["settings"]["steps"] < 130
    with pytest.raises(InputError, match="is trained already"):
        loop.resume(tmp_path / "c", {})
    assert loop.resume(tmp_path / "c", {"minutes": 1})["step"] > figures["step"]
    config = dataclasses.replace(tiny(save_every=1000), minutes=0.05)
    assert loop.train(config, tmp_path / "slow", data=[text])["step"] < 5  # a step takes more than the time


def test_another_process_has_the_facts_that_the_first_prepared(tmp_path):
    sources = (SourceTokens("a.txt", 60, 0.7), SourceTokens("b.txt", 40, 0.3))
    info = DataInfo("a.txt, b.txt", "0" * 64, 2, "<u2", 100, 10, 20, 0, 0, sources=sources)
    told = {"path": str(tmp_path / "new"), "info": json.loads(json.dumps(info.to_json()))}
    ranks: Any = SimpleNamespace(first=False, told=lambda: told)
    with loop._prepared(ranks, tiny(), tmp_path / "c", [], None, force=False) as (place, found):
        assert (place.path, found) == (tmp_path / "new", info)
