"""From --data to a checkpoint's tokenizer and token files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.train.checkpoint import TOKENS_TRAIN, TOKENS_VAL
from pastkey.train.data import cache
from pastkey.train.data import prepare as module
from pastkey.train.data.prepare import prepare, require_same_data
from pastkey.train.data.preview import show_example
from pastkey.train.data.token_files import DataInfo
from pastkey.train.tokenizer import TextTokenizer, read_tokenizer, train_char

from ..helpers import tiny, write_corpus
from .helpers import CHATML, chat, chat_tokenizer, corpus_of, write_lines, written


def prepared(folder: Path, data: Sequence[Path | str], **changes: Any) -> tuple[DataInfo, TextTokenizer]:
    folder.mkdir()
    return prepare(tiny(**changes), folder, data)


def test_a_chat_file_and_a_tokenizer_with_a_template_give_a_tokenizer_that_ends_turns(tmp_path, capsys):
    data = write_lines(tmp_path / "chat.jsonl", [chat(f"the cat {n}?", "sat") for n in range(30)])
    (tmp_path / "given").mkdir()
    chat_tokenizer().save(tmp_path / "given")
    for out in ("new", "cached"):
        given = str(tmp_path / "given" / "tokenizer.json")
        info, tokenizer = prepared(tmp_path / out, [data], tokenizer=given)
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
    _, tokenizer = prepared(tmp_path / "c", [data], tokenizer="word")
    assert sum(token.startswith("cat") for token in tokenizer.tokenizer.get_vocab()) == 6
    _, tokenizer = prepared(tmp_path / "d", [data], tokenizer="char")  # all characters are needed
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


# --- the example that is shown before training, with its loss mask -------------------------------------------------
@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_the_trained_text_of_an_example_is_shown(terminal, no_color, coloured, tmp_path, monkeypatch, capsys):
    tokenizer = chat_tokenizer()
    info = written(tmp_path, corpus_of(*[chat("hi", "hel\x1blo")] * 30), 100, tokenizer)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    show_example(tmp_path, info, tokenizer)
    said = capsys.readouterr().err
    assert "answers end with <|im_end|>\n" in said
    assert said.count("<|im_start|>user") == 1  # of the several in a window
    assert ("assistant\n\x1b[0m\x1b[1;32mhel\ufffdlo<|im_end|>\x1b[0m" in said) == coloured
    assert ("<|im_start|>assistant\n[[hel\ufffdlo<|im_end|>]]" in said) != coloured


# --- a second run on the same files and tokenizer reuses the tokens of the first, and any other one does not -------
FILES = ("tokenizer.json", "tokenizer_config.json", TOKENS_TRAIN, TOKENS_VAL)


@pytest.fixture
def text(tmp_path):
    return write_corpus(tmp_path / "text.txt")


@pytest.fixture
def tokenized(monkeypatch):
    """One entry for each time that a corpus is tokenized."""
    times: list[int] = []
    write: Callable[..., DataInfo] = module.write_tokens

    def counted(*given: Any) -> DataInfo:
        times.append(1)
        return write(*given)

    monkeypatch.setattr(module, "write_tokens", counted)
    return times


def run(folder: Path, data: list[Path | str], **changes: Any) -> tuple[DataInfo, dict[str, bytes]]:
    info, _ = prepared(folder, data, **changes)
    return info, {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("links", [True, False])
def test_a_second_run_does_not_tokenize_again(links, text, tmp_path, tokenized, capsys, monkeypatch):
    if not links:  # a system that copies
        monkeypatch.setattr(cache.os, "link", lambda *_: Path("none").rename("other"))
    first = run(tmp_path / "1", [text])
    assert run(tmp_path / "2", [text]) == first
    assert len(tokenized) == 1
    assert "read the tokens of text.txt from" in capsys.readouterr().err
    moved = text.rename(tmp_path / "other.txt")
    info, files = run(tmp_path / "3", [moved])
    assert (len(tokenized), info.corpus, files) == (1, "other.txt", first[1])


def test_other_text_another_tokenizer_and_another_context_are_tokenized(text, tmp_path, tokenized):
    train_char([text.read_text(), "\u00e9"]).save(tmp_path)
    made = str(tmp_path / "tokenizer.json")
    changes: list[dict[str, Any]] = [{}, {"tokenizer": "word"}, {"context": 16}, {"tokenizer": made}]
    for number, change in enumerate(changes):
        run(tmp_path / str(number), [text], **change)
    run(tmp_path / "weighted", [f"{text}=1"])
    text.write_text(text.read_text() + "one line more\n")
    run(tmp_path / "longer", [text])
    assert len(tokenized) == 6


@pytest.mark.parametrize("name", ["pastkey.json", "tokenizer.json", TOKENS_TRAIN])
def test_a_damaged_entry_is_made_again(name, text, tmp_path, tokenized, own_cache):
    first = run(tmp_path / "1", [text])
    (entry,) = (own_cache / "pastkey" / "tokens").iterdir()
    content = (entry / name).read_bytes()
    (entry / name).unlink()  # the checkpoint's file is the same one
    (entry / name).write_bytes(content[:-1] + b"!")
    assert run(tmp_path / "2", [text]) == first
    assert run(tmp_path / "3", [text]) == first
    assert len(tokenized) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(text, tmp_path, tokenized, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (str(tmp_path / "file"), "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        run(tmp_path / place.replace("/", "-"), [text])
    assert len(tokenized) == 2
    assert not Path("relative").exists()


def test_refused_data_is_not_kept(text, tmp_path, own_cache):
    with pytest.raises(InputError, match="give more text"):
        run(tmp_path / "1", [text], context=100_000)
    assert not (own_cache / "pastkey" / "tokens").exists()


def test_the_least_recently_used_entries_go(text, tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(cache, "MOST_BYTES", 20_000)
    for number, context in enumerate([8, 16, 8, 12]):  # the first one is used again
        run(tmp_path / str(number), [text], context=context)
    entries = [*(own_cache / "pastkey" / "tokens").iterdir()]
    assert len(entries) == 2
    monkeypatch.setattr(cache, "MOST_BYTES", 0)
    run(tmp_path / "newest", [text], context=20)
    assert len([*(own_cache / "pastkey" / "tokens").iterdir()]) == 1
