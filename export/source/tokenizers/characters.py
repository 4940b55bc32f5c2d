"""A list of characters or words -> tokenizer.json: the `stoi` and `itos` of tutorials, or their `token_to_id`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from pastkey.errors import InputError
from pastkey.files.tokenizer_file import require_dense
from pastkey.values import is_int

from .conversion import Conversion

_STOI, _ITOS = "stoi", "itos"
_UNKNOWN = ("<unk>", "<UNK>", "[UNK]", "<|unk|>")  # the token for any other character, if the list has one of them


def from_list(content: Any, name: object) -> Conversion:
    """Converts {"stoi": {...}, "itos": {...}}, one of the two, a list of characters or words, or a string.

    Words if most entries are: texts are split at whitespace then. Names such as <pad> and [UNK] do not count.
    """
    ids = _ids(content, name)
    texts = [text for text in ids if not _is_special(text)]
    words = sum(len(text) > 1 for text in texts) > len(texts) / 2
    if words:
        _require_words(ids, name)
    unknown = next((text for text in _UNKNOWN if text in ids), None)
    # An unk_token outside the vocabulary makes an unknown character or word an error.
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown or _UNKNOWN[0]))
    # Entries of several characters in a list of characters, such as <pad>, are special: no text is encoded to them.
    special = [text for text in ids if (_is_special(text) if words else len(text) > 1)]
    ordinary = {text: number for text, number in ids.items() if text not in special}
    if not ordinary:
        raise InputError(f"{name} has no entry of one character: a list of characters or words was expected")
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # decoded with spaces between them
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    mark = next((text for text in ordinary if words and len(text) == 1 and not text.isalnum()), None)
    told = (
        f"{name} has {mark!r} among its words, and texts are cut only at spaces: a text with {mark!r} right after a "
        "word needs a tokenizers.Tokenizer that cuts there"
    )
    return Conversion(tokenizer, warnings=() if mark is None else (told,))


def _require_words(ids: Mapping[str, int], name: object) -> None:
    spaced = next((text for text in ids if text.split() != [text]), None)
    if spaced is not None:
        raise InputError(
            f"{name} is a list of words, which are read between spaces, and {spaced!r} has a space: give your "
            "own tokenizers.Tokenizer"
        )
    piece = next((text for text in ids if text.startswith(("##", "▁")) or text.endswith("</w>")), None)
    if piece is not None:
        raise InputError(
            f"{name} has pieces of words such as {piece!r}, and not how words are cut into them: give the "
            "tokenizer.json that it is a part of, or a tokenizers.Tokenizer"
        )
    numbers = ids.values()
    gap = next((number for number in range(min(numbers), max(numbers)) if number not in numbers), None)
    if gap is not None:
        raise InputError(f"{name} has ids up to {max(numbers)} and no word for {gap}: give the word of every id")


def is_byte_level(vocabulary: Iterable[object]) -> bool:
    """Whether the tokens write a space as byte-level BPE does: Ġ."""
    return any(isinstance(text, str) and len(text) > 1 and text.startswith("\u0120") for text in vocabulary)


def _is_special(text: str) -> bool:
    return len(text) > 2 and text[0] + text[-1] in ("<>", "[]")


def _ids(content: Any, name: object) -> dict[str, int]:
    """Returns the id of each character, in the order of the ids."""
    if isinstance(content, Mapping) and (_STOI in content or _ITOS in content):
        found = [_one(content[key], name) for key in (_STOI, _ITOS) if key in content]
        if found[0] != found[-1]:
            raise InputError(f"{_STOI} and {_ITOS} of {name} differ: leave out the wrong one")
        return found[0]
    return _one(content, name)


def _one(content: Any, name: object) -> dict[str, int]:
    pairs: list[tuple[Any, Any]]
    if isinstance(content, Mapping):
        pairs = list(content.items())
        if all(isinstance(value, str) for value in content.values()):  # itos: JSON turns its keys into strings
            pairs = [(text, int(key) if isinstance(key, str) and key.isdecimal() else key) for key, text in pairs]
    else:
        pairs = [(text, number) for number, text in enumerate(content)]
    if not all(isinstance(text, str) and text and is_int(number, 0) for text, number in pairs):
        raise InputError(
            f"{name} is not a list of characters or words: expected their ids, whole numbers from 0, as in "
            '{"stoi": {"a": 0, ...}} or {"the": 0, ...}, or them in the order of their ids, ["a", ...] or "a..."'
        )
    ids = dict(sorted(pairs, key=lambda pair: pair[1]))
    require_dense(ids, name)
    of_id: dict[int, str] = {}
    for text, number in pairs:
        if of_id.setdefault(number, text) != text or ids[text] != number:
            raise InputError(
                f"{name} gives {text!r} twice, or one id to {of_id[number]!r} and {text!r}: each needs a separate id"
            )
    if not ids:
        raise InputError(f"{name} is empty: a list of characters or words was expected")
    return ids
