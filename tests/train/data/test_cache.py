"""A second run on the same files and tokenizer takes the tokens of the first, and any other one does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.train.checkpoint import TOKENS_TRAIN, TOKENS_VAL
from pastkey.train.data import cache, prepare
from pastkey.train.data.token_files import DataInfo
from pastkey.train.tokenizer import train_char

from ..helpers import tiny, write_corpus

FILES = ("tokenizer.json", "tokenizer_config.json", TOKENS_TRAIN, TOKENS_VAL)


@pytest.fixture
def text(tmp_path):
    return write_corpus(tmp_path / "text.txt")


@pytest.fixture
def tokenized(monkeypatch):
    """One entry for each time that a corpus is tokenized."""
    times: list[int] = []
    write: Callable[..., DataInfo] = prepare.write_tokens

    def counted(*given: Any) -> DataInfo:
        times.append(1)
        return write(*given)

    monkeypatch.setattr(prepare, "write_tokens", counted)
    return times


def run(folder: Path, data: list[Path | str], **changes: Any) -> tuple[DataInfo, dict[str, bytes]]:
    folder.mkdir()
    info, _ = prepare.prepare(tiny(**changes), folder, data)
    return info, {name: (folder / name).read_bytes() for name in FILES}


def test_a_second_run_does_not_tokenize_again(text, tmp_path, tokenized, capsys):
    first = run(tmp_path / "1", [text])
    assert run(tmp_path / "2", [text]) == first
    assert len(tokenized) == 1
    assert "took the tokens of text.txt from" in capsys.readouterr().err
    moved = text.rename(tmp_path / "other.txt")
    info, files = run(tmp_path / "3", [moved])
    assert (len(tokenized), info.corpus, files) == (1, "other.txt", first[1])


def test_other_text_another_tokenizer_and_another_context_are_tokenized(text, tmp_path, tokenized):
    run(tmp_path / "1", [text])
    run(tmp_path / "2", [text], tokenizer="word")
    run(tmp_path / "3", [text], context=16)
    run(tmp_path / "4", [f"{text}=1"])
    (tmp_path / "made").mkdir()
    train_char([text.read_text(), "\u00e9"]).save(tmp_path / "made")
    run(tmp_path / "5", [text], tokenizer=str(tmp_path / "made" / "tokenizer.json"))
    text.write_text(text.read_text() + "one line more\n")
    run(tmp_path / "6", [text])
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


def test_a_system_without_links_copies(text, tmp_path, tokenized, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(cache.os, "link", refused)
    assert run(tmp_path / "1", [text]) == run(tmp_path / "2", [text])
    assert len(tokenized) == 1


def test_the_least_recently_used_entries_go(text, tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(cache, "MOST_BYTES", 20_000)
    for number, context in enumerate([8, 16, 8, 12]):  # the first one is used again
        run(tmp_path / str(number), [text], context=context)
    entries = [*(own_cache / "pastkey" / "tokens").iterdir()]
    assert len(entries) == 2
    monkeypatch.setattr(cache, "MOST_BYTES", 0)
    run(tmp_path / "newest", [text], context=20)
    assert len([*(own_cache / "pastkey" / "tokens").iterdir()]) == 1


def test_refused_data_is_not_kept(text, tmp_path, own_cache):
    with pytest.raises(InputError, match="give more text"):
        run(tmp_path / "1", [text], context=100_000)
    assert not (own_cache / "pastkey" / "tokens").exists()
