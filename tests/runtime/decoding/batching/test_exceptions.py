"""Whatever exception leaves a step, the caches that it had bound are dropped, and every text stays as it is alone.

A KeyboardInterrupt leaves the call that led. Any other exception ends the generation that it came of.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pastkey.runtime import LanguageModel, load
from pastkey.runtime.constraints.matcher import Matcher
from pastkey.runtime.decoding.batching.prefix_cache import PrefixStore
from pastkey.runtime.decoding.batching.scheduler import Scheduler
from pastkey.runtime.decoding.completion import Completion
from pastkey.runtime.decoding.generation import Generation
from pastkey.runtime.engine.binding import Binding
from pastkey.runtime.engine.caches.fixed import FixedRows
from pastkey.runtime.engine.caches.kv import KVCache
from pastkey.runtime.engine.caches.slab import Slab
from pastkey.runtime.engine.caches.static_graphs import StaticGraphs
from pastkey.runtime.engine.decoder_graph import DecoderGraph
from pastkey.runtime.engine.engine import Engine
from pastkey.runtime.sampling.sampler import Sampler
from pastkey.runtime.speculation.speculator import Speculator
from pastkey.runtime.text.token_bytes import ExactEncoder

from .waiting import until

pytest.importorskip("llguidance")

DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 1, "logprobs": 1, "prompt_lookup": False}
STREAMS: dict[str, dict[str, Any]] = {
    "abcabcab": {**DRAWN, "max_new_tokens": 14},
    "de" * 40: {**DRAWN, "max_new_tokens": 9, "prompt_logprobs": True},
    "abababab": {**DRAWN, "max_new_tokens": 10, "prompt_lookup": True},
    "abc": {"max_new_tokens": 30, "regex": "[a-d][ef]gggg[hi]jjj[kl]", "temperature": 1.0, "seed": 2},
}
OWN: dict[str, Any] = {**DRAWN, "max_new_tokens": 6, "reuse_prefix": True}

# Where an exception comes: in the class, at the n-th call of the method, before it or after it.
MOMENTS: list[tuple[type, str, int, bool]] = [
    (DecoderGraph, "run", 0, False),
    (DecoderGraph, "run", 1, True),
    (DecoderGraph, "run", 4, True),
    (StaticGraphs, "run", 0, True),
    (StaticGraphs, "run", 3, False),
    (Binding, "feed", 1, True),
    (KVCache, "reserve", 0, True),
    (KVCache, "advance", 1, False),
    (KVCache, "place", 3, True),
    (FixedRows, "write", 2, False),
    (Slab, "join", 1, True),
    (Slab, "_make_room", 0, True),
    (Slab, "remove", 0, True),
    (Engine, "run", 0, True),
    (Engine, "run", 1, True),
    (Engine, "trim", 0, True),
    (Engine, "keep_prefix", 0, True),
    (Generation, "begin", 0, True),
    (Generation, "take", 2, True),
    (Generation, "jump", 3, True),
    (Generation, "retire", 0, False),
    (Sampler, "__call__", 3, False),
    (Speculator, "draft", 0, True),
    (Matcher, "follow", 1, True),
    (Matcher, "masked", 0, True),
    (PrefixStore, "take", 0, True),
    (PrefixStore, "put", 0, True),
]
KINDS: dict[str, dict[str, Any]] = {
    "fused": {},
    "standard": {},
    "static": {"chunk": 8},
    "int8_kv": {"int8_kv": True},
}


def named(moment: tuple[type, str, int, bool]) -> str:
    kind, name, count, after = moment
    return f"{kind.__name__}.{name}-{count}-{'after' if after else 'before'}"


@pytest.fixture(scope="module", params=KINDS)
def bundle(request, tiny, letters, make_bundle):
    kind = "fused" if request.param == "int8_kv" else request.param
    return make_bundle(tiny, kind, tokenizer=letters, **KINDS[request.param])


@pytest.fixture(scope="module")
def model(bundle):
    """Its int8 cache, where it has one, is used after a few tokens."""
    model = load(bundle.path, threads=1)
    model.require_open().graph.int8_kv_from = 8
    return model


@pytest.fixture(scope="module")
def expected(bundle):
    """What each stream, and the call that leads, gives alone."""
    alone = load(bundle.path, threads=1)
    alone.require_open().graph.int8_kv_from = 8
    return {prompt: alone.generate(prompt, **options) for prompt, options in {**STREAMS, "f": OWN}.items()}


@contextlib.contextmanager
def raising(moment: tuple[type, str, int, bool], error: type[BaseException]) -> Iterator[list[int]]:
    """Raises once within the block. Yields the numbers of the calls so far."""
    owner, name, count, after = moment
    calls: list[int] = []
    method = getattr(owner, name)

    def raises(*arguments: Any, **given: Any) -> Any:
        calls.append(len(calls))
        if len(calls) - 1 != count:
            return method(*arguments, **given)
        if after:
            method(*arguments, **given)
        raise error("injected")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, raises)
        yield calls


@contextlib.contextmanager
def others_waiting(model: LanguageModel, generations: list[Generation]) -> Iterator[None]:
    """As if a thread each waited for the next token."""
    scheduler = model.scheduler
    scheduler._live |= dict.fromkeys(generations)
    scheduler._waiting += generations
    yield
    for generation in generations:
        scheduler._waiting.remove(generation)


def require_same(model: LanguageModel, found: Completion | None, expected: Completion) -> None:
    """The text, and in float32 its log-probabilities up to the last bits."""
    assert found is not None
    assert (found.text, found.ids, found.finish_reason) == (expected.text, expected.ids, expected.finish_reason)
    tolerance = 1e-4 if model.bundle.int8_kv_graph is None else 0.05
    for ours, theirs in ((found.logprobs, expected.logprobs), (found.prompt_logprobs, expected.prompt_logprobs)):
        values = [[None if one is None else one.logprob for one in each] for each in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], abs=tolerance)


def require_nothing_left(model: LanguageModel) -> None:
    scheduler = model.scheduler
    scheduler.exclusively(lambda: None)
    assert (scheduler.live, scheduler._waiting, scheduler._asking, scheduler._leader) == (0, [], [], None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("moment", MOMENTS, ids=named)
def test_every_other_text_stays_as_it_is_alone(model, expected, moment, error):
    model.scheduler.exclusively(model.scheduler.store.clear)
    begun = {prompt: model.stream(prompt, **options) for prompt, options in STREAMS.items()}
    for prompt in ("abcabcab", "abababab", "abc"):
        next(begun[prompt])
    with (
        others_waiting(model, [stream._generation for stream in begun.values()]),
        raising(moment, error) as calls,
        contextlib.suppress(error),
    ):
        model.generate("f", **OWN)
    came, failed = len(calls) > moment[2], 0
    for prompt, stream in begun.items():
        if stream._generation.error is not None:
            with pytest.raises(RuntimeError, match="injected"):
                list(stream)
            failed += 1
        else:
            list(stream)
            require_same(model, stream.completion, expected[prompt])
    assert failed <= (len(begun) if came and error is RuntimeError else 0)
    require_same(model, model.generate("f", **OWN), expected["f"])
    require_nothing_left(model)


def test_most_moments_come_in_each_kind_of_graph(model):
    """Those above: what is never called raises nothing."""
    found = 0
    for moment in MOMENTS:
        model.scheduler.exclusively(model.scheduler.store.clear)
        begun = {prompt: model.stream(prompt, **options) for prompt, options in STREAMS.items()}
        for prompt in ("abcabcab", "abababab", "abc"):
            next(begun[prompt])
        generations = [stream._generation for stream in begun.values()]
        with others_waiting(model, generations), raising(moment, KeyboardInterrupt) as calls:
            with contextlib.suppress(KeyboardInterrupt):
                model.generate("f", **OWN)
            found += len(calls) > moment[2]
        for stream in begun.values():
            stream.close()
    assert found >= 12


def test_the_caches_of_a_step_are_dropped_and_run_again(model, monkeypatch):
    expected = model.generate("abcabcab", **STREAMS["abcabcab"])
    stream = model.stream("abcabcab", **STREAMS["abcabcab"])
    ids = [next(stream).ids[0] for _ in range(4)]
    engine = stream._generation.engine
    with raising((Generation, "take", 0, False), KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        next(stream)
    assert (engine.length, engine.cached_ids) == (0, [])
    assert stream.completion is not None
    assert stream.completion.ids == ids  # an exception ends whoever reads
    others = stream._generation.kept_ids
    assert others == [*model.prompt_ids("abcabcab"), *expected.ids[:4]]
    require_nothing_left(model)


def test_a_leader_that_is_interrupted_leaves_no_one_waiting(model, expected):
    """Threads that wait for its step lead themselves."""
    started = threading.Event()
    method = Generation.take

    def take(generation: Generation, *arguments: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            started.set()
            until(lambda: len(model.scheduler._waiting) == 3)
            raise KeyboardInterrupt
        return method(generation, *arguments)

    def generated(prompt: str) -> Completion:
        started.wait(60)
        return model.generate(prompt, **STREAMS[prompt])

    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generation, "take", take)
        futures = {prompt: pool.submit(generated, prompt) for prompt in ("abcabcab", "abc")}
        with pytest.raises(KeyboardInterrupt):
            model.generate("f", **OWN)
        for prompt, future in futures.items():
            require_same(model, future.result(timeout=60), expected[prompt])
    require_nothing_left(model)


def test_an_interrupt_while_a_constraint_splits_a_text_into_tokens(model, expected):
    """llguidance swallows what is raised in its call, and is of no use afterwards."""
    for moment in range(3):
        stream = model.stream("abc", **STREAMS["abc"])
        next(stream)
        came = False
        with others_waiting(model, [stream._generation]):
            with raising((ExactEncoder, "__call__", moment, False), KeyboardInterrupt) as calls:
                try:
                    model.generate("f", **{**OWN, "max_new_tokens": 12})
                except KeyboardInterrupt:
                    came = True
            assert came is (len(calls) > moment)
        assert came or moment
        list(stream)
        require_same(model, stream.completion, expected["abc"])
    require_nothing_left(model)


# --- forks --------------------------------------------------------------------------------------------------------
def test_a_fork_waits_for_the_step_that_runs(model, expected):
    scheduler, held, order = model.scheduler, threading.Event(), list[str]()

    def step() -> None:
        held.wait(60)
        order.append("step")

    def fork() -> None:
        scheduler.before_fork()
        order.append("fork")
        scheduler.after_fork(child=False)

    with ThreadPoolExecutor(4) as pool:
        holder = pool.submit(scheduler.exclusively, step)
        until(lambda: scheduler._leader is not None)
        forks = [pool.submit(fork) for _ in range(2)]
        until(lambda: len(scheduler._asking) == 2)
        held.set()
        for future in (holder, *forks):
            future.result(timeout=60)
    assert order == ["step", "fork", "fork"]
    require_same(model, model.generate("f", **OWN), expected["f"])
    require_nothing_left(model)


def test_a_child_goes_on_with_the_model(model, expected):
    """The hooks alone, in this process: threads that waited are not there."""
    scheduler = model.scheduler
    with others_waiting(model, []):
        scheduler.before_fork()
        scheduler._asking.append(object())
        scheduler.after_fork(child=True)
    require_same(model, model.generate("f", **OWN), expected["f"])
    require_nothing_left(model)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process forks here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_forks_while_a_thread_generates(model, expected):
    with ThreadPoolExecutor(1) as pool:
        end = threading.Event()

        def generate() -> None:
            while not end.is_set():
                model.generate("abcabcab", **STREAMS["abcabcab"])

        future = pool.submit(generate)
        until(lambda: model.scheduler._leader is not None)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                require_same(model, model.generate("f", **OWN), expected["f"])
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        end.set()
        future.result(timeout=60)
    assert os.waitstatus_to_exitcode(status) == 0
    require_nothing_left(model)


def test_a_step_s_own_callback_may_fork(model, expected):
    def forks(ids: Any, logits: Any) -> Any:
        Scheduler.before_fork(model.scheduler)
        Scheduler.after_fork(model.scheduler, child=False)
        return logits

    require_same(model, model.generate("f", **OWN, logits_processor=forks), expected["f"])
    require_nothing_left(model)
