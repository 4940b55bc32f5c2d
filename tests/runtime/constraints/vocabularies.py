"""Tokenizers of every kind, as a constraint sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pastkey.runtime.constraints.vocabulary import Vocabulary
from pastkey.runtime.text.codec import TextCodec

END = "<end>"
CHARACTERS = ' !"#,-.0123456789:ABE[\\]_abcdefghijklmnopqrstuvwxyz{}é日'


def byte_level() -> Tokenizer:
    """A token for each byte, a few merges, an EOS token."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("Ġ", "th"), ("{", '"'), ('"', ":"), ("a", "b"), ("æ", "Ĺ")]  # the last: two bytes of 日
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Words with their space in front, bytes for the rest: the way of Llama's vocabulary and llama2.c's."""
    letters, merges = ["▁", *'{":thesab'], [("h", "e"), ("▁", "t"), ("▁t", "he"), ("{", '"'), ('"', ":"), ("a", "b")]
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *(left + right for left, right in merges)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in (END, "<unk>")])
    return tokenizer


def characters(letters: Sequence[str] = CHARACTERS) -> Tokenizer:
    """A token for each character, as `pastkey train --tokenizer char` makes them."""
    vocabulary = {text: i for i, text in enumerate([END, *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


def word_piece() -> Tokenizer:
    words = ["<unk>", "play", "##ing", "##s", ".", "the", END]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


MAKES: list[Callable[[], Tokenizer]] = [byte_level, sentence_piece, characters]


def vocabulary_of(tokenizer: Tokenizer, extra: int = 3) -> Vocabulary:
    """With the logits `extra` wider than the tokenizer, as padded vocabularies are."""
    (end,) = (token for name, (token, _) in TextCodec(tokenizer).added_tokens.items() if name == END)
    return Vocabulary.of(TextCodec(tokenizer), tokenizer.get_vocab_size() + extra, {end})
