"""Encodes text to tokens and decodes tokens to text. Streamed text comes in whole characters."""

from __future__ import annotations

import codecs
import functools
import itertools
import json
import re
import string
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError, first_line
from pastkey.files.reading import NativeError, is_panic, panics_as_errors, read_bytes
from pastkey.files.tokenizer_file import MOST_BYTES, open_tokenizer, require_dense
from pastkey.values import shown

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # decoded from bytes of invalid UTF-8
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_HEX = string.hexdigits
# Single-byte tokens of vocabularies with byte fallback.
_BYTE_TOKENS = {f"<0x{high}{low}>": int(high + low, 16) for high in _HEX for low in _HEX}
# Letters for bytes in byte-level vocabularies: printable bytes as themselves, the others numbered from 256.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}


class TextCodec:
    """A bundle's tokenizer.json.

    `encode` returns the complete prompt: the tokenizer's post-processor adds the BOS token if it has one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # A saved tokenizer may truncate or pad, which a prompt must not.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._pieces: list[str] | None = None
        self._byte_level: bool | None = None
        # Whether the text of ids is that of each, joined, where each has whole characters.
        self.joins = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._alone: dict[tuple[int, bool], str] = {}  # (token, whether special tokens are shown) -> its own text
        self._named: set[int] = set()  # tokens that are known to have a text
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        named = ((tokenizer.token_to_id(token), byte) for token, byte in _BYTE_TOKENS.items())
        self._bytes = {token: byte for token, byte in named if token is not None}

    @property
    def added_tokens(self) -> dict[str, tuple[int, bool]]:
        """The added tokens, which are matched as a whole: text -> (id, whether it is special)."""
        return {token.content: (i, token.special) for i, token in self._tokenizer.get_added_tokens_decoder().items()}

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        require_dense(self._tokenizer.get_vocab(), names.TOKENIZER)
        return str(self._tokenizer.to_str())

    @classmethod
    def from_file(cls, path: Path) -> TextCodec:
        """Reads tokenizer.json. Raises IntegrityError for an invalid file."""
        return cls(open_tokenizer(Tokenizer, read_bytes(path, MOST_BYTES), path))

    @functools.cached_property
    def _without_prefix(self) -> TextCodec:
        """The codec without the space that SentencePiece puts before a text."""
        parts = ((name, getattr(self._tokenizer, name)) for name in ("normalizer", "pre_tokenizer"))
        given = {name: json.loads(part.__getstate__()) for name, part in parts if part is not None}
        changed = {name: next(iter(_without_spaces([part])), None) for name, part in given.items()}
        if changed == given:
            return self
        content = json.dumps({**json.loads(self.to_json()), **changed})
        return TextCodec(open_tokenizer(Tokenizer, content.encode(), "the tokenizer without its first space"))

    def encode_after(self, ids: Sequence[int], text: str) -> list[int]:
        """The ids of a text that continues `ids`, as they would be in one text, but for merges across the join."""
        added = self._tokenizer.get_added_tokens_decoder()
        if list(ids) == self._tokenizer.encode("").ids:  # none, or the BOS token
            return self.encode(text, add_special_tokens=False)
        if ids[-1] in added:  # some tokenizers put a space behind special tokens
            return self.encode(added[ids[-1]].content + text, add_special_tokens=False)[1:]
        own = self._without_prefix.encode(text, add_special_tokens=False)
        if not (special := added.keys() & own) or self._without_prefix is self:
            return own
        whole = self.encode(text, add_special_tokens=False)
        first, same = (next(i for i, token in enumerate(found) if token in special) for found in (own, whole))
        return [*own[:first], *whole[same:]]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a prompt. Raises InputError if there are none or a word has no token.

        `add_special_tokens=False` is for text with its own BOS token, as chat templates write it.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError("the text is not valid UTF-8: pass it in that encoding") from None
        try:
            with panics_as_errors():
                # A batch of one: `encode` holds the GIL, for seconds where the text is a book.
                (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
            unknown = _uncovered_word(text, encoding.offsets)
        except NativeError as error:
            raise InputError(f"the tokenizer fails at this text ({error}): give another text") from None
        except Exception:  # a word-level vocabulary without an unknown token; the library does not name the word
            unknown = next((word for word in text.split() if not self._encodes(word)), text)
        if unknown is not None:
            raise InputError(
                f"no token covers {shown(unknown)}: this model's vocabulary is made of other words or characters"
            )
        if not encoding.ids:
            raise InputError("the prompt is empty and the tokenizer adds no BOS token: give at least one word")
        return list(encoding.ids)

    def decode(self, ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """The text of ids, by default without special tokens."""
        try:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=not keep_special_tokens))
        except BaseException as error:  # inlines `panics_as_errors`, since this runs once or twice per token
            if is_panic(error):
                raise _damaged_decoder(len(ids), NativeError(first_line(error))) from None
            raise

    def decode_known(self, ids: Sequence[int], *, keep_special_tokens: bool) -> str:
        """As `decode`, with a cache for single tokens."""
        if len(ids) != 1:
            return self.decode(ids, keep_special_tokens=keep_special_tokens)
        key = ids[0], keep_special_tokens
        if key not in self._alone:
            self._alone[key] = self.decode(ids, keep_special_tokens=keep_special_tokens)
        return self._alone[key]

    def vocabulary(self) -> dict[str, int]:
        """The vocabulary including added tokens: text -> id."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def pieces(self) -> list[str]:
        """The text of each single token by id; "" for ids without text. Cached."""
        if self._pieces is None:
            ids = range(max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1)
            try:
                with panics_as_errors():
                    found = self._tokenizer.decode_batch([[token] for token in ids], skip_special_tokens=False)
            except NativeError as error:
                raise _damaged_decoder(len(ids), error) from None
            self._pieces = list(found)
        return self._pieces

    def has_text(self, token: int, *, keep_special_tokens: bool = False) -> bool:
        """Whether `decode` shows a token."""
        if token not in self._named:
            if self._tokenizer.id_to_token(token) is None:
                return False
            self._named.add(token)  # asked behind a run, the library needs 9 us
        return keep_special_tokens or token not in self._special

    def is_byte(self, token: int) -> bool:
        """Whether a token is a single byte, whose character depends on its neighbours."""
        return token in self._bytes

    def begun(self, ids: Sequence[int]) -> int:
        """Number of bytes at the end of `ids` that form an incomplete character."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(map(self.bytes_of, ids)))
        begun = decoder.getstate()[0]
        # The decoder also waits for the third byte of a surrogate, which is not a character.
        return len(begun) if len(begun.decode("utf-8", "replace")) == 1 else 0

    def begins_word(self, token: int) -> bool:
        """Whether a token includes a leading space, which SentencePiece's decoder drops at the start of a text."""
        return (self._tokenizer.id_to_token(token) or "").startswith(_SPACE)

    def loses_space(self, token: int) -> bool:
        """Whether decoding drops the token's leading space at the start of a text."""
        return self.begins_word(token) and not self.decode([token]).startswith(" ")

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token in a byte-level vocabulary or one with byte fallback."""
        if token in self._bytes:
            return bytes([self._bytes[token]])
        piece = self._tokenizer.id_to_token(token) or ""
        try:
            return bytes(_BYTE_OF[letter] for letter in piece)
        except KeyError:
            return piece.encode()

    def written(self, token: int) -> bytes:
        """The bytes that a token adds to a text, for a program that shows single tokens; its name if it is special."""
        if self._byte_level is None:
            decoder = json.loads(self._tokenizer.to_str())["decoder"]
            self._byte_level = '"ByteLevel"' in json.dumps(decoder)
        if self._byte_level or self.is_byte(token):
            return self.bytes_of(token)
        return (self._tokenizer.id_to_token(token) or "").replace(_SPACE, " ").encode()

    def _encodes(self, word: str) -> bool:
        try:
            with panics_as_errors():
                return bool(self._tokenizer.encode(word, add_special_tokens=False).ids)
        except Exception:
            return False


class TextStream:
    """Decodes token by token. The texts of all `push` calls and the final `flush` together equal `decode` of all ids.

    The only difference: an incomplete character at the end is left out, where `decode` returns U+FFFD.

    `after_text`: the output continues a text, so the leading space of its first word is kept.
    `keep_special_tokens`: shows special tokens by their texts, as `decode` does.

    An incomplete character is held back. Each call decodes only a short window of ids: those since the last complete
    character, after the ids before them, which decide about the space between words.
    """

    def __init__(self, codec: TextCodec, *, after_text: bool = False, keep_special_tokens: bool = False) -> None:
        self._codec = codec
        self._keep = keep_special_tokens
        self._after_text = after_text
        self._context: list[int] = []  # last ids whose text was returned
        self._before: str | None = None  # text of `_context`, computed on demand
        self._window: list[int] = []  # ids after `_context`
        self._emitted = 0  # number of characters of the window's text that were returned

    def push(self, token: int) -> str:
        """Adds the next token; returns the new text that later tokens cannot change, or ""."""
        if not self._codec.has_text(token, keep_special_tokens=self._keep):
            return ""
        self._window.append(token)
        if self._after_text:
            self._after_text = False
            if self._codec.loses_space(token):
                return " " + self._certain(token)
        return self._certain(token)

    def _certain(self, token: int) -> str:
        """The new final text after `token`, the last of the window."""
        if self._codec.is_byte(token):
            return ""  # another byte may change the meaning of the whole run of bytes
        text = self._text()
        whole = len(text) - text.endswith(REPLACEMENT)  # the last character may be incomplete
        new = text[self._emitted : whole]
        self._emitted = max(self._emitted, whole)
        if text and whole == len(text):
            self._context, self._before = ([], "") if self._codec.joins else (self._window, None)
            self._window, self._emitted = [], 0
        return new

    def flush(self) -> str:
        """Returns the text that was held back. No token may follow."""
        codec = self._codec
        run = list(itertools.takewhile(codec.is_byte, reversed(self._window)))[::-1]
        if run:  # with an incomplete character at its end, the decoder shows no character of the run
            del self._window[len(self._window) - codec.begun(run) :]
        text = self._text()
        if not run and text.endswith(REPLACEMENT) and codec.begun(self._window):
            text = text[:-1]
        return text[self._emitted :]

    def _text(self) -> str:
        """The window's text after the context."""
        if self._before is None:
            self._before = self._codec.decode_known(self._context, keep_special_tokens=self._keep)
        before = self._before
        return self._codec.decode_known(self._context + self._window, keep_special_tokens=self._keep)[len(before) :]


def _without_spaces(part: Any) -> Any:
    """A step of a tokenizer, as JSON, without the space that it puts before a text."""
    if isinstance(part, list):
        return [_without_spaces(one) for one in part if not (isinstance(one, dict) and one.get("type") == "Prepend")]
    if not isinstance(part, dict):
        return part
    none = {"prepend_scheme": "never", "add_prefix_space": False}
    return {name: none.get(name, _without_spaces(value)) for name, value in part.items()}


def _damaged_decoder(count: int, error: NativeError) -> IntegrityError:
    return IntegrityError(
        f"the tokenizer fails at the text of {count} ids ({error}): its decoder is damaged, copy it again"
    )


def _uncovered_word(text: str, offsets: Sequence[tuple[int, int]]) -> str | None:
    """The first word of `text` with a visible character that no token covers, which the tokenizer silently drops."""
    covered = bytearray(len(text))
    for start, end in offsets:
        covered[start:end] = b"\1" * (end - start)
    for i, character in enumerate(text):
        # Normalization may drop control characters and accents.
        if not covered[i] and not character.isspace() and unicodedata.category(character)[0] not in "CM":
            return next(m[0] for m in re.finditer(r"\S+", text) if m.end() > i)
    return None
