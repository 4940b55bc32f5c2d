"""Sessions: texts that stay, each with its own cache over the one model."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pastkey.errors import InputError, NumericsError, OptionError, ResourceError
from pastkey.runtime import load
from pastkey.runtime.engine import decoder_graph

SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1}


def test_a_text_goes_on_from_where_it_stands(model):
    session = model.session()
    session.append("once upon")
    first = session.generate(**SETTINGS)
    assert first.ids == model.generate("once upon", **SETTINGS).ids
    assert first.cached_tokens == 9 - 2
    so_far = [*model.prompt_ids("once upon"), *first.ids]
    assert session.ids == so_far
    assert session.text == "once upon" + first.text
    assert len(session) == 21
    second = session.generate(" a time", **SETTINGS)
    whole = [*so_far, *model.prompt_ids(" a time")]
    assert second.ids == model.generate(whole, **SETTINGS).ids
    assert second.prompt_tokens == len(whole)
    assert second.cached_tokens == 20  # the last token of the first was not fed
    third = session.generate(**SETTINGS)
    assert third.ids == model.generate([*whole, *second.ids], **SETTINGS).ids


def test_what_was_yielded_stands_in_the_session(model):
    session = model.session()
    stream = session.stream("abc", **SETTINGS)
    expected = model.generate("abc", **SETTINGS).ids
    assert session.ids == []
    for count in (1, 2, 3):
        next(stream)
        assert session.ids == [*model.prompt_ids("abc"), *expected[:count]]
    for call in (session.generate, session.fork, lambda: session.trim(0), lambda: session.append("x")):
        with pytest.raises(InputError, match="this session has a stream that is not at its end"):
            call()
    stream.close()
    assert session.ids == [*model.prompt_ids("abc"), *expected[:3]]
    assert session.generate(**SETTINGS | {"max_new_tokens": 9}).ids == expected[3:]


def test_a_stream_of_an_earlier_state_is_refused(lm):
    session = lm.session()
    made = session.stream("abc", **SETTINGS)
    session.append("x")
    with pytest.raises(InputError, match="the session went on since this stream was made"):
        next(made)
    assert session.text == "x"


def test_a_text_in_pieces_has_the_tokens_of_the_whole(tiny, make_bundle):
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate("abcdefghi▁")}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    with load(make_bundle(tiny, tokenizer=tokenizer).path, threads=1) as lm:
        session = lm.session()
        session.append("a cab")
        session.append(" fed")
        session.append("")
        assert session.ids == lm.prompt_ids("a cab fed")
        fork = session.fork()
        fork.append("i")
        assert fork.ids == lm.prompt_ids("a cab fedi")
        assert fork.text == "a cab fedi"
        assert session.generate(" a", max_new_tokens=4).ids == lm.generate("a cab fed a", max_new_tokens=4).ids


def test_a_fork_and_its_origin_go_on_apart(model):
    session = model.session()
    session.append("once upon")
    session.generate(**SETTINGS)
    fork = session.fork()
    assert fork.ids == session.ids
    one, other = session.generate(" a", **SETTINGS), fork.generate(" b", **SETTINGS)
    begin = fork.ids[:21]
    assert one.ids == model.generate([*begin, *model.prompt_ids(" a")], **SETTINGS).ids
    assert other.ids == model.generate([*begin, *model.prompt_ids(" b")], **SETTINGS).ids
    assert other.cached_tokens == one.cached_tokens == 20


def test_trim_and_keep_go_back(model):
    session = model.session()
    session.append("once upon a time")
    session.trim(9)
    assert session.text == "once upon"
    assert session.generate(**SETTINGS).ids == model.generate("once upon", **SETTINGS).ids
    assert session.keep("once again") == 5
    assert session.text == "once "
    completion = session.generate("again", **SETTINGS)
    assert completion.ids == model.generate("once again", **SETTINGS).ids
    assert completion.cached_tokens == 5
    for length in (-1, 100, 1.5, True):
        with pytest.raises(InputError, match="cannot be trimmed to"):
            session.trim(length)


def test_what_a_session_cannot_do_is_refused(lm):
    session = lm.session()
    with pytest.raises(InputError, match="the session is empty: append a text first"):
        session.generate()
    wrong: Any
    for wrong in ("", [], [99], "a" * 601, {1: 2}):
        for begin in (session.append, session.generate):
            with pytest.raises(InputError):
                begin(wrong)
        assert session.ids == []
    with pytest.raises(OptionError, match=r"session\.generate\(\) has no option 'reuse_prefix'"):
        session.generate("a", reuse_prefix=True)
    with session:
        session.append("abc")
    assert repr(session) == "<Session, closed>"
    for call in (session.generate, session.fork, lambda: session.append("x"), lambda: session.save("x")):
        with pytest.raises(InputError, match=r"this session is closed: open another with model\.session\(\)"):
            call()


def test_closing_a_session_ends_its_stream_which_cannot_be_copied(lm):
    session = lm.session()
    stream = session.stream("abc", **SETTINGS)
    next(stream)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(InputError, match="a stream can be neither copied nor pickled: give the model"):
            copied(stream)
    session.close()
    assert list(stream) == []
    assert lm.scheduler.live == 0


def test_cancel_from_another_thread_keeps_what_was_generated(lm, monkeypatch):
    expected = lm.generate("abc", max_new_tokens=500).ids
    session = lm.session()
    graph, started, cancelled = lm.require_open().graph, threading.Event(), threading.Event()
    run = graph.run

    def held(*arguments: Any) -> Any:
        started.set()
        assert cancelled.wait(60)
        return run(*arguments)

    monkeypatch.setattr(graph, "run", held)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(session.generate, "abc", max_new_tokens=500)
        assert started.wait(60)
        session.cancel()
        cancelled.set()
        completion = future.result(60)
    monkeypatch.undo()
    assert completion.finish_reason == "cancelled"
    assert completion.new_tokens < 3
    assert session.ids == [*lm.prompt_ids("abc"), *completion.ids]
    rest = session.generate(max_new_tokens=20)
    assert [*completion.ids, *rest.ids] == expected[: completion.new_tokens + 20]


def test_sixteen_sessions_at_the_same_time(lm):
    barrier = threading.Barrier(16)

    def grow(number: int) -> list[int]:
        session = lm.session()
        session.append("abcdefghijklmnop"[number] * (number + 1))
        barrier.wait()
        for text in ("x", " yz", "."):
            session.generate(text, **SETTINGS)
            if number % 3 == 0:
                session = session.fork()
        return session.ids

    def expected(number: int) -> list[int]:
        ids = lm.prompt_ids("abcdefghijklmnop"[number] * (number + 1))
        for text in ("x", " yz", "."):
            ids += lm.prompt_ids(text)
            ids += lm.generate(ids, **SETTINGS).ids
        return ids

    with ThreadPoolExecutor(16) as pool:
        found = [future.result() for future in [pool.submit(grow, number) for number in range(16)]]
    assert found == [expected(number) for number in range(16)]


def test_memory_has_a_limit_that_is_looked_at_before(speaking_bundle):
    per_token = load(speaking_bundle.path, threads=1).memory.estimate(1)
    assert per_token == 4 * 2 * (8 + 8 + 16 + 16)
    model = load(speaking_bundle.path, threads=1, max_memory=100 * per_token)
    assert model.generate("abc", max_new_tokens=90).new_tokens == 90
    with pytest.raises(ResourceError, match=r"the cache of 103 tokens takes .* MiB.*; max_memory is"):
        model.generate("abc", max_new_tokens=100)
    session = model.session()
    session.append("a" * 60)
    with pytest.raises(ResourceError, match=r"the cache of 110 tokens takes"):
        session.append("a" * 50)
    assert len(session) == 60
    with pytest.raises(ResourceError, match="others take"):
        model.generate("abc", max_new_tokens=50)
    session.close()
    assert model.generate("abc", max_new_tokens=50).new_tokens == 50


def test_what_fails_leaves_a_session_as_it_was(tiny, letters, make_bundle, monkeypatch, tmp_path):
    """Beyond 20 tokens the decoder gives NaN."""
    position = tiny.weights["position"].copy()
    position[20:] = np.nan
    damaged = replace(tiny, weights={**tiny.weights, "position": position})
    model = load(make_bundle(damaged, tokenizer=letters).path, threads=1)
    monkeypatch.setattr(decoder_graph, "PREFILL_CHUNK", 8)  # so that the first of several runs end well
    session = model.session()
    session.append("once")
    for failing in (session.append, session.generate):
        with pytest.raises(NumericsError):
            failing("a text that is far longer than those that it takes")
        assert session.text == "once"
    session.save(tmp_path / "saved")
    for one in (session, model.load_session(tmp_path / "saved")):
        assert one.generate(" upon", max_new_tokens=5).ids == model.generate("once upon", max_new_tokens=5).ids
    # What was yielded stands, as in a stream that is closed.
    yielded: list[list[int]] = []
    with pytest.raises(NumericsError):
        yielded.extend(session.ids for _ in session.stream(max_new_tokens=30))
    assert session.ids == yielded[-1]
    assert len(yielded) > 4
