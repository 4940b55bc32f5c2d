"""Encodes message contents as plain text: a user's <|im_end|> is ten characters and does not end the message.

A template writes contents and its own control tokens into one text, where both look alike. `protect` puts separators
between the letters of control tokens in contents. The whole control tokens in the rendering are then the template's
own: `encode` renames them to unused names, removes the separators, and encodes with a copy of the tokenizer that knows
the control tokens only by these names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from tokenizers import Tokenizer

from pastkey.errors import InputError
from pastkey.files.tokenizer_file import open_tokenizer

from .codec import TextCodec

_SEPARATOR, _NAME = "\ufdd0", "\ufdd1"  # noncharacters of Unicode
_PRIVATE = 0xF0000  # private use: one letter for each control token, between two of _NAME
_MARK = re.compile(r"[<\[].*[>\]]", re.DOTALL)


class PlainContents:
    """Protects contents, and encodes renderings of them."""

    def __init__(self, codec: TextCodec) -> None:
        """Raises InputError for a tokenizer whose control tokens cannot be told from text."""
        added = codec.added_tokens
        # Added tokens that look like marks, such as <tool_call>, are control tokens even if they are not special.
        controls = {text: token for text, (token, special) in added.items() if special or _MARK.fullmatch(text)}
        self._names = {text: f"{_NAME}{chr(_PRIVATE + i)}{_NAME}" for i, text in enumerate(sorted(controls))}
        longest_first = sorted(map(re.escape, controls), key=len, reverse=True)
        self._controls = re.compile("|".join(longest_first) or "(?!)")
        self._codec = _renamed(codec, controls, self._names)

    def protect(self, value: Any, but: Collection[str] = ()) -> Any:
        """A copy of a message or JSON value that `encode` reads as plain text, except the values of keys `but`."""
        if isinstance(value, str):
            clean = value.replace(_SEPARATOR, "").replace(_NAME, "")
            return self._controls.sub(lambda found: _SEPARATOR.join(found[0]) + _SEPARATOR, clean)
        if isinstance(value, Mapping):
            return {key: item if key in but else self.protect(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(item, but) for item in value]
        return value

    def encode(self, rendered: str) -> list[int]:
        """The ids of a rendering. Raises InputError as `TextCodec.encode` does."""
        named = self._controls.sub(lambda found: self._names[found[0]], rendered)
        return self._codec.encode(named.replace(_SEPARATOR, ""), add_special_tokens=False)


def _renamed(codec: TextCodec, controls: Mapping[str, int], new: Mapping[str, str]) -> TextCodec:
    """A copy of the tokenizer that has the control tokens under new names, with the same ids."""
    content = json.loads(codec.to_json())
    for token in content["added_tokens"]:
        token["content"] = new.get(token["content"], token["content"])
    model = content["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {new.get(text, text): token for text, token in model["vocab"].items()}
    elif isinstance(model.get("vocab"), list):
        model["vocab"] = [[new.get(text, text), score] for text, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = new.get(model["unk_token"], model["unk_token"])
    try:
        tokenizer = open_tokenizer(Tokenizer, json.dumps(content).encode(), "the tokenizer with other names")
        found = {text: tokenizer.token_to_id(name) for text, name in new.items()}
    except Exception:  # the library raises nothing more specific
        found = {}
    if found != dict(controls):
        raise InputError(
            "this tokenizer's special tokens cannot be told from text: leave special_tokens_as_text out, and refuse "
            "texts that write them"
        )
    return TextCodec(tokenizer)
