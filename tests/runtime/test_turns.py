"""One generation at a time on a model, in order of arrival, whichever threads advance it.

Threads wait for one another by events and by the length of the queue. No test goes by time but those in which a thread
has to find out something that nobody tells it.
"""

from __future__ import annotations

import _thread
import asyncio
import functools
import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from pastkey.bundle import Bundle
from pastkey.errors import InputError, NumericsError
from pastkey.runtime import Chunk, LanguageModel, load, turns
from pastkey.runtime.turns import Turns

if TYPE_CHECKING:
    from .conftest import Tiny

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}.{% endfor %}<assistant>"
SETTINGS: dict[str, Any] = {"max_new_tokens": 25, "temperature": 1.0, "seed": 1}
OWN = "this thread was the last to advance a stream of this model that is not at its end"


@pytest.fixture(scope="module")
def talking(tiny: Tiny, letters: Tokenizer, make_bundle: Callable[..., Bundle]) -> Bundle:
    return make_bundle(tiny, "fused", tokenizer=letters, tokenizer_config={"chat_template": TEMPLATE})


@pytest.fixture
def model(talking: Bundle) -> LanguageModel:
    return load(talking.path, threads=1)


@pytest.fixture(scope="module")
def fresh(talking: Bundle) -> LanguageModel:
    """Another model of the same weights, for what an answer should be."""
    return load(talking.path, threads=1)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def started(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread does."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.001)


def until_queued(model: LanguageModel, count: int) -> None:
    """Waits until so many generations have a turn or wait for one."""
    until(lambda: len(model._turns._queue) == count)


def until_waiting(queue: Turns, count: int) -> None:
    """Waits until so many wait behind the one that has the turn."""
    until(lambda: len(queue._queue) == count + 1)


# --- taking turns -------------------------------------------------------------------------------------------------
def test_waiting_threads_are_served_in_order_of_arrival() -> None:
    queue, order = Turns(), []

    def take(place: int) -> None:
        with queue.take():
            order.append(place)

    threads = []
    with queue.take():
        for place in range(20):
            threads.append(started(functools.partial(take, place)))
            until_waiting(queue, place + 1)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == list(range(20))
    assert len(queue._queue) == 0


def test_one_has_the_turn_at_a_time(pool: ThreadPoolExecutor) -> None:
    queue, inside, most, barrier = Turns(), 0, 0, threading.Barrier(16)

    def take() -> None:
        nonlocal inside, most
        barrier.wait()
        for _ in range(200):
            with queue.take():
                inside += 1
                most = max(most, inside)
                inside -= 1

    for future in [pool.submit(take) for _ in range(16)]:
        future.result()
    assert most == 1


def test_every_kind_of_generation_waits_for_the_others(
    model: LanguageModel, fresh: LanguageModel, pool: ThreadPoolExecutor
) -> None:
    kinds: list[Callable[[LanguageModel], Any]] = [
        lambda lm: lm.generate("abc", **SETTINGS).ids,
        lambda lm: [token for chunk in lm.stream("de", **SETTINGS) for token in chunk.ids],
        lambda lm: lm.chat().ask("hello", **SETTINGS).ids,
        lambda lm: [token for chunk in lm.chat().stream("you", **SETTINGS) for token in chunk.ids],
        lambda lm: lm.logits([1, 2, 3]).tolist(),
    ]
    expected = [kind(fresh) for kind in kinds]
    stream = model.stream("first", **SETTINGS)
    said = [next(stream)]
    futures: list[Future[Any]] = []
    for kind in kinds:
        futures.append(pool.submit(kind, model))
        until_queued(model, 1 + len(futures))
    assert not any(future.done() for future in futures)
    said += pool.submit(list, stream).result()
    assert [chunk.ids for chunk in said] == [chunk.ids for chunk in fresh.stream("first", **SETTINGS)]
    assert [future.result() for future in futures] == expected


def test_eight_threads_hold_a_conversation_each(
    model: LanguageModel, fresh: LanguageModel, pool: ThreadPoolExecutor
) -> None:
    barrier = threading.Barrier(8)

    def converse(lm: LanguageModel, place: int) -> list[dict[str, str]]:
        chat = lm.chat("be " + "abcdefgh"[place])
        if lm is model:
            barrier.wait()
        for text in ("hello", "and now", "bye"):
            chat.ask(text, **SETTINGS)
        return chat.messages

    futures = [pool.submit(converse, model, place) for place in range(8)]
    assert [future.result() for future in futures] == [converse(fresh, place) for place in range(8)]


# --- streams ------------------------------------------------------------------------------------------------------
def test_a_stream_that_was_only_made_takes_nothing(model: LanguageModel, fresh: LanguageModel) -> None:
    model.generate("abc", **SETTINGS)
    length = model._engine.length
    made = model.stream("world", **SETTINGS)
    conversation = model.chat()
    asked = conversation.stream("hello", **SETTINGS)
    assert model._engine.length == length
    assert model.generate("abc", reuse_prefix=True, max_new_tokens=1).reused_tokens == 2
    for refused in ({"temperature": -1}, {"max_new_tokens": -1}, {"stop": ""}):
        with pytest.raises(InputError):
            model.stream("abc", **refused)
    for prompt in ("", "a" * 601, [99], []):
        with pytest.raises(InputError):
            model.stream(prompt)
    assert [chunk.ids for chunk in made] == [chunk.ids for chunk in fresh.stream("world", **SETTINGS)]
    assert [chunk.ids for chunk in asked] == [chunk.ids for chunk in fresh.chat().stream("hello", **SETTINGS)]


def test_a_stream_may_come_from_another_thread_each_time(model: LanguageModel, fresh: LanguageModel) -> None:
    """As a web framework takes it: the next chunk by whichever thread of its pool is free, several clients at once."""
    prompts = ["a", "bc", "def", "g"]

    async def client(executor: ThreadPoolExecutor, prompt: str) -> list[Chunk]:
        stream, chunks, threads = model.stream(prompt, **SETTINGS), [], set()

        def advance() -> Chunk | None:
            threads.add(threading.get_ident())
            return next(stream, None)

        while chunk := await asyncio.get_running_loop().run_in_executor(executor, advance):
            chunks.append(chunk)
        moved.append(len(threads) > 1)
        return chunks

    async def serve() -> list[list[Chunk]]:
        with ThreadPoolExecutor(4 * len(prompts)) as executor:
            return await asyncio.gather(*(client(executor, prompt) for prompt in prompts * 4))

    moved: list[bool] = []
    expected = [list(fresh.stream(prompt, **SETTINGS)) for prompt in prompts]
    for _ in range(3):
        assert asyncio.run(serve()) == expected * 4
    assert any(moved)


def test_a_thread_that_waits_for_its_own_stream_goes_on_when_another_advances_it(
    model: LanguageModel, fresh: LanguageModel
) -> None:
    """A pool's thread takes the first step of one stream, and is then given another client's."""
    first, second = model.stream("abc", **SETTINGS), model.stream("de", **SETTINGS)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        said = [one.submit(next, first).result()]
        waiting = one.submit(list, second)
        until_queued(model, 2)
        said += other.submit(list, first).result()
        assert said == list(fresh.stream("abc", **SETTINGS))
        assert waiting.result() == list(fresh.stream("de", **SETTINGS))


@pytest.mark.parametrize("alone", [True, False])
def test_a_thread_that_waits_for_itself_is_told_so(
    model: LanguageModel, fresh: LanguageModel, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """At once where there is no other thread that might go on with the stream."""
    monkeypatch.setattr(threading, "active_count", lambda: 1 if alone else 2)
    monkeypatch.setattr(turns, "PATIENCE_SECONDS", float("inf") if alone else 0.2)
    stream = model.stream("abc", **SETTINGS)
    said = [next(stream)]
    chat = model.chat()
    for call in (
        lambda: model.generate("de"),
        lambda: next(model.stream("de")),
        lambda: chat.ask("hello"),
        lambda: model.logits([1, 2]),
    ):
        with pytest.raises(InputError, match=OWN):
            call()
    assert chat.messages == []
    said += stream
    assert said == list(fresh.stream("abc", **SETTINGS))
    assert model.generate("de", **SETTINGS).ids == fresh.generate("de", **SETTINGS).ids


# --- letting go ---------------------------------------------------------------------------------------------------
@pytest.fixture
def waiting(model: LanguageModel, pool: ThreadPoolExecutor) -> Callable[[], Future[Any]]:
    """Lets another thread wait for the model."""

    def wait() -> Future[Any]:
        future = pool.submit(model.generate, "de", **SETTINGS)
        until_queued(model, 2)
        return future

    return wait


def test_a_stream_that_another_thread_closes_lets_go(
    model: LanguageModel, fresh: LanguageModel, pool: ThreadPoolExecutor, waiting: Callable[[], Future[Any]]
) -> None:
    stream = model.stream("abc", **SETTINGS)
    next(stream)
    future = waiting()
    pool.submit(stream.close).result()
    assert future.result().ids == fresh.generate("de", **SETTINGS).ids


@pytest.mark.parametrize("kind", ["stream", "chat"])
def test_a_stream_that_is_collected_lets_go(
    model: LanguageModel, fresh: LanguageModel, waiting: Callable[[], Future[Any]], kind: str
) -> None:
    circle: list[Any] = [model.stream("abc") if kind == "stream" else model.chat().stream("abc")]
    next(circle[0])
    circle.append(circle)
    future = waiting()
    assert not future.done()
    del circle
    gc.collect()
    assert future.result().ids == fresh.generate("de", **SETTINGS).ids


def test_a_stream_whose_thread_has_ended_lets_go_to_those_who_wait(
    model: LanguageModel, fresh: LanguageModel, waiting: Callable[[], Future[Any]]
) -> None:
    streams: list[Any] = []

    def begin() -> None:
        streams.append(model.stream("abc", **SETTINGS))
        next(streams[0])

    started(begin).join()
    future = waiting()
    assert future.result().ids == fresh.generate("de", **SETTINGS).ids
    with pytest.raises(
        InputError, match="the thread that advanced this stream has ended, and its turn went to another"
    ):
        next(streams[0])
    assert model.generate("de", **SETTINGS).ids == fresh.generate("de", **SETTINGS).ids


def test_a_stream_whose_thread_has_ended_goes_on_in_another_where_nobody_waits(
    model: LanguageModel, fresh: LanguageModel
) -> None:
    stream = model.stream("abc", **SETTINGS)
    said: list[Chunk] = []
    started(lambda: said.append(next(stream))).join()
    assert [*said, *stream] == list(fresh.stream("abc", **SETTINGS))


def test_an_error_lets_go_and_leaves_the_conversation_as_it_was(
    tiny: Tiny, letters: Tokenizer, make_bundle: Callable[..., Bundle]
) -> None:
    """The model yields infinity at position 40: inside the second answer."""
    weights = dict(tiny.weights)
    weights["position"] = weights["position"].copy()
    weights["position"][40] = np.inf
    broken = type(tiny)(tiny.layers, tiny.context_length, weights)
    bundle = make_bundle(broken, "fused", tokenizer=letters, tokenizer_config={"chat_template": TEMPLATE})
    model = load(bundle.path, threads=1)
    chat = model.chat()
    chat.ask("a", max_new_tokens=1)
    before = chat.messages
    for answer in (lambda: chat.ask("b"), lambda: list(chat.stream("b"))):
        with pytest.raises(NumericsError):
            answer()
        assert chat.messages is before
    said: list[int] = []
    stream = chat.stream("b")
    with pytest.raises(NumericsError):  # half an answer is there until it dies
        said.extend(len(chat.messages) for _ in stream)
    assert set(said) == {len(before) + 2}
    assert chat.messages is before
    assert model.generate("abc", max_new_tokens=3).new_tokens == 3


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signal can be sent to a thread here")
def test_waiting_can_be_interrupted(
    model: LanguageModel, fresh: LanguageModel, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = model.stream("abc", **SETTINGS)
    said = [pool.submit(next, stream).result()]
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        until_queued(model, 2)
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        interrupting = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate("de")
        interrupting.result()
    finally:
        signal.signal(signal.SIGINT, before)
    said += pool.submit(list, stream).result()
    assert said == list(fresh.stream("abc", **SETTINGS))
    assert model.generate("de", **SETTINGS).ids == fresh.generate("de", **SETTINGS).ids


def test_a_turn_that_an_interrupt_left_behind_is_passed_on() -> None:
    """It may come between any two steps: before the turn was held, and before the next one's gate was opened."""
    queue = Turns()
    queue._queue.append(weakref.ref(turns.Turn()))
    with queue.take():
        thread = started(lambda: queue.take().__enter__())
        until(lambda: len(queue._queue) == 2)
        queue._pass_on = lambda: None  # type: ignore[method-assign]
    del queue._pass_on
    thread.join()
    assert len(queue._queue) == 0


def test_a_thread_that_threading_did_not_start_lets_go_when_it_has_ended(model: LanguageModel) -> None:
    ended = threading.Event()
    streams: list[Any] = []

    def run() -> None:
        streams.append(model.stream("abc", **SETTINGS))
        next(streams[0])
        ended.set()

    _thread.start_new_thread(run, ())
    assert ended.wait(60)
    assert model.generate("abc", max_new_tokens=3).new_tokens == 3
    with pytest.raises(InputError, match="has ended, and its turn went to another generation"):
        next(streams[0])
