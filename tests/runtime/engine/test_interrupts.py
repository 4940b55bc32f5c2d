"""An interrupt at any moment of a change of a cache: every engine goes on from the tokens that it says it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pastkey.bundle import Bundle
from pastkey.runtime import Engine
from pastkey.runtime import engine as engine_folder
from pastkey.runtime.engine.slab import Slab
from pastkey.runtime.providers import placement

from ..interrupt import interrupted

if TYPE_CHECKING:
    from ..conftest import Tiny

FOLDER = Path(engine_folder.__file__).parent
IDS = [token % 37 for token in range(3, 900, 7)] * 3
NEXT = 11

# All moments take minutes.
EVERY = pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.matrix)])

Opened = Callable[[], Engine]


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
    assert not length or engine.nbytes > 0
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
        with interrupted(FOLDER, moment) as interrupt:
            CHANGES[change](engine)
        require_right(engine, tiny, IDS, {0, 50, 120, 121, 140})
        if not interrupt.came:
            break
    assert moment > 5


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
        with interrupted(FOLDER, moment) as interrupt:
            SHARED[change](slab, engines)
        known = {"one that outgrew its row": [*IDS[:90], 1]}.get(change, [1] * 9)
        grown = [[*texts[0], 8, *known], [*texts[1], 9, *[2] * 9], [*texts[2], 3]]
        require_right_together(slab, engines, tiny, grown)
        for each, ids in zip(engines, grown, strict=True):
            assert each.cached_ids in ([], ids)
            np.testing.assert_allclose(each.decode(NEXT), tiny([*ids, NEXT])[-1], atol=2e-4)
        if not interrupt.came:
            break
    assert moment > 5


def require_right_together(slab: Slab, engines: list[Engine], tiny: Tiny, grown: list[list[int]]) -> None:
    """Two more tokens of each, in runs of all."""
    for token in (6, 7):
        logits = slab.decode(engines, [token] * len(engines))
        for each, ids, found in zip(engines, grown, logits, strict=True):
            length = each.length - 1
            ids[length:] = [token]
            np.testing.assert_allclose(found, tiny(ids)[-1], atol=2e-4)
