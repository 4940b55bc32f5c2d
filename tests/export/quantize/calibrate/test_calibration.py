"""The user's calibration text: what can be used, and what is refused before any work."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, processors

from pastkey.errors import InputError, MissingFileError
from pastkey.export.quantize.calibrate.calibration import read_calibration

OWN = "leave out --calibration for text of the model's own"


@pytest.fixture
def tokenizer(word_tokenizer):
    return word_tokenizer.to_str().encode()


def words(count: int) -> str:
    return " ".join(f"w{i % 7}" for i in range(count))


def test_the_fewest_tokens_that_are_taken(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(words(64))
    assert read_calibration(file, tokenizer, 8) == [i % 7 for i in range(64)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty: a text of at least 64 tokens was expected"),
        (b"w1", f"is too short to calibrate on, 1 token: .*; {OWN}"),
        (words(63).encode(), "is too short to calibrate on, 63 tokens: at least 64 are needed"),
        (bytes(range(256)), "is not UTF-8 text: byte 128 is 0x80"),
        (b"w5 " * 100, f"is one token 100 times in 100 for this tokenizer, .*, or {OWN}"),
        (b"w1 " + b"w5 " * 99, "is one token 99 times in 100 for this tokenizer"),
    ],
    ids=["empty", "one", "63", "binary", "all_the_same", "nearly_the_same"],
)
def test_a_text_that_cannot_be_used_is_one_sentence(content, sentence, tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"^\S*text\.txt {sentence}"):
        read_calibration(file, tokenizer, 8)


def test_tokens_that_the_tokenizer_adds_do_not_make_a_text(word_tokenizer, tmp_path):
    adding = Tokenizer.from_str(word_tokenizer.to_str())
    adding.post_processor = processors.TemplateProcessing("<end> $A <end>", special_tokens=[("<end>", 60)])
    file = tmp_path / "text.txt"
    file.write_text("w5 " * 100)
    with pytest.raises(InputError, match="is one token 100 times in 102"):
        read_calibration(file, adding.to_str().encode(), 8)


def test_no_file_a_folder_and_no_tokenizer(tokenizer, tmp_path):
    with pytest.raises(MissingFileError, match=r"no such file: .*none\.txt"):
        read_calibration(tmp_path / "none.txt", tokenizer, 8)
    with pytest.raises(InputError, match="is a folder; a file was expected"):
        read_calibration(tmp_path, tokenizer, 8)
    with pytest.raises(InputError, match="no tokenizer to read a calibration text with: give --tokenizer FILE"):
        read_calibration(tmp_path / "none.txt", None, 8)
