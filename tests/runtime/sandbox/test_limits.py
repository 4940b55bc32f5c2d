from __future__ import annotations

import pytest

from pastkey.errors import InputError
from pastkey.runtime.sandbox.limits import LEAST_MEMORY, MEMORY, Limits, LimitsInForce, default_memory


def test_what_may_be_asked_for():
    assert Limits() == Limits(None, 120.0)
    for memory in (True, LEAST_MEMORY - 1, 1e9, "4 GB"):
        with pytest.raises(InputError, match=f"bytes from {LEAST_MEMORY} were expected"):
            Limits(memory=memory)  # type: ignore[arg-type]
    for seconds in (0, -1, float("inf"), float("nan"), None, True):
        with pytest.raises(InputError, match="a number above 0 and at most 1000000 was expected"):
            Limits(seconds=seconds)  # type: ignore[arg-type]


def test_in_words():
    assert str(LimitsInForce(5.0, 2_400_000_000, 7)) == (
        "limits in force: 5 s for an answer, 2.4 GB of memory, no files but its own and the libraries (landlock ABI 7)"
    )
    assert str(LimitsInForce(0.5, None, 0, ("its memory is not bounded", "no landlock"))) == (
        "limits in force: 0.5 s for an answer; not in force on this system: its memory is not bounded, no landlock"
    )


def test_the_default_goes_by_the_files_and_what_is_available():
    assert default_memory(100, None) == MEMORY + 300
    assert default_memory(100, 10**12) == MEMORY + 300
    assert default_memory(100, 10**9) == 10**9
    assert default_memory(100, 5) == LEAST_MEMORY
