"""Byte-level BPE -> tokenizer.json: GPT-2's encoder.json with vocab.bpe, and tiktoken's Encoding.

Both merge neighbouring pieces of a word's bytes, always the pair that comes first in an order. GPT-2's order is its
list of merges. tiktoken's is the rank of what a pair makes, which is a token: the pair that makes it is found by
letting all earlier tokens work on its bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from pastkey.errors import InputError, MissingFileError
from pastkey.files.folder import read_text
from pastkey.files.tokenizer_file import require_dense

from .conversion import Conversion

END_OF_TEXT = "<|endoftext|>"
MERGES = ("vocab.bpe", "merges.txt")  # beside encoder.json, or vocab.json as transformers calls it
_ENDLESS = 1 << 62  # the rank of a pair that makes no token


# --- GPT-2's two files ----------------------------------------------------------------------------------------------
def from_gpt2(vocabulary: Mapping[str, int], file: Path) -> Conversion:
    """Of `file`, whose content is `vocabulary`, and the merges beside it. Raises MissingFileError or InputError."""
    merges_file = merges_beside(file)
    if merges_file is None:
        raise MissingFileError(
            f"{file} is a vocabulary without its merges: put GPT-2's {' or '.join(MERGES)} beside it"
        )
    lines = [line for line in read_text(merges_file).splitlines() if line and not line.startswith("#version")]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    lacking = [text for pair in merges for text in (*pair, "".join(pair)) if text not in vocabulary]
    if lacking:
        raise InputError(
            f"{merges_file} merges {lacking[0]!r}, which {file} has no id for: the two are of different tokenizers"
        )
    require_dense(vocabulary, file)
    tokenizer = Tokenizer(models.BPE(dict(vocabulary), merges))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    end = vocabulary.get(END_OF_TEXT)
    if end is not None:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}  # the first of two that are the same

    def encode(text: str) -> list[int]:
        pieces = (
            merge(list(word), lambda a, b: ranks.get((a, b), _ENDLESS)) for word, _ in words.pre_tokenize_str(text)
        )
        return [vocabulary[piece] for word in pieces for piece in word]

    byte_of = {character: byte for byte, character in enumerate(_characters())}
    text_of = {number: text for text, number in vocabulary.items()}

    def decode(ids: list[int]) -> str:
        return bytes(byte_of[c] for token in ids for c in text_of[token]).decode(errors="replace")

    bytes_lacking = [character for character in byte_of if character not in vocabulary]
    if bytes_lacking:
        raise InputError(
            f"{file} has no token for {len(bytes_lacking)} of the 256 bytes: it is no byte-level vocabulary"
        )
    return Conversion(tokenizer, encode=encode, decode=decode, bos=end, eos=end)


def merges_beside(file: Path) -> Path | None:
    """GPT-2's list of merges beside its vocabulary."""
    return next((path for name in MERGES if (path := file.with_name(name)).is_file()), None)


# --- tiktoken -------------------------------------------------------------------------------------------------------
def from_tiktoken(encoding: Any) -> Conversion:
    """Of an Encoding, whose ranks, pattern and special tokens are read, and which is asked itself afterwards."""
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    specials: dict[str, int] = encoding._special_tokens
    characters = _characters()

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            pair = merge([token[i : i + 1] for i in range(len(token))], lambda a, b: ranks.get(a + b, _ENDLESS), rank)
            if len(pair) == 2 and all(part in ranks for part in pair):  # others are met as a whole word only
                merges.append((written(pair[0]), written(pair[1])))
    vocabulary = {written(token): rank for token, rank in ranks.items()}
    # A word that is a token is not merged at all.
    tokenizer = Tokenizer(models.BPE(vocabulary | specials, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # What the pattern does not match, tiktoken drops.
            pre_tokenizers.Split(Regex(_for_oniguruma(encoding._pat_str)), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    in_order = sorted(specials, key=lambda text: specials[text])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in in_order])
    end = specials.get(END_OF_TEXT)
    return Conversion(tokenizer, encode=encoding.encode_ordinary, decode=encoding.decode, eos=end)


def _for_oniguruma(pattern: str) -> str:
    r"""A pattern as tokenizers' regular expressions read it.

    There `{1,3}+` is no possessive quantifier but two quantifiers, and ^ and $ match at every line. Where an
    alternative ends, a possessive quantifier is a greedy one; elsewhere it is an atomic group.
    """
    atom = r"(?:\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]|[^\\()\[\]|])"
    pattern = re.sub(rf"({atom})(\{{\d+(?:,\d*)?\}})\+(?=\||\)|$)", r"\1\2", pattern)
    pattern = re.sub(rf"({atom})(\{{\d+(?:,\d*)?\}})\+", r"(?>\1\2)", pattern)
    outside = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|[$^]", re.DOTALL)  # escapes and classes are left as they are
    return outside.sub(lambda found: {"$": r"\z", "^": r"\A"}.get(found[0], found[0]), pattern)


# --- both -----------------------------------------------------------------------------------------------------------
def merge(pieces: list[Any], rank_of: Callable[[Any, Any], int], below: int = _ENDLESS) -> list[Any]:
    """The pieces after every merge whose rank is less than `below`, always that of the lowest rank, from the left."""
    pieces = list(pieces)
    while len(pieces) > 1:
        rank, i = min((rank_of(pieces[i], pieces[i + 1]), i) for i in range(len(pieces) - 1))
        if rank >= below:
            break
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def _characters() -> list[str]:
    """How byte-level BPE writes each byte: the printable ones of Latin-1 as themselves, the others from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256)]
