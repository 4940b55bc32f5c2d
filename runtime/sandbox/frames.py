"""The child's output to its parent: frames of a kind (1 byte), a length (4 bytes, little-endian) and a content.

Standard library only: the child writes before it has put limits on itself.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from typing import BinaryIO, Final

HEADER: Final = struct.Struct("<cI")
LONGEST: Final = 1 << 20  # bytes of a content
LIMITS, OUT, ERROR, PROGRESS, LINE = b"l", b"o", b"e", b"p", b"?"
KINDS: Final = (LIMITS, OUT, ERROR, PROGRESS, LINE)  # OUT and ERROR are printed text, LINE asks for a line of input
END, INVALID = b"", b"!"  # the last kinds of `read_frames`


class FrameWriter:
    """Writes frames, from any thread."""

    def __init__(self, target: BinaryIO) -> None:
        self._target, self._lock = target, threading.Lock()

    def write(self, kind: bytes, content: bytes = b"") -> None:
        """Writes one frame, at once."""
        with self._lock:
            self._target.write(HEADER.pack(kind, len(content)) + content)
            self._target.flush()


def read_frames(source: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """The frames until the end; of a cut one, its part. The last has the kind END, or INVALID for any other bytes."""
    while len(header := source.read(HEADER.size)) == HEADER.size:
        kind, length = HEADER.unpack(header)
        if kind not in KINDS or length > LONGEST:
            yield INVALID, b""
            return
        yield kind, source.read(length)
    yield END, b""
