"""Opens a tokenizer.json, which may be untrusted, and checks its bounds.

The caller passes the library's class, since this package imports only the standard library. The content is checked
before any text is encoded: against sizes and counts that no real tokenizer reaches. A pattern, and a vocabulary with a
hostile order of merges, can still run long. Only the length of the text bounds them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar

from ..errors import IntegrityError, first_line
from ..values import shown
from .reading import NativeError, panics_as_errors

T = TypeVar("T")

MOST_BYTES: Final = 100_000_000  # of a tokenizer.json; the largest that are published have 35 MB
MOST_STEPS: Final = 100  # of normalizer, pre-tokenizer, post-processor and decoder, each
MOST_PIECES: Final = 1_000  # of the template of a post-processor
LONGEST_TEXT: Final = 10_000  # characters of a pattern or its replacement
MOST_GROWTH: Final = 64  # factor by which the replacements of one part can lengthen a text
_HOLES, _SOME_HOLES = 8, 10_000  # maximum ids per token, and additional ids
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_TABLE = "precompiled_charsmap"  # of SentencePiece: base64, hundreds of thousands of characters


def open_tokenizer(kind: type[T], content: bytes, source: object) -> T:
    """Opens a `tokenizers.Tokenizer` without truncation and padding. Raises IntegrityError naming `source`."""
    if len(content) > MOST_BYTES:
        raise IntegrityError(
            f"{source} is not a tokenizer.json that can be read: it has {len(content):,} bytes, and {MOST_BYTES:,} are "
            "the most"
        )
    try:
        with panics_as_errors():
            tokenizer: Any = kind.from_buffer(content)  # type: ignore[attr-defined]
            # A saved tokenizer may truncate or pad its output, for example to 2**60 tokens.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            for name in _PARTS:
                if (part := getattr(tokenizer, name)) is not None:
                    _check(name, json.loads(part.__getstate__()))
    except (Exception, NativeError) as error:  # the library raises nothing more specific
        raise IntegrityError(f"{source} is not a tokenizer.json that can be read: {first_line(error)}") from None
    opened: T = tokenizer
    return opened


def require_dense(vocabulary: Mapping[str, int], source: object) -> None:
    """Raises IntegrityError for an id far beyond the number of tokens.

    Code that writes a vocabulary, such as the library, counts from 0 to its largest id: 2**31 ids end the process.
    """
    largest, most = max(vocabulary.values(), default=0), _HOLES * len(vocabulary) + _SOME_HOLES
    if largest > most:
        raise IntegrityError(
            f"{source} has the token id {shown(largest)} and {len(vocabulary):,} tokens: expected ids up to {most:,} "
            "for so many"
        )


def _check(name: str, part: object) -> None:
    """Raises ValueError if a part exceeds the bounds."""
    steps, pieces, growth = 0, 0, 1
    for key, value in _values(part):
        if isinstance(value, dict):
            steps += "type" in value
            pieces += "SpecialToken" in value or "Sequence" in value
            if value.get("type") == "Replace":
                growth *= _growth(value)
        elif isinstance(value, str) and len(value) > LONGEST_TEXT and key != _TABLE:
            raise ValueError(f"a text of its {name} has {len(value):,} characters, and {LONGEST_TEXT:,} are the most")
        elif isinstance(value, list) and key == "ids":
            pieces += len(value)
    for found, most, what in ((steps, MOST_STEPS, "steps"), (pieces, MOST_PIECES, "pieces")):
        if found > most:
            raise ValueError(f"its {name} has {found:,} {what}, and {most:,} are the most")
    if growth > MOST_GROWTH:
        raise ValueError(f"the replacements of its {name} make a text more than {MOST_GROWTH} times as long")


def _growth(step: dict[str, Any]) -> int:
    """Returns the factor by which a Replace can lengthen a text. A regular expression may match one character."""
    pattern, content = step.get("pattern"), step.get("content")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if text == "":
        raise ValueError("it replaces an empty text")
    least = len(text) if isinstance(text, str) else 1
    return max(1, -(-len(content) // least)) if isinstance(content, str) else 1


def _values(part: object) -> Iterator[tuple[str, object]]:
    """Yields every value within JSON, with its key."""
    waiting: list[tuple[str, object]] = [("", part)]
    while waiting:
        key, value = waiting.pop()
        yield key, value
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, item) for item in value]
