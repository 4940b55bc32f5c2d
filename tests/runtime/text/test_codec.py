"""Text of token ids, in pieces and whole, ids of text, and the bytes of each token."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pastkey.errors import InputError, IntegrityError
from pastkey.runtime.text.codec import TextCodec, TextStream
from pastkey.runtime.text.stop_strings import StopStrings
from pastkey.runtime.text.token_bytes import ExactEncoder, token_bytes

from ..constraints import vocabularies
from ..constraints.vocabularies import byte_level, sentence_piece, word_piece


def word_level(*, unknown: bool = False) -> Tokenizer:
    words = ["what", "is", "statquest", "awesome", "<EOS>"] + ["<unk>"] * unknown
    model = models.WordLevel({word: i for i, word in enumerate(words)}, **({"unk_token": "<unk>"} if unknown else {}))
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<EOS>", special=True)])
    return tokenizer


def characters() -> Tokenizer:
    return Tokenizer(models.BPE({letter: i for i, letter in enumerate("abc é日")}, []))


def ids_of(tokenizer: Tokenizer, tokens: Iterable[str]) -> list[int]:
    """Each of which the tokenizer knows."""
    found = [tokenizer.token_to_id(token) for token in tokens]
    assert None not in found
    return found  # type: ignore[return-value]


ALL = [byte_level, sentence_piece, word_level, characters, word_piece]


# --- streams ------------------------------------------------------------------------------------------------------
def streamed(codec: TextCodec, ids: Sequence[int], *, keep: bool = False) -> str:
    stream = TextStream(codec, keep_special_tokens=keep)
    return "".join([*map(stream.push, ids), stream.flush()])


def whole_text(codec: TextCodec, ids: Sequence[int], *, keep: bool = False) -> str:
    """`decode` without the character that the ids begin and do not end, found by cutting ids off."""
    ids = [token for token in ids if codec.has_text(token, keep_special_tokens=keep)]
    for end in range(len(ids), max(-1, len(ids) - 4), -1):
        cut = ids[end:]
        if all(map(codec.is_byte, cut)) and _begins_a_character(b"".join(map(codec.bytes_of, cut))):
            return codec.decode(ids[:end], keep_special_tokens=keep)
    text = codec.decode(ids, keep_special_tokens=keep)
    tail = b"".join(map(codec.bytes_of, ids))
    byte_level = text == tail.decode("utf-8", "replace")
    begun = byte_level and any(_begins_a_character(tail[-length:]) for length in (1, 2, 3))
    return text[:-1] if begun else text


def _begins_a_character(data: bytes) -> bool:
    """Whether more bytes make it one, tried with all that matter."""
    endings = [bytes([first, *[0x80] * length]) for first in (0x80, 0xBF) for length in range(3)]
    whole = [(data + ending).decode("utf-8", "replace") for ending in endings]
    return bool(data) and any(len(text) == 1 and text != "�" for text in whole)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("make", ALL)
def test_the_pieces_of_any_ids_are_together_their_text(make, keep):
    tokenizer = make()
    codec = TextCodec(tokenizer)

    @given(ids=st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=30))
    def check(ids: list[int]) -> None:
        assert streamed(codec, ids, keep=keep) == whole_text(codec, ids, keep=keep)

    check()


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token for each byte, in either way of writing them."""
    letters = _byte_letters()
    fallback = tokenizer.token_to_id("<0x00>") is not None
    return ids_of(tokenizer, [f"<0x{byte:02X}>" if fallback else letters[byte] for byte in data])


@pytest.mark.parametrize("text", ["é", "日本", "🙂🙂", "a日\n🙂é b", "\ufffd", "日\ufffd", "naïve 日本語 👩‍💻"])
@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_text_that_ends_inside_a_character_ends_before_it(make, text):
    tokenizer = make()
    codec, ids = TextCodec(tokenizer), byte_ids(tokenizer, text.encode())
    for end in range(len(ids) + 1):
        assert streamed(codec, ids[:end]) == text.encode()[:end].decode("utf-8", "ignore")


@pytest.mark.parametrize(
    ("data", "expected", "bytes_shown"),
    [
        (b"a\xff", "a�", 2),
        (b"a\x97", "a�", 2),
        (b"a\xe6\x97\xff", "a��", 4),
        (b"a\xff\xe6", "a�", 2),
        (b"a\xed\xa0", "a��", 3),  # the beginning of a surrogate, which is no character
        (b"\xf0\x9f\x99", "", 0),
    ],
)
def test_bytes_that_can_be_no_character_are_shown_at_the_end_as_anywhere(data, expected, bytes_shown):
    codec = TextCodec(byte_level())
    assert streamed(codec, byte_ids(codec._tokenizer, data)) == expected
    codec = TextCodec(sentence_piece())  # its decoder shows no character of a run of bytes with a fault
    assert streamed(codec, byte_ids(codec._tokenizer, data)) == "�" * bytes_shown


