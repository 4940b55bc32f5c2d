"""A tokenizer converted to tokenizer.json, and the check that both encode the same texts to the same ids."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from pastkey.errors import InputError

CHECKED = 200  # texts that both must encode and decode equally

# Parts of the sample texts: kinds of characters that tokenizers treat differently. Names of special tokens are not
# among them: a tokenizer.json finds these in a text, and most originals read them as ordinary text.
_PARTS = (
    "the", "Hello", "world", "don't", "I'LL", "snake_case", "camelCase", "HTTP", "x=1;", "(a+b)*c", "...", "?!", "--",
    "'s", "0", "7", "42", "1234567", "3.14", "1,000", "½", "²", "①",
    "é", "naïve", "Größe", "e\u0301", "ﬁ", "\uff26\uff55", "İ",
    "\u017f", "Ελλάδα", "Привет", "שלום", "مرحبا", "हिन्दी", "ไทย",
    "日本語", "한국어", "中文。", "🙂", "👩‍👩‍👧", "🇩🇪", "—", "“q”", "€", "\u200b", "\ufeff", "\U0001d518", "#",
)  # fmt: skip
_SPACES = ("", "", " ", " ", " ", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n ", "\u00a0", "\u3000")


@dataclass(frozen=True)
class Conversion:
    """A converted tokenizer and its original."""

    tokenizer: Tokenizer
    encode: Callable[[str], list[int]] | None = None  # the original's; None if it is not available
    decode: Callable[[list[int]], str] | None = None  # the original's, if it has one
    not_decoded: frozenset[int] = frozenset()  # ids whose text is only for display
    bos: int | None = None
    eos: int | None = None
    warnings: tuple[str, ...] = field(default=())

    def fields(self, name: object) -> dict[str, Any]:
        """Returns a Source's fields. Raises InputError with the first text that the two treat differently."""
        self._check(name)
        config: dict[str, Any] = {"clean_up_tokenization_spaces": False, "add_bos_token": False}
        for key, token in (("bos_token", self.bos), ("eos_token", self.eos)):
            if token is not None:
                config[key] = self.tokenizer.id_to_token(token)
        return {
            "tokenizer": self.tokenizer.to_str().encode(),
            "tokenizer_config": config,
            "bos_token_id": self.bos,
            "eos_token_ids": () if self.eos is None else (self.eos,),
            "warnings": self.warnings,
        }

    def _check(self, name: object) -> None:
        if self.encode is None:
            return
        for text in sample_texts():
            expected = list(self.encode(text))
            found = self.tokenizer.encode(text).ids
            if found != expected:
                raise InputError(
                    f"the tokenizer.json made of {name} gives the ids {_short(found)} for {text!r}, and {name} itself "
                    f"{_short(expected)}: pastkey cannot convert it, give a tokenizer.json that you made"
                )
            if self.decode is None or not self.not_decoded.isdisjoint(expected):
                continue
            if (back := self.tokenizer.decode(expected)) != (original := self.decode(expected)):
                raise InputError(
                    f"the tokenizer.json made of {name} decodes the ids {_short(expected)} to {back!r}, and {name} "
                    f"itself to {original!r}: pastkey cannot convert it, give a tokenizer.json that you made"
                )


def sample_texts() -> list[str]:
    """Returns the same CHECKED texts each time: the empty one, each part, each space around a part, mixtures."""
    choose = random.Random(0)
    texts = ["", *_PARTS, *(f"{space}{_PARTS[0]}{space}" for space in _SPACES)][: CHECKED // 2]
    while len(texts) < CHECKED:
        length = choose.randint(1, 12)
        texts.append("".join(choose.choice(_SPACES) + choose.choice(_PARTS) for _ in range(length)))
    return texts


def _short(ids: list[int], longest: int = 8) -> str:
    return str(ids) if len(ids) <= longest else f"[{', '.join(map(str, ids[:longest]))}, ...] ({len(ids)} of them)"
