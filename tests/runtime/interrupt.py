"""An interrupt at a chosen moment, each time the same: what a signal does at some time."""

from __future__ import annotations

import contextlib
import dis
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupt:
    """Raises KeyboardInterrupt at one of the moments when CPython looks for signals in the files of a folder.

    These are the beginning of a function, the end of a call and the jump back of a loop.
    """

    def __init__(self, folder: Path, moment: int) -> None:
        self._folder, self._left = str(folder), moment

    @property
    def came(self) -> bool:
        return self._left < 0

    def __call__(self, frame: FrameType, *_: Any) -> Any:
        """What traces a function: None for one that is not interrupted. An error in __del__ goes nowhere."""
        if not frame.f_code.co_filename.startswith(self._folder) or frame.f_code.co_name == "__del__":
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        before = "RESUME"

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal before
            if event == "opcode":
                after, before = before, dis.opname[frame.f_code.co_code[frame.f_lasti]]
                if after == "RESUME" or after.startswith(("CALL", "JUMP_BACKWARD")):
                    self._left -= 1
                    if self._left == -1:
                        raise KeyboardInterrupt
            return trace

        return trace


@contextlib.contextmanager
def interrupted(folder: Path, moment: int) -> Iterator[Interrupt]:
    """Interrupts the block at its `moment`, from 0 on, in this thread; `came` is False where it ended before."""
    interrupt, before = Interrupt(folder, moment), sys.gettrace()
    sys.settrace(interrupt)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield interrupt
    finally:
        sys.settrace(before)
