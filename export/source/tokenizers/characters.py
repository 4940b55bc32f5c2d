"""A list of characters -> tokenizer.json: the `stoi` and `itos` of tutorials."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from pastkey.errors import InputError
from pastkey.files.tokenizer_file import require_dense
from pastkey.values import is_int

from .conversion import Conversion, sample_texts

_STOI, _ITOS = "stoi", "itos"
_UNKNOWN = ("<unk>", "<UNK>", "[UNK]")  # the token for any other character, if the list has one of them


def from_characters(content: Any, file: Path) -> Conversion:
    """Converts {"stoi": {...}, "itos": {...}}, one of the two, a list of characters, or a string of them."""
    ids = _ids(content, file)
    one_by_one = {text: number for text, number in ids.items() if len(text) == 1}
    unknown = next((name for name in _UNKNOWN if name in ids), None)
    # An unk_token outside the vocabulary makes an unknown character an error.
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown or _UNKNOWN[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # Entries of several characters, such as <pad>, are special tokens: no text is encoded to them.
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ids if len(text) > 1])
    characters = {number: text for text, number in one_by_one.items()}
    return Conversion(
        tokenizer,
        encode=lambda text: [one_by_one[character] for character in text],
        decode=lambda tokens: "".join(characters[token] for token in tokens),
        texts=sample_texts(list(one_by_one), [""]),
    )


def _ids(content: Any, file: Path) -> dict[str, int]:
    """Returns the id of each character, in the order of the ids."""
    if isinstance(content, Mapping) and (_STOI in content or _ITOS in content):
        found = [_one(content[key], file) for key in (_STOI, _ITOS) if key in content]
        if found[0] != found[-1]:
            raise InputError(f"{_STOI} and {_ITOS} of {file} do not say the same: leave out the one that is wrong")
        return found[0]
    return _one(content, file)


def _one(content: Any, file: Path) -> dict[str, int]:
    pairs: list[tuple[Any, Any]]
    if isinstance(content, Mapping):
        pairs = list(content.items())
        if all(isinstance(value, str) for value in content.values()):  # itos: JSON turns its keys into strings
            pairs = [(text, int(key) if key.isdecimal() else key) for key, text in pairs]
    else:
        pairs = [(text, number) for number, text in enumerate(content)]
    if not all(isinstance(text, str) and text and is_int(number, 0) for text, number in pairs):
        raise InputError(
            f"{file} is not a list of characters: expected their ids, "
            '{"stoi": {"a": 0, ...}}, or the characters in the order of their ids, ["a", ...] or "a..."'
        )
    ids = dict(sorted(pairs, key=lambda pair: pair[1]))
    require_dense(ids, file)
    if not ids or len(ids) != len(pairs) or len(set(ids.values())) != len(ids):
        raise InputError(
            f"{file} is empty, or gives a character twice or two characters one id: each has an id of its own"
        )
    if not any(len(text) == 1 for text in ids):
        raise InputError(f"{file} has no entry of one character: a list of characters was expected")
    return ids
