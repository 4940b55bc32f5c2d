"""Opens a tokenizer.json, which may be untrusted.

The caller passes the library's class, since this package imports only the standard library. A pattern, a replacement
and a vocabulary with a hostile order of merges can run long. The child process of an untrusted bundle bounds that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar

from ..errors import IntegrityError, first_line
from ..values import shown
from .reading import NativeError, panics_as_errors

T = TypeVar("T")

MOST_BYTES: Final = 100_000_000  # of a tokenizer.json; the largest that are published have 35 MB
_HOLES, _SOME_HOLES = 8, 10_000  # maximum ids per token, and additional ids


def open_tokenizer(kind: type[T], content: bytes, source: object) -> T:
    """Opens a `tokenizers.Tokenizer` without truncation and padding. Raises IntegrityError naming `source`."""
    if len(content) > MOST_BYTES:
        raise IntegrityError(
            f"{source} is not a tokenizer.json that can be read: it has {len(content):,} bytes; at most {MOST_BYTES:,} "
            "are allowed"
        )
    try:
        with panics_as_errors():
            tokenizer: Any = kind.from_buffer(content)  # type: ignore[attr-defined]
            # A saved tokenizer may truncate or pad its output, for example to 2**60 tokens.
            tokenizer.no_truncation()
            tokenizer.no_padding()
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
