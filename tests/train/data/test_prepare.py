"""From --data to a checkpoint's tokenizer and token files."""

from __future__ import annotations

import json

import pytest

from pastkey.errors import InputError
from pastkey.train.data import prepare as module
from pastkey.train.data.prepare import prepare, require_same_data
from pastkey.train.tokenizer import read_tokenizer

from ..helpers import tiny, write_corpus
from .helpers import CHATML, chat, chat_tokenizer, write_lines


def test_a_chat_file_and_a_tokenizer_with_a_template_give_a_tokenizer_that_ends_turns(tmp_path, capsys):
    pytest.importorskip("transformers")
    data = write_lines(tmp_path / "chat.jsonl", [chat(f"the cat {n}?", "sat") for n in range(30)])
    (tmp_path / "given").mkdir()
    chat_tokenizer().save(tmp_path / "given")
    for out in ("new", "cached"):
        (tmp_path / out).mkdir()
        config = tiny(tokenizer=str(tmp_path / "given" / "tokenizer.json"))
        info, tokenizer = prepare(config, tmp_path / out, [data])
        assert tokenizer.tokenizer.id_to_token(info.end) == "<|im_end|>"
        assert tokenizer.end == info.end
        saved = json.loads((tmp_path / out / "tokenizer_config.json").read_text())
        assert (saved["eos_token"], saved["chat_template"]) == ("<|im_end|>", CHATML)
        assert read_tokenizer(tmp_path / out / "tokenizer.json").chat_template == CHATML
        assert "[[sat<|im_end|>]]" in capsys.readouterr().err


def test_a_tokenizer_in_hand_and_a_shorter_window_are_taken(tmp_path):
    data = write_lines(tmp_path / "a.jsonl", [{"prompt": "the cat", "completion": " sat"}] * 30)
    made = chat_tokenizer(None)
    info, tokenizer = prepare(tiny(), tmp_path, [data], made, context=20)
    assert info.row_length == 21
    assert tokenizer.tokenizer is made.tokenizer


def test_of_a_large_corpus_a_tokenizer_learns_from_every_nth_document(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TOKENIZER_BYTES", 200)
    data = write_lines(tmp_path / "a.jsonl", [{"text": f"cat{number:03} " * 5} for number in range(100)])
    (tmp_path / "c").mkdir()
    _, tokenizer = prepare(tiny(tokenizer="word"), tmp_path / "c", [data])
    assert sum(token.startswith("cat") for token in tokenizer.tokenizer.get_vocab()) == 6
    (tmp_path / "d").mkdir()
    _, tokenizer = prepare(tiny(tokenizer="char"), tmp_path / "d", [data])  # all characters are needed
    assert set("0123456789") <= set(tokenizer.tokenizer.get_vocab())


def test_a_resumed_run_refuses_other_text_and_other_weights(tmp_path):
    text = write_corpus(tmp_path / "text.txt")
    info, _ = prepare(tiny(), tmp_path, [f"{text}=2"])
    require_same_data([f"{text}=2"], info)
    with pytest.raises(InputError, match=r"was started with 2\.0 for its sources"):
        require_same_data([text], info)
    text.write_text("other\ntext")
    with pytest.raises(InputError, match=r"was started on other text \(text\.txt\)"):
        require_same_data([f"{text}=2"], info)
