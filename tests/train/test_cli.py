"""`pastkey train` as it is typed, with the mistakes that are made."""

from __future__ import annotations

import json
import sys

import pytest

from pastkey.__main__ import main
from pastkey.train.hardware import launch

from .helpers import TINY, write_corpus

FLAGS = [item for name, value in TINY.items() for item in (f"--{name.replace('_', '-')}", str(value))]


def test_json_is_the_only_thing_on_standard_output_and_resume_goes_on(text, tmp_path, capsys):
    out = ["train", "--out", str(tmp_path / "c"), "--json"]
    assert main([*out, "--data", str(text), *FLAGS]) == 0
    told, err = capsys.readouterr()
    figures = json.loads(told)
    assert figures["step"] == 12
    assert {"val_loss", "bits_per_byte", "tokens_per_second", "parameters", "seconds"} <= set(figures)
    assert "held-out loss" in err
    assert main([*out, "--resume"]) == 2
    assert "trained already" in capsys.readouterr().err
    assert main([*out, "--resume", "--steps", "14"]) == 0
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
        (["--resume"], "there is nothing to resume"),
        (["--resume", "--force"], "not allowed with argument"),
        (["--data", "text.txt", "--context", "100000"], "give more text, or a smaller --context"),
        (["--data", "text.txt", "--vocab-size", "10"], "byte-level BPE needs at least 257"),
        (["--data", "text.txt", "--tokenizer", "sentencepiece"], "it must be bpe, char, word or the path"),
        (["--data", "text.txt", "--heads", "4", "--kv-heads", "3"], "must be a divisor"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0; it must be a positive number"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(arguments, sentence, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "text.txt")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    status, out, err = command("train", "--out", "c", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert sentence in err
    assert sorted(tmp_path.iterdir()) == before
