"""Attention calls with a window keep the rows that a token may still see, with calls that keep all."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError, IntegrityError
from pastkey.runtime import Engine, load
from pastkey.runtime.engine.caches.capacity import TRIMMABLE
from pastkey.runtime.engine.caches.slab import Slab

from ...conftest import ids_of, require_close
from ...rotary import RotaryTiny

SIZE, CONTEXT, WINDOW = 16, 1000, 8
INSIDE = {"pairs": 8, "inside": True}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "one of two calls": ("fused", {**INSIDE, "local": (1,)}),
    "the first call": ("fused", {"pairs": 3, "interleaved": True, "local": (0,)}),
    "all calls": ("fused", INSIDE),
    "all calls, standard": ("standard", {"pairs": 8}),
}


@pytest.fixture(scope="module")
def tiny():
    return RotaryTiny.of(SIZE, CONTEXT, window=WINDOW, local=(1,), **INSIDE)


@pytest.fixture(scope="module")
def bundle(tiny, make_bundle):
    return tiny.written(make_bundle)


@pytest.fixture
def engine(bundle):
    made = Engine(bundle, threads=1)
    made.marks = True
    return made


def held(engine: Engine) -> int:
    """Rows of the windowed calls."""
    return engine.cache.length - engine.cache.evicted  # type: ignore[union-attr]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [1, WINDOW, 150])
def test_what_no_window_sees_leaves_the_cache(form, window, make_bundle):
    graph, decoder = FORMS[form]
    tiny = RotaryTiny.of(SIZE, CONTEXT, window=window, **decoder)
    engine, reference, ids = Engine(tiny.written(make_bundle, graph), threads=1), tiny.reference(), ids_of(600)
    most = 0
    for part in (ids[:7], ids[7:200], ids[200:230]):
        require_close(engine.prefill(part, chunk_size=50), reference.feed(part)[-1])
    for token in ids[230:]:
        require_close(engine.decode(token), reference.feed([token])[-1])
        most = max(most, held(engine))
    assert (engine.length, engine.cached_ids) == (600, ids)
    assert most <= 1.25 * (window + TRIMMABLE) + 128
    assert engine.nbytes <= engine.graph.cache_bytes(600)


def test_a_long_prefill_allocates_the_window_alone(engine, tiny):
    ids = ids_of(900)
    require_close(engine.prefill(ids), tiny(ids)[-1])
    rows = [array.shape[2] for array in engine.cache.arrays]
    assert max(rows[2:]) <= engine.graph.window_rows < min(rows[:2]) <= 1000


# --- going back ------------------------------------------------------------------------------------------------------
def test_a_text_is_cut_as_far_as_its_window_is_there_or_to_a_mark(engine, tiny):
    ids = ids_of(700)
    engine.prefill(ids[:300])
    engine.prefill(ids[300:])
    least = engine.cache.evicted + WINDOW - 1
    assert [engine.can_trim(length) for length in (700, least, least - 1, 1, 0)] == [True, True, False, False, True]
    for call in (engine.trim, engine.copy):
        with pytest.raises(InputError, match="cannot be trimmed to 100: it keeps"):
            call(100)
    assert {engine.cache.nearest(length) for length in range(least)} == {0, 149}  # behind the first chunk
    for length in (698, least, 149):
        copy = engine.copy(length, room=5)
        require_close(copy.decode(7), tiny([*ids[:length], 7])[-1])
        engine.trim(length)
        require_close(engine.decode(7), tiny([*ids[:length], 7])[-1])
        assert engine.keep_prefix([*ids[:length], 8, 9]) == length
        require_close(engine.prefill([8, 9]), tiny([*ids[:length], 8, 9])[-1])
        engine.trim(length)
    assert engine.keep_prefix(ids[:149]) == 0


def test_a_mark_is_kept_once_and_the_first_stays(engine):
    for count in range(5):
        engine.prefill(ids_of(60, count))
        engine.cache.mark()
        engine.cache.mark()
    engine.marks = False
    for _ in range(3):
        engine.append(ids_of(200))
    assert sorted({engine.cache.nearest(length) for length in range(600)}) == [0, 58, 300]


@pytest.mark.parametrize("window", [WINDOW, 150])
def test_a_shift_moves_the_rows_that_are_there(window, make_bundle):
    tiny = RotaryTiny.of(SIZE, CONTEXT, window=window, local=(1,), **INSIDE)
    engine, reference, ids = Engine(tiny.written(make_bundle), threads=1), tiny.reference(), ids_of(900)
    engine.prefill(ids)
    reference.feed(ids)
    for keep, count in ((4, 100), (0, 30), (4, 400), (4, 1)):  # before, and beyond what was evicted
        engine.shift(keep, count)
        reference.drop(keep, count)
        assert engine.can_trim(engine.length)
        for token in ids_of(90, count):
            require_close(engine.decode(token), reference.feed([token])[-1])


@pytest.mark.parametrize("window", [1, 150])
def test_a_copy_of_a_mark_has_the_room_that_it_asked_for(window, make_bundle):
    tiny = RotaryTiny.of(SIZE, CONTEXT, window=window, local=(0,), **INSIDE)
    engine, ids = Engine(tiny.written(make_bundle), threads=1), ids_of(700)
    engine.marks = True
    engine.prefill(ids[:120])
    engine.prefill(ids[120:])
    copy = engine.copy(118, room=400)
    rows = [array.shape[2] for array in copy.cache.arrays]
    assert (len(rows), min(rows[2:]) >= 518) == (4, True)
    for token in range(30):
        require_close(copy.decode(token), tiny([*ids[:118], *range(token + 1)])[-1])


def test_prompts_share_what_they_have_in_common(bundle):
    """A text that went another way leaves a mark where it did, which stays; of a list, where they all do."""
    lm = load(bundle.path, threads=1)
    options: dict[str, Any] = {"max_new_tokens": 20, "prompt_lookup": False}
    prompts = [[*ids_of(600), *ids_of(250, seed)] for seed in range(1, 5)]
    alone = [lm.generate(prompt, **options).ids for prompt in prompts]
    found = [lm.generate(prompt, reuse_prefix=True, **options) for prompt in prompts]
    assert [one.ids for one in found] == alone
    assert min(one.cached_tokens for one in found[2:]) >= 600
    lm.scheduler.store.clear()
    found = lm.generate(prompts, **options)
    assert [one.ids for one in found] == alone
    assert min(one.cached_tokens for one in found[1:]) >= 600


def test_a_refused_run_evicts_nothing(engine):
    engine.forward([ids_of(384), ids_of(384, 1)])
    with pytest.raises(InputError, match="holds 2 rows and 1 were given"):
        engine.decode(1)
    assert engine.cache.evicted == 0


@pytest.mark.parametrize(("window", "context"), [(8, 256), (300, CONTEXT), (990, CONTEXT)])
def test_a_window_that_saves_nothing_is_none(window, context, make_bundle):
    tiny = RotaryTiny.of(SIZE, context, window=window, local=(1,), **INSIDE)
    graph = Engine(tiny.written(make_bundle), threads=1).graph
    assert graph.windows is None
    assert graph.cache_bytes(context) == context * graph.bytes_per_token


# --- saved sessions ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(bundle, tmp_path_factory):
    """A model, and the file of a session of 600 tokens."""
    lm, path = load(bundle.path, threads=1), tmp_path_factory.mktemp("saved") / "s"
    session = lm.session()
    session.append(ids_of(600))
    session.save(path)
    return lm, path


def test_a_saved_session_holds_the_window_and_goes_on(saved):
    lm, path = saved
    assert path.stat().st_size < 0.75 * 600 * lm.require_open().graph.bytes_per_token
    again = lm.load_session(path)
    options = {"max_new_tokens": 30, "prompt_lookup": False}
    found = again.generate(**options)
    assert (found.ids, found.cached_tokens) == (lm.generate(ids_of(600), **options).ids, 598)
    again.trim(100)
    assert again.generate(max_new_tokens=5).cached_tokens == 0  # from the beginning


@pytest.mark.parametrize("rows", [0, WINDOW - 2, 601])
@pytest.mark.parametrize("calls", [(2, 3), (2,), (0, 1)])
def test_a_window_of_other_rows_is_refused(rows, calls, saved, tmp_path):
    lm, path = saved
    with np.load(path) as found:
        content = dict(found)
    for call in calls:
        content[f"arr_{call}"] = np.zeros((1, 2, rows, SIZE), np.float32)
    with (tmp_path / "altered").open("wb") as out:
        np.savez(out, **content)
    with pytest.raises(IntegrityError, match="cannot be read as a saved session"):
        lm.load_session(tmp_path / "altered")


# --- several sequences ------------------------------------------------------------------------------------------------
def test_rows_of_a_slab_equal_each_text_alone(bundle, tiny):
    """Texts join, idle, run separately, are cut and leave, in any order."""
    rng, graph = random.Random(0), Engine(bundle, threads=1).graph
    slab, engines, texts = Slab(graph, 5), [], list[list[int]]()
    for place in range(5):
        engines.append(Engine.over(graph))
        engines[-1].marks = True
        texts.append([place])
        engines[-1].prefill([place])
    evicted = 0
    for _ in range(150):
        chosen = rng.sample(range(5), rng.randint(1, 5))
        tokens = [rng.randrange(37) for _ in chosen]
        found = slab.decode([engines[place] for place in chosen], tokens)
        for place, token, logits in zip(chosen, tokens, found, strict=True):
            texts[place].append(token)
            require_close(logits, tiny(texts[place])[-1])
        place, what = rng.randrange(5), rng.random()
        engine, text = engines[place], texts[place]
        if what < 0.15 and len(text) < 400:
            more = [rng.randrange(37) for _ in range(rng.choice([2, 9, 140, 300]))]
            require_close(engine.prefill(more), tiny([*text, *more])[-1])
            text += more
        elif what < 0.3:
            engine.cut(rng.randint(max(1, len(text) - 30), len(text)))
            del text[engine.length :]
            if not text:
                text.append(1)
                engine.prefill(text)
        elif what < 0.4:
            slab.remove(engine)
        evicted += sum(one.cache.evicted > 0 for one in engines)  # type: ignore[union-attr]
    assert evicted > 50


def test_a_batch_in_one_cache_keeps_all_rows(bundle, tiny):
    engine = Engine(bundle, threads=1)
    texts = [ids_of(140), ids_of(140, 1)]
    engine.forward(texts)
    for token in range(30):
        logits = engine.forward([[token], [token + 1]])
        for row, text in enumerate(texts):
            text.append(token + row)
            require_close(logits[row, 0], tiny(text)[-1])
    assert engine.cache.evicted == 0