def test_a_token_of_a_letter_and_the_beginning_of_a_character_shows_the_letter():
    letters = _byte_letters()
    pieces = [*letters, "a" + letters[0xE6]]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    assert streamed(TextCodec(tokenizer), [256]) == "a"
    assert streamed(TextCodec(tokenizer), [256, 0x97, 0xA5]) == "a日"


def _byte_letters() -> list[str]:
    """The letter of each byte: printable ones for themselves, the others counted up from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


@pytest.mark.parametrize(
    ("make", "tokens", "pieces"),
    [
        (byte_level, ["a", "æĹ", "¥", "b"], ["a", "", "日", "b"]),  # of whose three bytes two are one token
        (sentence_piece, ["▁the", "<end>", "▁the", "s"], ["the", "", " the", "s"]),
    ],
)
def test_a_character_comes_as_soon_as_it_is_whole(make, tokens, pieces):
    tokenizer = make()
    stream = TextStream(TextCodec(tokenizer))
    assert [stream.push(token) for token in ids_of(tokenizer, tokens)] == pieces
    assert stream.flush() == ""


@given(
    text=st.text(min_size=1, max_size=12),
    before=st.text(max_size=6),
    start=st.integers(0, 11),
    make=st.sampled_from([byte_level, sentence_piece]),
)
def test_a_stop_string_may_begin_or_end_between_the_tokens_of_a_character(text, before, start, make):
    tokenizer, stop = make(), text[start % len(text) :]
    said = before + text + "é"
    stream, stops, shown = TextStream(TextCodec(tokenizer)), StopStrings([stop]), ""
    for token in byte_ids(tokenizer, said.encode()):
        shown += stops.push(stream.push(token))
        assert said.startswith(shown)
        if stops.found is not None:
            break
    shown += stops.push(stream.flush()) + stops.flush()
    assert (shown, stops.found) == (said[: said.index(stop)], stop)


# --- prompts ------------------------------------------------------------------------------------------------------
def test_the_tokenizers_own_begin_token_is_the_prompt_of_no_text():
    tokenizer = byte_level()
    end = tokenizer.token_to_id("<end>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", end)])
    codec = TextCodec(tokenizer)
    assert codec.encode("") == [end]
    assert codec.encode("a") == [end, tokenizer.token_to_id("a")]
    assert codec.decode(codec.encode("a")) == "a"


SENTENCE_PIECE = {
    "always": (pre_tokenizers.Metaspace(prepend_scheme="always"), None),
    "first": (pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first")]), None),
    "never": (pre_tokenizers.Metaspace(prepend_scheme="never"), None),
    "normalizer": (None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
    "alone": (pre_tokenizers.Metaspace(prepend_scheme="never"), normalizers.Prepend("▁")),
}


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("form", SENTENCE_PIECE)
def test_pieces_have_the_tokens_of_the_whole_text(form, bos):
    tokenizer = Tokenizer(models.Unigram([(token, -1.0) for token in ("<unk>", "▁", "a", "b")], 0, byte_fallback=False))
    tokenizer.pre_tokenizer, tokenizer.normalizer = SENTENCE_PIECE[form]
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<e>", special=True)])
    tokenizer.add_tokens([AddedToken("<t>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 4)])
    codec = TextCodec(tokenizer)
    pieces = ("a", " a", "b ", "<e>", "<t>a", "b <e> a")
    for first, *later in itertools.product(pieces, repeat=3):
        ids = codec.encode(first)
        for piece in later:
            ids += codec.encode_after(ids, piece)
        assert ids == codec.encode("".join([first, *later])), (first, *later)
    if bos:
        assert codec.encode("") + codec.encode_after(codec.encode(""), "a b") == codec.encode("a b")


def test_a_later_piece_gets_no_space_from_a_byte_level_tokenizer():
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    codec = TextCodec(tokenizer)
    ids = codec.encode("a")
    assert codec.decode([*ids, *codec.encode_after(ids, "b"), *codec.encode_after(ids, " a")]).strip() == "ab a"


REFUSED = [
    (byte_level, "", "the prompt is empty and the tokenizer adds no BOS token"),
    (word_level, "what is statquest?", r"no token covers 'statquest\?'"),
    (characters, "ab xbc", "no token covers 'xbc'"),
    (byte_level, "a\udcff", "not valid UTF-8"),
]


@pytest.mark.parametrize(("make", "text", "words"), REFUSED)
def test_a_prompt_that_has_no_tokens_is_refused(make, text, words):
    with pytest.raises(InputError, match=words):
        TextCodec(make()).encode(text)


def accentless() -> Tokenizer:
    tokenizer = characters()
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=True)
    return tokenizer


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (word_level, "  what   is\tstatquest \n"),
        (lambda: word_level(unknown=True), "what is llama"),
        (sentence_piece, " the cats are 日本 🙂"),
        (byte_level, "\x00 ok \N{COMBINING ACUTE ACCENT} 🙂"),
        (word_piece, "the playing."),
        (accentless, "A\N{COMBINING ACUTE ACCENT}b"),  # text that the normalizer drops is no missing word
    ],
)
def test_text_that_tokens_cover_is_taken(make, text):
    assert TextCodec(make()).encode(text)


def test_a_saved_tokenizer_neither_cuts_nor_pads_a_prompt():
    tokenizer = byte_level()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    assert len(TextCodec(tokenizer).encode("wxyz")) == 4


@pytest.mark.parametrize("content", ["{}", "not json", ""])
def test_a_tokenizer_file_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json is not a tokenizer"):
        TextCodec.from_file(path)


def test_a_continuation_keeps_the_space_that_sentencepiece_drops_where_a_text_begins():
    vocabulary = {"<unk>": 0, "▁Once": 1, "▁time": 2, "ly": 3, "▁": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    codec = TextCodec(tokenizer)
    assert streamed(codec, [2, 3, 1]) == "timely Once"
    for ids, text in (([2, 3, 1], " timely Once"), ([3, 1], "ly Once"), ([4, 2], codec.decode([1, 4, 2])[4:])):
        stream = TextStream(codec, after_text=True)
        assert "".join([*map(stream.push, ids), stream.flush()]) == text


@pytest.mark.parametrize("read", [TextCodec.pieces, lambda codec: codec.decode([0])])
def test_a_decoder_that_panics_is_one_sentence(monkeypatch, read):
    class Panic(BaseException):
        __module__ = "pyo3_runtime"

    class Broken:
        def get_vocab(self, with_added_tokens: bool) -> dict[str, int]:
            return {"a": 0}

        def decode(self, *given: Any, **options: Any) -> str:
            raise Panic("index out of range")

        decode_batch = decode

    codec = TextCodec(byte_level())
    monkeypatch.setattr(codec, "_tokenizer", Broken())
    with pytest.raises(IntegrityError, match=r"at the text of 1 ids \(index out of range\): its decoder is damaged"):
        read(codec)


# --- the bytes of each token, and ids that are exactly a text ---------------------------------------------------------
TEXTS = st.text() | st.text(st.sampled_from(vocabularies.CHARACTERS))


def encoder(make: Callable[[], Tokenizer]) -> tuple[ExactEncoder, list[bytes]]:
    tokenizer = make()
    tokens = token_bytes(TextCodec(tokenizer), tokenizer.get_vocab_size() + 2)
    return ExactEncoder(TextCodec(tokenizer), tokens), tokens


BYTES, PIECES, CHARACTERS = map(encoder, vocabularies.MAKES)


@given(TEXTS | st.just(f"a{vocabularies.END}b"))
def test_the_bytes_of_the_ids_are_the_text(text):
    """Also of a special token that a text writes."""
    for encode, tokens in (BYTES, PIECES):
        assert b"".join(tokens[token] for token in encode(text)).decode() == text


@given(TEXTS)
def test_where_a_character_has_no_token_the_ids_end_before_it(text):
    encode, tokens = CHARACTERS
    told = b"".join(tokens[token] for token in encode(text)).decode()
    assert text.startswith(told)
    assert told == text or text[len(told)] not in vocabularies.CHARACTERS


@pytest.mark.parametrize(
    ("make", "text", "pieces"),
    [
        (PIECES, ' the{"s"', [b" the", b'{"', b"s", b'"']),
        (PIECES, "s the", [b"s", b" the"]),  # no space is put before it
        (BYTES, '{"the":', [b'{"', b"th", b"e", b'":']),
        (BYTES, "", []),
    ],
)
def test_texts_are_split_as_the_tokenizer_splits_them_within_a_text(make, text, pieces):
    encode, tokens = make
    assert [tokens[token] for token in encode(text)] == pieces


@pytest.mark.parametrize(("make", "silent"), [*zip(vocabularies.MAKES, (1, 2, 1), strict=True)])
def test_special_tokens_and_ids_without_a_token_say_nothing(make, silent):
    tokens = encoder(make)[1]
    assert tokens[make().token_to_id(vocabularies.END)] == b""
    assert tokens[-2:] == [b"", b""]
    assert tokens.count(b"") == 2 + silent


def test_a_tokenizer_whose_words_depend_on_one_another_is_refused():
    with pytest.raises(InputError, match="decodes a token differently by its neighbours"):
        encoder(word_piece)
