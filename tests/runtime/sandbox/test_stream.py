from __future__ import annotations

import threading

import numpy as np
import pytest

from pastkey.errors import InputError
from pastkey.runtime.sandbox.server import read_options
from pastkey.runtime.sandbox.stream import sent_options


def test_chunks_are_those_of_the_model(untrusted, trusted):
    mine = untrusted.stream("hello", max_new_tokens=9, logprobs=2)
    assert mine.completion is None
    assert list(mine) == list(trusted.stream("hello", max_new_tokens=9, logprobs=2))
    assert mine.completion is not None
    assert next(mine, None) is None


def test_what_is_wrong_is_raised_at_the_first_token(untrusted):
    stream = untrusted.stream("ß")
    with pytest.raises(InputError, match="no token covers"):
        next(stream)
    assert next(stream, None) is None


def test_the_value_at_the_end(untrusted):
    stream = untrusted.stream("hello", max_new_tokens=1)
    next(stream)
    with pytest.raises(StopIteration) as end:
        stream.send(None)
    assert end.value.value is stream.completion


def test_close_and_cancel(untrusted):
    with untrusted.stream("hello", max_new_tokens=500, logprobs=1) as stream:
        seen = [next(stream) for _ in range(4)]
    completion = stream.completion
    assert completion is not None
    assert (completion.finish_reason, completion.prompt_tokens) == ("cancelled", 5)
    assert completion.text == "".join(chunk.text for chunk in seen)
    assert completion.logprobs == [chunk.logprobs[0] for chunk in seen]
    stream.close()
    assert stream.completion is completion
    other = untrusted.stream("hello", max_new_tokens=500)
    next(other)
    other.cancel()
    assert len(list(other)) < 20
    assert other.completion is not None
    assert other.completion.finish_reason == "cancelled"
    unread = untrusted.stream("hello")
    unread.cancel()
    assert list(unread) == []
    assert unread.completion is not None
    with pytest.raises(KeyError):
        untrusted.stream("hello").throw(KeyError)


def test_unread_and_dropped_streams_hold_nobody_up(untrusted):
    for _ in range(80):  # more than the process has threads
        next(untrusted.stream("hello", max_new_tokens=50))
    kept = [untrusted.stream("hello", max_new_tokens=50) for _ in range(20)]
    for stream in kept:
        next(stream)
    assert untrusted.generate("ab", max_new_tokens=5).new_tokens == 5
    assert [len(list(stream)) for stream in kept] == [49] * 20


def test_a_deadline(untrusted):
    found = untrusted.generate("hello", max_new_tokens=590, timeout=1e-6)
    assert found.finish_reason == "deadline"


def test_one_thread_at_a_time_reads_a_stream(untrusted):
    stream = untrusted.stream("hello", max_new_tokens=500)
    next(stream)
    stream._reading.acquire()
    with pytest.raises(ValueError, match="being read by another thread"):
        next(stream)
    stream._reading.release()
    reading = threading.Thread(target=lambda: list(stream))
    reading.start()
    stream.close()  # from another thread, beside a `next`
    reading.join()
    assert stream.completion is not None
    assert stream.completion.finish_reason == "cancelled"


def test_options_as_they_are_sent():
    given = {
        "logit_bias": {np.int64(3): 1.5}, "stop": ("a", "b"), "suppress_tokens": {4}, "seed": None,
        "temperature": np.float32(0.5), "bad_words_ids": np.array([[1, 2]]), "json_schema": {"type": "object"},
    }  # fmt: skip
    sent = sent_options(given)
    assert sent == {
        "logit_bias": [[3, 1.5]], "stop": ["a", "b"], "suppress_tokens": [4], "seed": None, "temperature": 0.5,
        "bad_words_ids": [[1, 2]], "json_schema": {"type": "object"},
    }  # fmt: skip
    assert read_options(sent)["logit_bias"] == {3: 1.5}
