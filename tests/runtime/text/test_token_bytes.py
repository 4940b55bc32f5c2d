from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pastkey.errors import InputError
from pastkey.runtime.text.codec import TextCodec
from pastkey.runtime.text.token_bytes import ExactEncoder, token_bytes

from ..constraints import vocabularies

TEXTS = st.text() | st.text(st.sampled_from(vocabularies.CHARACTERS))


def encoder(make: Callable[[], Tokenizer]) -> tuple[ExactEncoder, list[bytes]]:
    codec = TextCodec(make())
    tokens = token_bytes(codec, codec._tokenizer.get_vocab_size() + 2)
    return ExactEncoder(codec, tokens), tokens


BYTES, PIECES, CHARACTERS = map(encoder, vocabularies.MAKES)


@given(TEXTS)
def test_the_bytes_of_the_ids_are_the_text(text):
    for encode, tokens in (BYTES, PIECES):
        assert b"".join(tokens[token] for token in encode(text)).decode() == text


@given(TEXTS)
def test_where_a_character_has_no_token_the_ids_end_before_it(text):
    encode, tokens = CHARACTERS
    told = b"".join(tokens[token] for token in encode(text)).decode()
    assert text.startswith(told)
    assert told == text or text[len(told)] not in vocabularies.CHARACTERS


def test_texts_are_split_as_the_tokenizer_splits_them_within_a_text():
    encode, tokens = PIECES
    assert [tokens[token] for token in encode(' the{"s"')] == [b" the", b'{"', b"s", b'"']
    assert [tokens[token] for token in encode("s the")] == [b"s", b" the"]  # no space is put before it
    encode, tokens = BYTES
    assert [tokens[token] for token in encode('{"the":')] == [b'{"', b"th", b"e", b'":']
    assert encode("") == []


def test_special_tokens_and_ids_without_a_token_say_nothing():
    for make in vocabularies.MAKES:
        tokenizer = make()
        tokens = token_bytes(TextCodec(tokenizer), tokenizer.get_vocab_size() + 2)
        assert tokens[tokenizer.token_to_id(vocabularies.END)] == b""
        assert tokens[-2:] == [b"", b""]
        assert sum(token == b"" for token in tokens) == 2 + (2 if make is vocabularies.sentence_piece else 1)


def test_a_special_token_that_a_text_writes_is_no_special_token():
    for encode, tokens in (BYTES, PIECES):
        assert b"".join(tokens[token] for token in encode(f"a{vocabularies.END}b")) == f"a{vocabularies.END}b".encode()


def test_what_tokens_can_write():
    assert BYTES[0].characters == PIECES[0].characters == [(0, 0xD7FF), (0xE000, 0x10FFFF)]
    letters = {chr(code) for first, last in CHARACTERS[0].characters for code in range(first, last + 1)}
    assert letters == set(vocabularies.CHARACTERS)


def test_a_tokenizer_whose_words_depend_on_one_another_is_refused():
    with pytest.raises(InputError, match="decodes a token differently by the tokens beside it"):
        encoder(vocabularies.word_piece)
