"""The flags that commands share. What each does is told where it is used."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import pytest

from pastkey.errors import InputError
from pastkey.runtime.commands.flags import limits_of
from pastkey.runtime.sandbox.limits import Limits


def test_what_limit_says() -> None:
    def given(*pairs: tuple[str, str]) -> Limits:
        return limits_of(argparse.Namespace(limits=pairs))

    assert given() == Limits()
    assert given(("memory", "4e9"), ("seconds", "2.5")) == Limits(4_000_000_000, 2.5)
    with pytest.raises(InputError):
        given(("memory", "inf"))


@pytest.mark.parametrize("name", ["run", "chat", "bench", "inspect", "devices"])
def test_help_needs_no_heavy_import(name: str) -> None:
    program = (
        "import sys\nfrom pastkey.__main__ import main\n"
        f"try:\n    main(['{name}', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'numpy', 'onnxruntime', 'tokenizers', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_comes_at_once() -> None:
    def seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "pastkey", "run", "--help"], capture_output=True, check=True)
        after = os.times()  # the processor's time: a busy machine does not count
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(4)) < 0.3
