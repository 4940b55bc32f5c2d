"""The example that is shown before training, with its loss mask."""

from __future__ import annotations

import pytest

from pastkey.train.data.preview import marked, show_example

from .helpers import chat, chat_tokenizer, corpus_of, written


def test_trained_text_is_green_or_between_marks():
    tokenizer = chat_tokenizer()
    tokens = [~token for token in tokenizer.encode("the cat")] + tokenizer.encode(" sat\x1b[31m")
    assert marked(tokens, tokenizer, coloured=False) == "the cat[[ sat\ufffd[31m]]"
    assert marked(tokens, tokenizer, coloured=True) == "\x1b[2mthe cat\x1b[0m\x1b[1;32m sat\ufffd[31m\x1b[0m"


@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_the_first_example_is_shown(terminal, no_color, coloured, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    tokenizer = chat_tokenizer()
    info = written(tmp_path, corpus_of(*[chat("hi", "hello")] * 30), 100, tokenizer)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    show_example(tmp_path, info, tokenizer)
    said = capsys.readouterr().err
    assert "answers end with <|im_end|>\n" in said
    assert said.count("<|im_start|>user") == 1  # of the several in a window
    assert ("\x1b[1;32mhello<|im_end|>\x1b[0m" in said) == coloured
    assert ("<|im_start|>assistant\n[[hello<|im_end|>]]" in said) != coloured
