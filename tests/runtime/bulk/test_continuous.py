"""Streams that end at different times, each replaced by the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pastkey.errors import InputError, MissingExtraError
from pastkey.runtime import Completion, LanguageModel, Stream
from pastkey.runtime.bulk.continuous import finished, told


def test_each_comes_to_its_end_and_an_error_is_its_own(lm: LanguageModel) -> None:
    lengths = [5, 1, 9, 0, 3, 7]

    def streams() -> Iterator[tuple[int, Stream | Exception]]:
        for key, length in enumerate(lengths):
            yield key, lm.stream("abc", max_new_tokens=length)
        yield 6, InputError("bad")
        yield 7, lm.stream("abc", max_new_tokens=4, logits_processor=lambda ids, logits: logits[:-1])
        yield 8, KeyError("x")

    found = dict(finished(streams(), 3))
    for key, length in enumerate(lengths):
        answer = found[key]
        assert isinstance(answer, Completion)
        assert (answer.new_tokens, answer.text) == (length, lm.generate("abc", max_new_tokens=length).text)
    assert found[6] == "bad"
    assert "returned" in str(found[7])
    assert found[8] == "KeyError: 'x'"


def test_no_more_than_so_many_are_open_and_all_are_closed(lm: LanguageModel) -> None:
    begun: list[Stream] = []

    def streams() -> Iterator[tuple[int, Stream | Exception]]:
        for key in range(9):
            begun.append(lm.stream("abc", max_new_tokens=3))
            yield key, begun[-1]

    reader = finished(streams(), 2)
    next(reader)
    assert len(begun) == 2
    reader.close()
    assert [stream.completion is not None for stream in begun] == [True, True]
    assert lm.scheduler.live == 0


@pytest.mark.parametrize("error", [MissingExtraError("no jinja2"), MemoryError()])
def test_what_is_wrong_with_everybody_ends_the_job(error: Exception) -> None:
    with pytest.raises(type(error)):
        told(error)
