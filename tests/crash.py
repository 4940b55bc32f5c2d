"""Ends a save at each of its operations on the disk, by a kill or by an error.

What is found afterwards must be the old whole or the new whole. Counted are the operations that create, rename, remove
or flush a file or a folder.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

OPERATIONS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")  # of the module os


class Killed(BaseException):
    """Represents SIGKILL: no operation succeeds after it, so that nothing cleans up."""


def run_until(limit: int, error: BaseException, save: Callable[[], object]) -> tuple[bool, list[str]]:
    """Runs `save`, whose operation number `limit` raises `error`. Returns whether it came so far, and its operations.

    The operations after that one raise too if the process was killed. An interrupt comes when the operation is done.
    """
    done: list[str] = []

    def counted(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:  # changes nothing
                return operation(*arguments, **options)
            done.append(name)
            if len(done) <= limit or (len(done) > limit + 1 and not isinstance(error, Killed)):
                return operation(*arguments, **options)
            if isinstance(error, KeyboardInterrupt):
                with contextlib.suppress(OSError):
                    operation(*arguments, **options)
            raise error

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        try:
            save()
        except type(error) as raised:
            if raised is not error:
                raise
    return len(done) > limit, done


def at_every_operation(
    base: Path, make: Callable[[Path], object], save: Callable[[Path], object], error: BaseException
) -> Iterator[tuple[Path, list[str]]]:
    """Yields for each operation of `save` a folder that `make` filled and whose `save` ended there; at last one that
    `save` finished. With each: the operations that were tried."""
    for limit in itertools.count():
        folder = base / f"stop-{limit}"
        folder.mkdir()
        make(folder)
        ended, done = run_until(limit, error, functools.partial(save, folder))
        yield folder, done
        if not ended:
            return
