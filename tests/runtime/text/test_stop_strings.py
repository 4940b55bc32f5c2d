from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pastkey.runtime.text.stop_strings import StopStrings


def cut(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    stream = StopStrings(stops)
    out = "".join([*map(stream.push, pieces), stream.flush()])
    return out, stream.found is not None


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["one\n", "two"], ["\n"], ("one", True)),
        (["a", "a", "a", "b"], ["aab"], ("a", True)),
        (["xEN"], ["END"], ("xEN", False)),
        (["abcd"], ["cd", "bc"], ("a", True)),
        (["abc"], [], ("abc", False)),
    ],
)
def test_text_ends_before_the_first_stop_string(pieces, stops, expected):
    assert cut(pieces, stops) == expected


class EveryStringAgain:
    """The slow obvious way: all strings are looked for in all that is held, at each piece."""

    def __init__(self, stops: list[str]) -> None:
        self.stops, self.held, self.found = stops, "", False

    def push(self, text: str) -> str:
        if self.found:
            return ""
        self.held += text
        places = [self.held.find(stop) for stop in self.stops if stop in self.held]
        ends = [n for stop in self.stops for n in range(len(stop)) if self.held.endswith(stop[:n])]
        self.found = bool(places)
        cut = min(places) if places else len(self.held) - max(ends, default=0)
        out, self.held = self.held[:cut], self.held[cut:]
        return out


@pytest.mark.parametrize("letters", ["ab", "abc\U0001f642"])
def test_every_piece_is_that_of_looking_for_each_string_again(letters):
    @settings(max_examples=100)
    @given(
        pieces=st.lists(st.text(letters, max_size=6), max_size=12),
        stops=st.lists(st.text(letters, min_size=1, max_size=7), max_size=6),
    )
    def check(pieces: list[str], stops: list[str]) -> None:
        fast, slow = StopStrings(stops), EveryStringAgain(stops)
        for piece in pieces:
            assert fast.push(piece) == slow.push(piece)
            assert (fast.found is not None) == slow.found
        assert fast.found is not None or fast.flush() == slow.held

    check()


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=5),
)
def test_the_stop_string_that_is_found_is_the_one_behind_the_text(pieces, stops):
    stream = StopStrings(stops)
    out = "".join([*map(stream.push, pieces), stream.flush()])
    if stream.found is not None:
        assert stream.found in stops
        assert "".join(pieces).startswith(out + stream.found)
        assert not any(stop != stream.found and stream.found.startswith(stop) for stop in stops)


LONG = [f"{i:05}" + "ab" * 20 for i in range(10_000)]  # they begin in many ways
ALIKE = ["a" * 100 + f"{i:05}" for i in range(10_000)]  # each place of a text of a is the beginning of all


@pytest.mark.parametrize(
    ("stops", "text"),
    [(LONG, "0123456789 " * 300), (ALIKE, "a" * 3000), (["a" * 1000 + "b"], "a" * 3000)],
    ids=["differing", "alike", "one long"],
)
def test_ten_thousand_stop_strings_are_found_in_little_time(stops, text):
    stream = StopStrings(stops)
    started = time.thread_time()
    out = "".join(stream.push(text[place : place + 4]) for place in range(0, len(text), 4)) + stream.flush()
    assert out == text
    assert time.thread_time() - started < 0.002 * len(text) / 4  # a step of decoding takes longer
