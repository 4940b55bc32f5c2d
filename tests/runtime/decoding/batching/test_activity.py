"""How busy a model is, and the limit of its queue."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from pastkey.errors import QueueFullError
from pastkey.runtime import load


@pytest.fixture
def lm(fused_bundle):
    return load(Path(fused_bundle.path), threads=1, max_batch=2, max_queue=1)


def test_a_request_beyond_the_queue_is_refused(lm):
    streams = [lm.stream([1, 2, number], max_new_tokens=4) for number in range(3)]
    with pytest.raises(QueueFullError, match="3 requests are open"):
        lm.stream([1])
    with pytest.raises(QueueFullError):
        lm.generate([[1], [2]])
    assert [len(list(stream)) for stream in streams] == [4, 4, 4]
    assert len(lm.generate([1, 2], max_new_tokens=2).ids) == 2
    assert len(lm.generate([[1, 2]] * 9, max_new_tokens=2)) == 9  # a call that has begun is not cut


@pytest.mark.parametrize("end", ["close", "drop", "cancel"])
def test_a_stream_that_ends_gives_its_place_back(lm, end):
    streams = [lm.stream([1, 2, number], max_new_tokens=4) for number in range(3)]
    next(streams[0])
    if end == "close":
        streams[0].close()
    elif end == "cancel":
        streams[0].cancel()
        list(streams[0])
    del streams[0]
    gc.collect()
    assert len(list(lm.stream([1], max_new_tokens=2))) == 2


def test_the_activity_counts_what_runs_waits_and_was_done(lm):
    before = lm.activity
    assert (before.running, before.waiting, before.requests) == (0, 0, 0)
    first, second = (lm.stream([1, 2, 3], max_new_tokens=5, reuse_prefix=True) for _ in range(2))
    next(first)
    now = lm.activity
    assert (now.running, now.waiting) == (1, 1)
    assert now.cache_bytes > 0
    list(first)
    list(second)
    after = lm.activity
    assert (after.running, after.waiting, after.cache_bytes) == (0, 0, 0)
    assert (after.requests, after.prompt_tokens, after.new_tokens) == (2, 6, 10)
    assert after.cached_tokens == second.completion.cached_tokens > 0
    assert after.cached_prefixes == 1
    assert after.prefix_bytes > 0
