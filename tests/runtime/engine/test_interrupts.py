"""An interrupt at any moment of a change of a cache: every engine goes on from the tokens that it says it has."""

from __future__ import annotations

import contextlib
import dis
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pastkey.bundle import Bundle
from pastkey.runtime import Engine
from pastkey.runtime.engine import cache as cache_module
from pastkey.runtime.engine.slab import Slab
from pastkey.runtime.providers import placement

if TYPE_CHECKING:
    from ..conftest import Tiny

FOLDER = str(Path(cache_module.__file__).parent)
IDS = [token % 37 for token in range(3, 900, 7)] * 3
NEXT = 11

# All moments take minutes.
EVERY = pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.matrix)])

Opened = Callable[[], Engine]


class Interrupt:
    """Raises KeyboardInterrupt at one of the moments when CPython looks for signals in a file of the engine's.

    These are the beginning of a function, the end of a call and the jump back of a loop.
    """

    def __init__(self, moment: int) -> None:
        self._left = moment

    @property
    def came(self) -> bool:
        return self._left < 0

    def __call__(self, frame: FrameType, *_: Any) -> Any:
        """What traces a function: None for one that is not interrupted. An error in __del__ goes nowhere."""
        if not frame.f_code.co_filename.startswith(FOLDER) or frame.f_code.co_name == "__del__":
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
def interrupted(moment: int) -> Iterator[Interrupt]:
    """Interrupts the block at its `moment`, from 0 on; `came` is False where it ended before."""
    interrupt, before = Interrupt(moment), sys.gettrace()
    sys.settrace(interrupt)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield interrupt
    finally:
        sys.settrace(before)


def begun(engine: Engine, ids: list[int]) -> Engine:
    made = Engine.over(engine.graph)
    made.prefill(ids)
    return made


def opened_as(form: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Opened:
    bundle: Bundle = request.getfixturevalue("fused_bundle" if form == "shared" else "standard_bundle")
    if form == "fixed":
        monkeypatch.setattr(placement, "prefers_fixed_shapes", lambda active: True)
    engine = Engine(bundle, threads=1, graph="all_logits" if form == "fixed" else "last_logits")
    return lambda: Engine.over(engine.graph)


CHANGES: dict[str, Callable[[Engine], object]] = {
    "decode": lambda engine: engine.decode(IDS[120]),
    "prefill": lambda engine: engine.prefill(IDS[120:140]),
    "trim": lambda engine: engine.trim(50),
    "reserve": lambda engine: engine.reserve(200),
    "reset": lambda engine: engine.reset(),
    "restore": lambda engine: restore(engine),
}


def restore(engine: Engine) -> None:
    rows = [row.copy() for row in engine.cache.rows(120)]
    engine.reset()
    engine.restore(IDS[:120], rows, exact_length=0)


def require_right(engine: Engine, tiny: Tiny, ids: list[int], lengths: set[int]) -> None:
    """The engine has the first of `ids`, as many as it says, and goes on from there; it grows and is trimmed."""
    length = engine.length
    assert length in lengths
    assert engine.cached_ids in ([], ids[:length])
    np.testing.assert_allclose(engine.decode(NEXT), tiny([*ids[:length], NEXT])[-1], atol=2e-4)
    rest = [(token * 5) % 37 for token in range(140)]
    np.testing.assert_allclose(engine.prefill(rest), tiny([*ids[:length], NEXT, *rest])[-1], atol=2e-4)
    engine.trim(length + 20)
    np.testing.assert_allclose(engine.decode(4), tiny([*ids[:length], NEXT, *rest[:19], 4])[-1], atol=2e-4)


@EVERY
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", ["shared", "concatenating", "fixed"])
def test_a_change_of_one_cache(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tiny: Tiny, form: str, change: str, every: int
) -> None:
    opened = opened_as(form, request, monkeypatch)
    for moment in range(0, 9999, every):
        engine = opened()
        engine.prefill(IDS[:120])
        with interrupted(moment) as interrupt:
            CHANGES[change](engine)
        require_right(engine, tiny, IDS, {0, 50, 120, 121, 140})
        if not interrupt.came:
            break
    assert moment > 20


SHARED: dict[str, Callable[[Slab, list[Engine]], object]] = {
    "decode": lambda slab, engines: slab.decode(engines[:2], [1, 2]),
    "one that joins": lambda slab, engines: slab.decode(engines, [1, 2, 3]),
    "one that outgrew its row": lambda slab, engines: (engines[0].prefill(IDS[:90]), slab.decode(engines[:2], [1, 2])),
    "growth": lambda slab, engines: [slab.decode(engines[:2], [1, 2]) for _ in range(9)],
    "remove": lambda slab, engines: slab.remove(engines[0]),
    "remove the last": lambda slab, engines: slab.remove(engines[1]),
}


@EVERY
@pytest.mark.parametrize("change", SHARED)
def test_a_change_of_memory_that_engines_share(fused_bundle: Bundle, tiny: Tiny, change: str, every: int) -> None:
    engine = Engine(fused_bundle, threads=1)
    for moment in range(0, 9999, every):
        texts = [IDS[5:125], IDS[30:60], IDS[20:50]]
        engines, slab = [begun(engine, ids) for ids in texts], Slab(engine.graph, 4)
        slab.decode(engines[:2], [8, 9])
        with interrupted(moment) as interrupt:
            SHARED[change](slab, engines)
        known = {"one that outgrew its row": [*IDS[:90], 1]}.get(change, [1] * 9)
        grown = [[*texts[0], 8, *known], [*texts[1], 9, *[2] * 9], [*texts[2], 3]]
        require_right_together(slab, engines, tiny, grown)
        for each, ids in zip(engines, grown, strict=True):
            assert each.cached_ids in ([], ids)
            np.testing.assert_allclose(each.decode(NEXT), tiny([*ids, NEXT])[-1], atol=2e-4)
        if not interrupt.came:
            break
    assert moment > 20


def require_right_together(slab: Slab, engines: list[Engine], tiny: Tiny, grown: list[list[int]]) -> None:
    """Two more tokens of each, in runs of all."""
    for token in (6, 7):
        logits = slab.decode(engines, [token] * len(engines))
        for each, ids, found in zip(engines, grown, logits, strict=True):
            length = each.length - 1
            ids[length:] = [token]
            np.testing.assert_allclose(found, tiny(ids)[-1], atol=2e-4)
