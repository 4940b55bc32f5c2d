"""Texts to measure on: windows of a file, and what a model itself writes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pastkey.errors import InputError, MissingFileError
from pastkey.export.measure.metrics import softmax
from pastkey.export.measure.predictors import BundlePredictor
from pastkey.export.measure.texts import cut_windows, encode_file, self_generated_texts, start_token
from pastkey.runtime import Engine
from pastkey.runtime.text.codec import TextCodec


# --- of a file ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("count", "length", "most", "expected"),
    [
        (10, 4, 9, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        (9, 4, 9, [[0, 1, 2, 3], [4, 5, 6, 7]]),  # one token alone has nothing to be predicted from
        (10, 4, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_windows_follow_one_another_from_the_beginning(count, length, most, expected):
    found = cut_windows(range(count), length, most)
    assert [window.tolist() for window in found] == expected
    assert {window.dtype for window in found} == {np.dtype(np.int64)}


def test_a_file_is_encoded_as_a_whole_without_its_byte_order_mark(word_tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfw3 w1\nw4 w1 w5")
    assert encode_file(file, TextCodec(word_tokenizer)) == [3, 1, 4, 1, 5]


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (None, MissingFileError, "no such file: "),
        (b"", InputError, "is empty: a text of at least 7 tokens was expected"),
        (b"w1 \xe9", InputError, "is not UTF-8 text: byte 3 is 0xe9"),
    ],
)
def test_a_file_without_a_text_is_one_sentence(content, kind, words, word_tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(kind, match=words):
        encode_file(file, TextCodec(word_tokenizer), 7)


# --- of the model itself ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("bos", "eos", "expected"), [(3, (5,), 3), (None, (5, 4), 5), (None, (), 0), (99, (), 60)])
def test_a_text_begins_with_bos_or_eos_or_the_first_token(bos, eos, expected, exported):
    manifest = exported("llama").bundle.manifest  # of 61 tokens
    assert start_token(dataclasses.replace(manifest, bos_token_id=bos, eos_token_ids=eos)) == expected


@pytest.mark.parametrize("beginning", [7, [7, 3, 9]])
def test_a_model_writes_what_the_slow_obvious_way_draws(beginning, exported):
    """The same ids for the same seed, on which int8 is calibrated."""
    made = exported("llama")
    found = self_generated_texts(Engine(made.bundle), beginning, 5, 12, batch=2, seed=4)
    rng, expected = np.random.default_rng(4), list[list[int]]()
    for rows in (2, 2, 1):
        texts = [[7] if beginning == 7 else [7, 3, 9] for _ in range(rows)]
        while len(texts[0]) < 12:
            logits = np.stack([made.torch_logits(text)[-1] for text in texts])
            chosen = (logits + rng.gumbel(size=logits.shape)).argmax(-1)
            texts = [[*text, int(token)] for text, token in zip(texts, chosen, strict=True)]
        expected += texts
    assert [text.tolist() for text in found] == expected
    assert {text.dtype for text in found} == {np.dtype(np.int64)}


def test_tokens_are_drawn_with_the_models_probabilities(exported):
    bundle = exported("llama").bundle
    texts = self_generated_texts(Engine(bundle), 3, 4096, 2, batch=512)
    counted = np.bincount([text[1] for text in texts], minlength=61) / len(texts)
    expected = softmax(BundlePredictor(bundle).logits(np.array([3])))[0]
    assert np.abs(counted - expected).max() < 4 * np.sqrt(expected.max() / len(texts))
