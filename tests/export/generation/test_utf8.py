"""Whole characters of any bytes, as Python decodes them."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pastkey.export.generation.utf8 import DROPPED, REPLACED, whole_characters

from .small_models import INT64, run


@functools.cache
def graph() -> Callable[..., Any]:
    return run({"stream": (INT64, ["n"])}, lambda n, given: whole_characters(n, given["stream"]), INT64)


def decoded(content: bytes) -> str:
    found = graph()(stream=np.array(list(content), np.int64)).tolist()
    parts = ["�".encode() if byte == REPLACED else bytes([byte]) for byte in found if byte != DROPPED]
    return b"".join(parts).decode()  # strictly: what is left is UTF-8


def expected(content: bytes) -> str:
    """What is whole: a decoder that waits for more holds an unfinished character back."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(content)


BYTES = st.sampled_from([0, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC2, 0xDF, 0xE0, 0xE1, 0xED, 0xEF])
MORE = st.sampled_from([0xF0, 0xF1, 0xF4, 0xF5, 0xFF])


@settings(deadline=None)  # the first call builds the graph
@given(st.lists(BYTES | MORE, max_size=12).map(bytes))
def test_any_bytes(content):
    assert decoded(content).rstrip("�") == expected(content).rstrip("�")
    if not content or content[-1] < 0x80:
        assert decoded(content) == expected(content)


@given(st.text(max_size=12), st.integers(0, 3))
def test_a_text_that_is_cut_anywhere(text, cut):
    content = text.encode("utf-8", "replace")
    content = content[: len(content) - cut]
    assert decoded(content) == expected(content)
