"""Rows of several engines in one memory: each gives the logits of a separate engine."""

from __future__ import annotations

import random

import pytest

from pastkey.runtime import Engine
from pastkey.runtime.engine.caches.slab import Slab
from pastkey.runtime.providers.ort import onnxruntime

from ...conftest import require_close, stopped


@pytest.fixture
def engine(fused_bundle):
    return Engine(fused_bundle, threads=1)


def begun(engine: Engine, ids: list[int]) -> Engine:
    made = Engine.over(engine.graph)
    made.prefill(ids)
    return made


def test_rows_that_join_leave_trim_and_run_alone_keep_their_logits(engine, tiny):
    rng, slab = random.Random(0), Slab(engine.graph, 6)
    rows: dict[Engine, list[int]] = {}

    def some_ids(*counts: int) -> list[int]:
        return [rng.randrange(37) for _ in range(rng.choice(counts))]

    for _ in range(200):
        action, row = rng.random(), rng.choice([*rows] or [engine])
        if action < 0.15 and len(rows) < 9:
            ids = some_ids(2, 20, 120)
            rows[begun(engine, ids)] = ids
        elif action < 0.2 and rows:
            slab.remove(row, keep=rng.random() < 0.5)
            del rows[row]
        elif action < 0.3 and rows:
            if row.length < 400:
                tokens = some_ids(3, 90)
                rows[row] += tokens
                require_close(row.append(tokens), tiny(rows[row])[-1], 1e-5)
        elif action < 0.35 and rows:
            row.trim(max(1, row.length - 5))
            del rows[row][row.length :]
        else:
            wanted = [row for row in rows if slab.holds(row) and rng.random() < 0.7 and row.length < 590]
            wanted += [row for row in rows if not slab.holds(row) and len(slab.members) < slab.most][:1]
            tokens = [rng.randrange(37) for _ in wanted]
            logits = slab.decode(wanted, tokens) if wanted else []
            for row, token, found in zip(wanted, tokens, logits, strict=True):
                rows[row].append(token)
                require_close(found, tiny(rows[row])[-1], 1e-5)
    for row in list(slab.members):
        slab.remove(row)
    assert slab.nbytes == 0
    for row, ids in rows.items():
        assert row.cached_ids == ids
        if row.length < 600:
            require_close(row.decode(1), tiny([*ids, 1])[-1], 1e-5)


@pytest.mark.parametrize("step", ["run", "memory"])
def test_an_exception_drops_the_caches_of_all(engine, tiny, monkeypatch, step):
    """Also of one that has not moved in: a fifth row needs more memory."""
    slab, engines = Slab(engine.graph, 8), [begun(engine, ids) for ids in ([1, 2, 3], [4, 5], [6, 7], [8, 9])]
    slab.decode(engines, [6, 7, 8, 9])
    slab.idle = dict.fromkeys(engines, 3)
    engines.append(begun(engine, [8, 9]))
    with monkeypatch.context() as patch:
        owner, name = (engine.graph, "run") if step == "run" else (onnxruntime.OrtValue, "ortvalue_from_numpy")
        patch.setattr(owner, name, stopped)
        with pytest.raises(KeyboardInterrupt):
            slab.decode(engines, [8, 9, 10, 11, 12])
    assert (slab.members, slab.idle, slab.nbytes) == ([], {}, 0)
    assert [(made.length, made.nbytes) for made in engines] == [(0, 0)] * 5
    texts = [1, 2, 3, 6], [4, 5, 7]
    for made, ids in zip(engines, texts, strict=False):
        made.prefill(ids)
    for found, token, ids in zip(slab.decode(engines[:2], [8, 9]), (8, 9), texts, strict=True):
        require_close(found, tiny([*ids, token])[-1])


def test_a_row_that_leaves_makes_room(engine):
    slab, engines = Slab(engine.graph, 2), [begun(engine, [1, 2]) for _ in range(3)]
    slab.decode(engines[:2], [3, 4])
    slab.remove(engines[0])
    slab.decode(engines[1:], [5, 6])
    assert slab.members == engines[1:]
