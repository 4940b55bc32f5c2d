"""Byte-level BPE -> tokenizer.json: GPT-2's encoder.json with vocab.bpe, and tiktoken's Encoding.

Both merge neighbouring pieces of a word's bytes, the pair that ranks first each time. GPT-2 ranks pairs by its list of
merges, tiktoken by the rank of the token that a pair makes. Applying all lower-ranked tokens to a token's bytes finds
the pair that makes it.
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
MERGES = ("vocab.bpe", "merges.txt")  # next to encoder.json, or vocab.json as transformers calls it
_ENDLESS = 1 << 62  # the rank of a pair that makes no token


# --- GPT-2's two files ----------------------------------------------------------------------------------------------
def from_gpt2(vocabulary: Mapping[str, int], file: Path) -> Conversion:
    """Converts `file`, its content `vocabulary`, and the merges next to it. Raises MissingFileError or InputError."""
    merges_file = merges_beside(file)
    if merges_file is None:
        raise MissingFileError(
            f"{file} is a vocabulary without its merges: put GPT-2's {' or '.join(MERGES)} next to it"
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
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = vocabulary.get(END_OF_TEXT)
    if end is not None:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    bytes_lacking = [character for character in _characters() if character not in vocabulary]
    if bytes_lacking:
        raise InputError(
            f"{file} has no token for {len(bytes_lacking)} of the 256 bytes: it is not a byte-level vocabulary"
        )
    return Conversion(tokenizer, bos=end, eos=end)


def merges_beside(file: Path) -> Path | None:
    """Returns the file of GPT-2's merges next to its vocabulary."""
    return next((path for name in MERGES if (path := file.with_name(name)).is_file()), None)


# --- tiktoken -------------------------------------------------------------------------------------------------------
def from_tiktoken(encoding: Any) -> Conversion:
    """Converts an Encoding by its ranks, pattern and special tokens. The conversion is compared with it afterwards."""
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    specials: dict[str, int] = encoding._special_tokens
    characters = _characters()

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            pair = merge([token[i : i + 1] for i in range(len(token))], lambda a, b: ranks.get(a + b, _ENDLESS), rank)
            if len(pair) == 2 and all(part in ranks for part in pair):  # others match only as a whole word
                merges.append((written(pair[0]), written(pair[1])))
    vocabulary = {written(token): rank for token, rank in ranks.items()}
    # A word that is a token is not merged.
    tokenizer = Tokenizer(models.BPE(vocabulary | specials, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # tiktoken drops text that the pattern does not match.
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
    r"""Translates a pattern for the regular expressions of tokenizers.

    There, `{1,3}+` is two quantifiers instead of a possessive one, and ^ and $ match at every line. At the end of an
    alternative, a greedy quantifier replaces a possessive one; elsewhere an atomic group does.
    """
    atom = r"(?:\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]|[^\\()\[\]|])"
    pattern = re.sub(rf"({atom})(\{{\d+(?:,\d*)?\}})\+(?=\||\)|$)", r"\1\2", pattern)
    pattern = re.sub(rf"({atom})(\{{\d+(?:,\d*)?\}})\+", r"(?>\1\2)", pattern)
    outside = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|[$^]", re.DOTALL)  # escapes and classes do not change
    return outside.sub(lambda found: {"$": r"\z", "^": r"\A"}.get(found[0], found[0]), pattern)


# --- both -----------------------------------------------------------------------------------------------------------
def merge(pieces: list[Any], rank_of: Callable[[Any, Any], int], below: int = _ENDLESS) -> list[Any]:
    """Returns the pieces after every merge ranked less than `below`, the lowest rank first, from the left."""
    pieces = list(pieces)
    while len(pieces) > 1:
        rank, i = min((rank_of(pieces[i], pieces[i + 1]), i) for i in range(len(pieces) - 1))
        if rank >= below:
            break
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def _characters() -> list[str]:
    """Returns byte-level BPE's character for each byte: printable Latin-1 as itself, the others from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256)]
