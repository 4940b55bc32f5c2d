"""The flags that commands share. What each does is told where it is used."""

from __future__ import annotations

import argparse

import pytest

from pastkey.errors import InputError
from pastkey.runtime.commands.flags import limits_of
from pastkey.runtime.sandbox.limits import Limits


def test_what_limit_says():
    def given(*pairs: tuple[str, str]) -> Limits:
        return limits_of(argparse.Namespace(limits=pairs))

    assert given() == Limits()
    assert given(("memory", "4e9"), ("seconds", "2.5")) == Limits(4_000_000_000, 2.5)
    with pytest.raises(InputError):
        given(("memory", "inf"))
