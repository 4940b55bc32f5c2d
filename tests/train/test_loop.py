"""A run learns, is the same every time, and continues after any interruption as if there had been none."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pastkey.__main__ import main
from pastkey.errors import InputError, IntegrityError, MissingFileError, NumericsError
from pastkey.train import loop
from pastkey.train.checkpoint import load_checkpoint, load_optimizer
from pastkey.train.data.prepare import LESSON_PROMPTS
from pastkey.train.hardware import launch
from pastkey.train.loss import next_token_loss
from pastkey.train.model import generate, positions_like
from pastkey.train.report import read_metrics
from pastkey.train.settings import TrainConfig
from pastkey.train.tokenizer import read_tokenizer

from .helpers import TINY, Stop, before_step, flags, stop, tiny, write_corpus


def same_weights(one: Path, two: Path) -> bool:
    a, b = load_checkpoint(one), load_checkpoint(two)
    mine, other = load_optimizer(one, a.training), load_optimizer(two, b.training)
    pairs = [*zip(a.model.parameters(), b.model.parameters(), strict=True)]
    return all(torch.equal(p, q) for p, q in [*pairs, *((mine[name], other[name]) for name in mine)])


# --- learning -----------------------------------------------------------------------------------------------------
def test_the_classic_lesson_is_learnt_with_a_clear_margin(tmp_path, command):
    status, out, err = command("train", "--preset", "classic", "--out", tmp_path / "c")
    assert (status, out) == (0, "")
    assert "what is statquest -> awesome" in err
    assert "pastkey export" in err
    checkpoint = load_checkpoint(tmp_path / "c")
    assert checkpoint.training["figures"]["val_loss"] < 0.01  # every position of both sentences, prompt and answer
    tokenizer = read_tokenizer(checkpoint.tokenizer_path)
    for prompt in LESSON_PROMPTS:
        ids = tokenizer.prompt(prompt)
        (answer,) = generate(checkpoint.model, torch.tensor([ids]), 4)
        assert tokenizer.decode(answer) == "awesome"
        whole = torch.tensor([[*ids, *answer]])
        with torch.no_grad():
            best = checkpoint.model(whole, positions_like(whole))[0, len(ids) - 1 :].topk(2).values
        assert ((best[:, 0] - best[:, 1]) > 5).all(), best  # int8 must not be able to turn the answer


@pytest.mark.oldest
def test_a_run_learns_and_reports(text, tmp_path):
    config = tiny(steps=80, save_every=40, learning_rate=0.01)
    figures = loop.train(config, tmp_path / "c", data=[text])
    rows = read_metrics(tmp_path / "c")
    assert rows[-2]["loss"] < 0.6 * rows[0]["loss"]
    assert figures["step"] == 80
    assert figures["val_loss"] < 0.6 * rows[0]["loss"]
    # Characters of ASCII text are bytes: nats per token over ln 2, but for the EOS token that no byte pays for.
    assert figures["bits_per_byte"] == pytest.approx(figures["val_loss"] / math.log(2), rel=0.02)
    assert (tmp_path / "c" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [row["step"] for row in rows if "val_loss" in row] == [40, 80]
    training = load_checkpoint(tmp_path / "c").training
    assert (training["step"], training["settings"]) == (80, dataclasses.asdict(config))
    assert str(tmp_path) not in (tmp_path / "c" / "pastkey.json").read_text()


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("preset", "kind"), [("gpt2", "bpe"), ("llama", "word"), ("qwen2", "bpe"), ("qwen3", "bpe"), ("classic", "word")]
)
def test_every_preset_trains_on_text(preset, kind, text, tmp_path):
    config = tiny(preset=preset, tokenizer=kind, vocab_size=261, steps=2, context=8)
    loop.train(config, tmp_path / "c", data=[text])
    assert load_checkpoint(tmp_path / "c").config.max_position_embeddings == 8


def test_accumulated_batches_are_one_large_batch(text, tmp_path):
    loop.train(tiny(steps=1, batch_size=4, accumulate=3, save_every=1), tmp_path / "c", data=[text])
    row, checkpoint = read_metrics(tmp_path / "c")[0], load_checkpoint(tmp_path / "c")
    torch.manual_seed(0)
    model = loop.Decoder(checkpoint.config)
    tokens = loop.Tokens(tmp_path / "c" / loop.TOKENS_TRAIN, loop.DataInfo(**checkpoint.training["data"]), 32)
    inputs, targets = zip(*(tokens.draw(4, 0, part) for part in range(3)), strict=True)
    loss = next_token_loss(model, (torch.cat(inputs), torch.cat(targets)))
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-4)


def test_answers_without_text_have_a_loss_and_no_fault(tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_text('{"prompt": "ab", "completion": ""}\n{"prompt": "ba", "completion": ""}\n' * 20)
    assert loop.train(tiny(steps=2), tmp_path / "c", data=[data])["val_loss"] > 0


def test_targets_that_are_ignored_are_not_trained():
    inputs, targets = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[2, -100, -100], [-100, -100, -100]])
    model = loop.Decoder(tiny().model_config(9, None, 0))
    loss = next_token_loss(model, (inputs, targets))
    alone = next_token_loss(model, (inputs[:1, :1], targets[:1, :1]))
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    assert next_token_loss(model, (inputs[1:], targets[1:]), 1) == 0  # a process's rows may have none


# --- interruption -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}])
def test_the_same_seed_gives_the_same_run_and_torch_stays_as_it_was(changes, whole, tmp_path):
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    loop.train(tiny(**changes), tmp_path / "c", data=[whole.with_name("text.txt")])
    assert torch.rand(1) == expected
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert read_metrics(tmp_path / "c") == read_metrics(whole)
    assert same_weights(tmp_path / "c", whole)
    loop.train(tiny(seed=1, steps=1), tmp_path / "other", data=[whole.with_name("text.txt")])
    assert read_metrics(tmp_path / "other")[0]["loss"] != read_metrics(whole)[0]["loss"]


@pytest.mark.parametrize("stop_at", [4, 7])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(stop_at, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        before_step(patch, stop_at, stop)
        with pytest.raises(Stop):
            loop.train(tiny(), tmp_path / "c", data=[whole.with_name("text.txt")])
    assert load_checkpoint(tmp_path / "c").training["step"] == 4
    loop.resume(tmp_path / "c", {})
    assert read_metrics(tmp_path / "c") == read_metrics(whole)
    assert same_weights(tmp_path / "c", whole)


def test_a_full_disk_keeps_what_was_saved_and_says_which_step(text, tmp_path, monkeypatch, capsys):
    save = loop.save_checkpoint

    def full(folder: Path, model: Any, state: Any, **more: Any) -> None:
        if state.step > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder, model, state, **more)

    monkeypatch.setattr(loop, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        loop.train(tiny(steps=8), tmp_path / "c", data=[text])
    assert f"{tmp_path / 'c'} keeps step 4, --resume continues from it\n" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "c").training["step"] == 4


def test_minutes_plan_the_steps(text, tmp_path, monkeypatch):
    seconds = itertools.count()  # one passes at each look
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    figures = loop.train(dataclasses.replace(tiny(save_every=1000), minutes=0.7), tmp_path / "c", data=[text])
    training = load_checkpoint(tmp_path / "c").training
    assert 30 < figures["step"] == training["step"] == training["settings"]["steps"] < 45
    with pytest.raises(InputError, match="is trained already"):
        loop.resume(tmp_path / "c", {})
    assert loop.resume(tmp_path / "c", {"minutes": 0.3})["step"] > figures["step"]
    config = dataclasses.replace(tiny(save_every=1000), minutes=0.05)
    assert loop.train(config, tmp_path / "slow", data=[text])["step"] < 5  # a step needs more than the time


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_run_goes_on_only_with_its_own_settings_and_files(copy, whole, tmp_path):
    text = whole.with_name("text.txt")
    for given, data, word in (
        ({"preset": "gpt2", "steps": 16}, [], "started with preset llama, not gpt2"),
        ({"batch_size": 5, "steps": 16}, [], "started with batch_size 4, not 5"),
        ({"steps": 16}, [write_corpus(tmp_path / "other.txt", 70)], r"started on other text \(text\.txt\)"),
        ({}, [], "trained already, to step 12 of 12"),
    ):
        with pytest.raises(InputError, match=word):
            loop.resume(copy, given, data=data)
    with pytest.raises(MissingFileError, match="nothing to resume"):
        loop.resume(tmp_path / "none", {})
    assert loop.resume(copy, {"steps": 13, "batch_size": 4, "threads": 1}, data=[text])["step"] == 13
    (copy / loop.TOKENS_VAL).write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"tokens-val\.bin"):
        loop.resume(copy, {"steps": 14})


# --- losses that rise ---------------------------------------------------------------------------------------------
def test_a_loss_that_is_not_a_number_ends_the_run_with_a_sentence(text, tmp_path):
    with pytest.raises(NumericsError, match=r"training broke at step \d+.*smaller --learning-rate"):
        loop.train(tiny(steps=60, learning_rate=1e30, warmup_steps=0, save_every=60), tmp_path / "c", data=[text])
    assert list(tmp_path.iterdir()) == [text]


def test_a_loss_that_rises_ends_the_run_and_keeps_the_last_good_checkpoint(text, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_RECENT", 10)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "schedule", lambda config, step: 1.0 if step < 30 else 300.0)
        with pytest.raises(NumericsError, match=r"diverges: the mean loss .* keeps step 30, --resume .* a smaller"):
            loop.train(tiny(steps=60, save_every=10), tmp_path / "c", data=[text])
        assert load_checkpoint(tmp_path / "c").training["step"] == 30
        with pytest.raises(NumericsError, match=r"the last 10 steps .* at step 40, .* keeps step 30"):
            loop.resume(tmp_path / "c", {})
    assert loop.resume(tmp_path / "c", {"learning_rate": 1e-3})["val_loss"] < 3


def test_a_loss_that_rises_from_the_first_step_on_ends_the_run(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "schedule", lambda config, step: 3000.0)
    config = TrainConfig.from_given({"init": str(whole), "steps": 40, "save_every": 4, "learning_rate": 5e-3})
    with pytest.raises(NumericsError, match=r"diverges: .* at step 4, and was \d+\.\d+; nothing was saved yet"):
        loop.train(config, tmp_path / "c", data=[whole.with_name("text.txt")])
    assert not (tmp_path / "c").exists()


# --- `pastkey train` as it is typed, with the mistakes that are made -----------------------------------------------
def test_json_is_the_only_thing_on_standard_output_and_resume_goes_on(text, tmp_path, command):
    out = ["train", "--out", tmp_path / "c", "--json"]
    _, told, err = command(*out, "--data", text, *flags(TINY))
    figures = json.loads(told)
    assert figures["step"] == 12
    assert {"val_loss", "bits_per_byte", "tokens_per_second", "parameters", "seconds"} <= set(figures)
    assert "held-out loss" in err
    assert command(*out, "--resume")[0] == 2
    assert json.loads(command(*out, "--resume", "--steps", "14")[1])["step"] == 14


def test_processes_get_the_words_that_python_gave(monkeypatch):
    words = ["train", "--processes", "2", "--out", "c", "--no-compile"]
    monkeypatch.setattr(sys, "argv", ["notebook", "--steps", "9"])
    monkeypatch.setattr(launch, "launch", lambda *given: 7 if given == (2, words) else 1)
    assert main(words) == 7


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--resume"], "there is nothing to resume"),
        (["--resume", "--force"], "not allowed with argument"),
        (["--data", "text.txt", "--context", "100000"], "give more text, or a smaller --context"),
        (["--data", "text.txt", "--shard"], "--shard divides a model among processes"),
        (["--preset", "classic", "--tokenizer", "bpe"], "tokenized by words"),
        (["--preset", "classic", "--context", "3"], "too short"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(arguments, sentence, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "text.txt")
    before = sorted(tmp_path.iterdir())
    status, out, err = command("train", "--out", "c", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert sentence in err
    assert sorted(tmp_path.iterdir()) == before
