"""`pastkey train` as it is typed, with the mistakes that are made."""

from __future__ import annotations

import json
import sys

import pytest

from pastkey.__main__ import main
from pastkey.train.hardware import launch

from .helpers import TINY, write_corpus

FLAGS = [item for name, value in TINY.items() for item in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def text(tmp_path):
    return write_corpus(tmp_path / "text.txt")


def test_json_is_the_only_thing_on_standard_output(text, tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "c"), "--data", str(text), "--json", *FLAGS]) == 0
    out, err = capsys.readouterr()
    figures = json.loads(out)
    assert figures["step"] == 12
    assert {"val_loss", "bits_per_byte", "tokens_per_second", "parameters", "seconds"} <= set(figures)
    assert "held-out loss" in err


def test_without_json_standard_output_is_empty(tmp_path, capsys):
    assert main(["train", "--preset", "classic", "--out", str(tmp_path / "c"), "--steps", "200"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "what is statquest -> awesome" in err
    assert "pastkey export" in err


def test_resume_goes_on(text, tmp_path, capsys):
    out = ["train", "--out", str(tmp_path / "c")]
    assert main([*out, "--data", str(text), *FLAGS]) == 0
    assert main([*out, "--resume"]) == 2
    assert "trained already" in capsys.readouterr().err
    assert main([*out, "--resume", "--steps", "14", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 14


def test_processes_get_the_words_that_python_gave(monkeypatch):
    words = ["train", "--processes", "2", "--out", "c", "--no-compile"]
    monkeypatch.setattr(sys, "argv", ["notebook", "--steps", "9"])
    monkeypatch.setattr(launch, "launch", lambda *given: 7 if given == (2, words) else 1)
    assert main(words) == 7


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "empty"], "the folder empty has no .txt"),
        (["--preset", "gpt5"], "no preset 'gpt5'; the presets are classic, gpt2, llama, qwen2, qwen3"),
        (["--resume"], "there is nothing to resume"),
        (["--resume", "--force"], "not allowed with argument"),
        (["--data", "text.txt", "--context", "100000"], "give more text, or a smaller --context"),
        (["--data", "text.txt", "--vocab-size", "10"], "byte-level BPE needs at least 257"),
        (["--data", "text.txt", "--tokenizer", "sentencepiece"], "it must be bpe, char, word or the path"),
        (["--data", "text.txt", "--heads", "4", "--kv-heads", "3"], "must be a divisor"),
        (["--rope-scaling", "yarn"], "--rope-scaling and --rope-factor are given together: give both, or neither"),
        (["--steps", "0"], "--steps"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0; it must be a positive number"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "text.txt")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    try:
        status = main(["train", "--out", "c", *arguments])
    except SystemExit as exit_of_argparse:
        status = int(exit_of_argparse.code or 0)
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
