"""The bytes that each token adds to a text, and an encoder whose tokens add exactly a text's bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pastkey.errors import InputError

from .codec import TextCodec


def token_bytes(codec: TextCodec, size: int) -> list[bytes]:
    """The bytes that each id below `size` adds to a text; b"" for special tokens and ids without a token.

    Raises InputError if they depend on neighbouring tokens, as with a decoder that puts spaces between words.
    """
    shown = [token for token in range(size) if codec.has_text(token)]
    byte_level = '"ByteLevel"' in json.dumps(json.loads(codec.to_json())["decoder"])
    plain = [token for token in shown if not codec.is_byte(token)]
    found = [b""] * size
    if byte_level:
        for token in shown:
            found[token] = codec.bytes_of(token)
    else:
        anchor = next((token for token in plain if codec.decode([token]).strip()), None)
        before = "" if anchor is None else codec.decode([anchor])
        for token in shown:
            found[token] = (
                codec.bytes_of(token)
                if anchor is None or codec.is_byte(token)
                else codec.decode([anchor, token])[len(before) :].encode()
            )
    together = b"".join(found[token] for token in plain).decode(errors="replace")
    told = codec.decode(plain)
    apart = byte_level or all(_stands_alone(codec, token, found[token].decode(errors="replace")) for token in plain)
    if told.lstrip(" ") != together.lstrip(" ") or not apart:
        raise InputError(
            "this bundle's tokenizer decodes a token differently by its neighbours, as one of whole words does, "
            "so that no schema or grammar can say which token may follow: check the text after it is generated"
        )
    return found


def _stands_alone(codec: TextCodec, token: int, text: str) -> bool:
    """Whether a token has the same text at the start of a text, up to the space that SentencePiece drops there."""
    alone = codec.pieces()[token]
    return text == alone or (codec.begins_word(token) and text == " " + alone)


class ExactEncoder:
    """Encodes text within a sequence: the bytes of the ids are exactly the text's, without a leading space."""

    def __init__(self, codec: TextCodec, tokens: Sequence[bytes]) -> None:
        """`tokens`: the bytes that each id adds, from `token_bytes`."""
        self._codec, self._tokens = codec, tokens
        self._ids = {text: token for token, text in reversed(list(enumerate(tokens))) if text}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """The ids of a text, split as the tokenizer does if possible, else by longest match up to the first gap."""
        wanted = text.encode()
        for before in ("", "\n"):  # a tokenizer that adds a leading space adds it before the line break
            ids = self._end_of(before + text, wanted)
            if ids is not None:
                return ids
        return self._longest_first(wanted)

    def _end_of(self, text: str, wanted: bytes) -> list[int] | None:
        """The last ids of a text if their bytes are exactly `wanted`, else None."""
        try:
            ids = self._codec.encode(text, add_special_tokens=False)
        except InputError:
            return None
        left = sum(len(self._tokens[token]) for token in ids) - len(wanted)
        for place, token in enumerate(ids):
            if not left:
                return ids[place:] if b"".join(self._tokens[token] for token in ids[place:]) == wanted else None
            left -= len(self._tokens[token])
        return None

    def _longest_first(self, wanted: bytes) -> list[int]:
        ids, place = [], 0
        while place < len(wanted):
            for length in range(min(self._longest, len(wanted) - place), 0, -1):
                token = self._ids.get(wanted[place : place + length])
                if token is not None:
                    break
            else:
                break
            ids.append(token)
            place += length
        return ids
