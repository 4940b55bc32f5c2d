from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pastkey.runtime.text.stop_strings import StopStrings


@pytest.mark.parametrize(
    ("pieces", "stops", "expected", "found"),
    [
        (["one\n", "two"], ["\n"], "one", "\n"),
        (["a", "a", "a", "b"], ["aab"], "a", "aab"),
        (["xEN"], ["END"], "xEN", None),
        (["abcd"], ["cd", "bc"], "a", "bc"),
        (["abc"], [], "abc", None),
    ],
)
def test_text_ends_before_the_first_stop_string(pieces, stops, expected, found):
    stream = StopStrings(stops)
    assert ("".join([*map(stream.push, pieces), stream.flush()]), stream.found) == (expected, found)


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
        fast, slow, out = StopStrings(stops), EveryStringAgain(stops), ""
        for piece in pieces:
            shown = fast.push(piece)
            assert shown == slow.push(piece)
            assert (fast.found is not None) == slow.found
            out += shown
        if fast.found is None:
            assert fast.flush() == slow.held
        else:  # the one behind the text; no other is its beginning
            assert fast.found in stops
            assert "".join(pieces).startswith(out + fast.found)
            assert not any(stop != fast.found and fast.found.startswith(stop) for stop in stops)

    check()


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
    assert time.thread_time() - started < 0.002 * len(text) / 4  # a step of decoding is longer
