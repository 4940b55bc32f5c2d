from __future__ import annotations

import threading

import numpy as np
import pytest

from pastkey.errors import InputError
from pastkey.runtime import LanguageModel
from pastkey.runtime.sandbox.model import UntrustedModel
from pastkey.runtime.sandbox.server import read_options
from pastkey.runtime.sandbox.stream import sent_options, sent_value
from pastkey.runtime.stream import Stream


def test_chunks_are_those_of_the_model(untrusted: UntrustedModel, trusted: LanguageModel) -> None:
    mine, theirs = (model.stream("hello", max_new_tokens=9, logprobs=2) for model in (untrusted, trusted))
    assert isinstance(mine, Stream)
    assert mine.completion is None
    assert list(mine) == list(theirs)
    assert mine.completion is not None
    assert "".join(chunk.text for chunk in untrusted.stream("hello", max_new_tokens=9)) == mine.completion.text
    assert next(mine, None) is None


def test_the_value_at_the_end(untrusted: UntrustedModel) -> None:
    stream = untrusted.stream("hello", max_new_tokens=2)
    next(stream)
    next(stream)
    with pytest.raises(StopIteration) as end:
        stream.send(None)
    assert end.value.value is stream.completion
    assert stream.prompt_tokens == 5


def test_close_and_cancel(untrusted: UntrustedModel) -> None:
    with untrusted.stream("hello", max_new_tokens=500) as stream:
        seen = [next(stream) for _ in range(4)]
    completion = stream.completion
    assert completion is not None
    assert completion.finish_reason == "cancelled"
    assert completion.text.startswith("".join(chunk.text for chunk in seen))
    stream.close()
    assert stream.completion is completion
    other = untrusted.stream("hello", max_new_tokens=500)
    next(other)
    other.cancel()
    rest = list(other)
    assert len(rest) < 20
    assert other.completion is not None
    assert other.completion.finish_reason == "cancelled"
    with pytest.raises(KeyError):
        untrusted.stream("hello").throw(KeyError)


def test_unread_and_dropped_streams_hold_nobody_up(untrusted: UntrustedModel) -> None:
    for _ in range(80):  # more than the process has threads
        next(untrusted.stream("hello", max_new_tokens=50))
    kept = [untrusted.stream("hello", max_new_tokens=50) for _ in range(20)]
    for stream in kept:
        next(stream)
    assert untrusted.generate("ab", max_new_tokens=5).new_tokens == 5
    assert [len(list(stream)) for stream in kept] == [49] * 20


def test_a_deadline(untrusted: UntrustedModel) -> None:
    found = untrusted.generate("hello", max_new_tokens=590, timeout=1e-6)
    assert found.finish_reason == "deadline"


def test_one_thread_at_a_time_reads_a_stream(untrusted: UntrustedModel) -> None:
    stream = untrusted.stream("hello", max_new_tokens=5)
    stream._inside.acquire()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="being read by another thread"):
        next(stream)
    stream.close()  # does not wait for the other
    stream._inside.release()  # type: ignore[attr-defined]
    threads = [threading.Thread(target=stream.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stream.completion is not None


def test_options_as_they_are_sent() -> None:
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
    with pytest.raises(InputError, match="stop is b'x'; text, numbers, lists and mappings go to the process"):
        sent_options({"stop": b"x"})
    with pytest.raises(InputError, match=r"x is \[<object"):
        sent_value("x", [object()])
