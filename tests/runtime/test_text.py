from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pastkey.errors import InputError, IntegrityError
from pastkey.runtime.text import StopStrings, TextCodec, TextStream

ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def byte_level() -> Tokenizer:
    """One token per byte, two merges, an end token."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(ALPHABET))}
    merges = [("t", "h"), ("Ġ", "th")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Words with their space in front, bytes for what is in no word: the way of Llama's vocabulary."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁cat", "s", "▁▁", "�", "<end>"]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return tokenizer


def word_level(*, unknown: bool = False) -> Tokenizer:
    words = ["what", "is", "statquest", "awesome", "<EOS>"] + ["<unk>"] * unknown
    model = models.WordLevel({word: i for i, word in enumerate(words)}, **({"unk_token": "<unk>"} if unknown else {}))
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<EOS>", special=True)])
    return tokenizer


def characters() -> Tokenizer:
    return Tokenizer(models.BPE({letter: i for i, letter in enumerate("abc é日")}, []))


def word_piece() -> Tokenizer:
    words = ["<unk>", "play", "##ing", "##s", ".", "the"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


ALL = [byte_level, sentence_piece, word_level, characters, word_piece]


# --- streams ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", ALL)
def test_the_pieces_of_any_ids_are_together_their_text(make: object) -> None:
    tokenizer = make()
    codec = TextCodec(tokenizer)

    @given(ids=st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=30))
    def check(ids: list[int]) -> None:
        stream = TextStream(codec)
        pieces = [stream.push(token) for token in ids]
        assert "".join([*pieces, stream.flush()]) == codec.decode(ids)

    check()


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@given(data=st.binary(max_size=20))
def test_the_pieces_of_any_bytes_are_together_their_text(make: object, data: bytes) -> None:
    tokenizer = make()
    byte_names = [f"<0x{byte:02X}>" for byte in data] if make is sentence_piece else []
    by_byte = dict(zip(range(256), _byte_letters(), strict=True))
    ids = [tokenizer.token_to_id(name) for name in byte_names or [by_byte[byte] for byte in data]]
    codec = TextCodec(tokenizer)
    stream = TextStream(codec)
    assert "".join([*map(stream.push, ids), stream.flush()]) == codec.decode(ids)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte: printable ones for themselves, the others counted up from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


@given(text=st.text(max_size=12))
def test_streamed_text_comes_in_whole_characters(text: str) -> None:
    codec = TextCodec(byte_level())
    stream = TextStream(codec)
    for token in codec._tokenizer.encode(text).ids:
        piece = stream.push(token)
        assert "�" not in piece or "�" in text


def test_a_character_comes_as_soon_as_it_is_whole() -> None:
    codec = TextCodec(byte_level())
    stream = TextStream(codec)
    pieces = [stream.push(token) for token in codec.encode("a日b")]
    assert pieces == ["a", "", "", "日", "b"]
    assert stream.flush() == ""


def test_a_space_between_words_is_kept() -> None:
    tokenizer = sentence_piece()
    stream = TextStream(TextCodec(tokenizer))
    ids = [tokenizer.token_to_id(token) for token in ("▁the", "<end>", "▁cat", "s")]
    assert [stream.push(token) for token in ids] == ["the", "", " cat", "s"]


# --- stop strings -------------------------------------------------------------------------------------------------
def cut(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    stream = StopStrings(stops)
    out = "".join([*map(stream.push, pieces), stream.flush()])
    return out, stream.found


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["one\n", "two"], ["\n"], ("one", True)),
        (["ab", "ac", "d"], ["aa"], ("abacd", False)),
        (["a", "a", "a", "b"], ["aab"], ("a", True)),
        (["xEN", "D", "y"], ["END"], ("x", True)),
        (["xEN", "d"], ["END"], ("xENd", False)),
        (["xEN"], ["END"], ("xEN", False)),
        (["abcd"], ["cd", "bc"], ("a", True)),
        (["abc"], [], ("abc", False)),
        (["END"], ["END"], ("", True)),
    ],
)
def test_text_ends_before_the_first_stop_string(
    pieces: list[str], stops: list[str], expected: tuple[str, bool]
) -> None:
    assert cut(pieces, stops) == expected


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_how_text_is_cut_into_pieces_does_not_matter_where_one_stop_string_is_no_part_of_another(
    pieces: list[str], stops: list[str]
) -> None:
    text = "".join(pieces)
    out, found = cut(pieces, stops)
    assert found == any(stop in text for stop in stops)
    if not found:
        assert out == text
    elif not any(a != b and a in b for a in stops for b in stops):
        assert out == text[: min(text.find(stop) for stop in stops if stop in text)]


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = StopStrings(["END"])
    assert [stream.push(piece) for piece in ("abE", "N", "x", "y")] == ["ab", "", "ENx", "y"]


# --- prompts ------------------------------------------------------------------------------------------------------
def test_what_is_encoded_is_decoded() -> None:
    codec = TextCodec(byte_level())
    text = "the cat\n日本 ✓ \t é"
    assert codec.decode(codec.encode(text)) == text


def test_the_tokenizers_own_begin_token_is_the_prompt_of_no_text() -> None:
    tokenizer = byte_level()
    end = tokenizer.token_to_id("<end>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", end)])
    codec = TextCodec(tokenizer)
    assert codec.encode("") == [end]
    assert codec.encode("a")[0] == end
    assert codec.decode(codec.encode("a")) == "a"


def test_an_empty_prompt_without_begin_token_is_refused() -> None:
    with pytest.raises(InputError, match="the prompt is empty and the tokenizer adds no begin token"):
        TextCodec(byte_level()).encode("")


@pytest.mark.parametrize(
    ("make", "text", "word"),
    [
        (word_level, "what is llama", "'llama'"),
        (word_level, "what is statquest?", "'statquest\\?'"),
        (characters, "ab xbc", "'xbc'"),
        (characters, "zab", "'zab'"),
    ],
)
def test_a_word_without_token_is_named(make: object, text: str, word: str) -> None:
    with pytest.raises(InputError, match=f"no token covers {word}"):
        TextCodec(make()).encode(text)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (word_level, "  what   is\tstatquest \n"),
        (lambda: word_level(unknown=True), "what is llama"),
        (sentence_piece, " the cats are 日本 🙂"),
        (byte_level, "\x00 ok \N{COMBINING ACUTE ACCENT} 🙂"),
        (word_piece, "the playing."),
    ],
)
def test_text_that_tokens_cover_is_taken(make: object, text: str) -> None:
    assert TextCodec(make()).encode(text)


def test_accents_that_the_normalizer_drops_are_no_missing_words() -> None:
    tokenizer = characters()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    assert TextCodec(tokenizer).encode("A\N{COMBINING ACUTE ACCENT}b")


def test_text_that_is_no_utf8_is_refused() -> None:
    with pytest.raises(InputError, match="not valid UTF-8"):
        TextCodec(byte_level()).encode("a\udcff")


def test_a_saved_tokenizer_neither_cuts_nor_pads_a_prompt() -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    assert len(TextCodec(tokenizer).encode("abcd")) == 4


@pytest.mark.parametrize("content", ["{}", "not json", ""])
def test_a_tokenizer_file_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json is not a tokenizer"):
        TextCodec.from_file(path)


def test_a_continuation_keeps_the_space_that_sentencepiece_drops_where_a_text_begins() -> None:
    vocabulary = {"<unk>": 0, "▁Once": 1, "▁time": 2, "ly": 3, "▁": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    codec = TextCodec(tokenizer)

    def streamed(ids: list[int], **options: bool) -> str:
        stream = TextStream(codec, **options)
        return "".join([*(stream.push(token) for token in ids), stream.flush()])

    assert streamed([2, 3, 1]) == "timely Once"
    assert streamed([2, 3, 1], after_text=True) == " timely Once"
    assert streamed([3, 1], after_text=True) == "ly Once"
    assert streamed([4, 2], after_text=True) == codec.decode([1, 4, 2])[len("Once") :]
