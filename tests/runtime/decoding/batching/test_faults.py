"""An exception in a run or in an allocation ends its own request; every other text is that of a separate call.

A KeyboardInterrupt leaves the call that leads. Any other exception ends the generations of its run. The faults come at
two seams: the graph's `run`, before onnxruntime or after it, and onnxruntime's memory for arrays.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime import LanguageModel, load
from pastkey.runtime.decoding.completion import Completion
from pastkey.runtime.providers.inference import RunFailedError
from pastkey.runtime.providers.ort import onnxruntime
from pastkey.runtime.text.token_bytes import ExactEncoder

from ...conftest import runs_of
from .waiting import until

pytest.importorskip("llguidance")

DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 1, "logprobs": 1, "prompt_lookup": False}
# Begun before the fault: one that was read, one that has a prefill before it, one with drafts, one with a constraint.
STREAMS: dict[str, dict[str, Any]] = {
    "abcabcab": {**DRAWN, "max_new_tokens": 14},
    "de" * 40: {**DRAWN, "max_new_tokens": 5, "prompt_logprobs": True},
    "abababab": {**DRAWN, "max_new_tokens": 10, "prompt_lookup": True},
    "abc": {"max_new_tokens": 30, "regex": "[a-d][ef]gggg[hi]jjj[kl]", "temperature": 1.0, "seed": 2},
}
READ = ("abcabcab", "abababab", "abc")
LEAD = "fg" * 62  # two runs, and its cache grows while it decodes
OPTIONS: dict[str, Any] = {**DRAWN, "max_new_tokens": 7, "reuse_prefix": True}


@pytest.fixture(scope="module")
def opened(any_bundle):
    return load(any_bundle.path, threads=1)


@pytest.fixture
def model(opened):
    """Nothing is left of a test's calls."""
    yield opened
    require_nothing_left(opened)


@pytest.fixture(scope="module")
def expected(any_bundle):
    """Each text of a separate call."""
    alone = load(any_bundle.path, threads=1)
    return {prompt: alone.generate(prompt, **options) for prompt, options in {**STREAMS, LEAD: OPTIONS}.items()}


class Counted:
    """Counts calls of a function, and raises once at one of them."""

    def __init__(self, call: Callable[..., Any], at: int, error: type[BaseException], *, after: bool = False) -> None:
        self.call, self.at, self.error, self.after, self.calls = call, at, error, after, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        fails = self.calls - 1 == self.at
        found = self.call(*arguments, **options) if self.after or not fails else None
        if fails:
            raise self.error("injected")
        return found


class Hook:
    """A processor of logits."""

    def look(self, ids: Any, logits: Any) -> Any:
        return logits

    def __call__(self, ids: Any, logits: Any) -> Any:
        return self.look(ids, logits)


@contextlib.contextmanager
def fault(
    model: LanguageModel, moment: str, at: int, error: type[BaseException], hook: Hook | None = None
) -> Iterator[Counted]:
    owner: Any = {"memory": onnxruntime.OrtValue, "in a callback": hook}.get(moment, model.require_open().graph)
    name = {"memory": "ortvalue_from_numpy", "in a callback": "look"}.get(moment, "run")
    counted = Counted(getattr(owner, name), at, error, after=moment == "after a run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        yield counted


def require_same(found: Any, expected: Completion) -> None:
    """The text, and in float32 its log-probabilities up to the last bits."""
    assert (found.text, found.ids, found.finish_reason) == (expected.text, expected.ids, expected.finish_reason)
    for name in ("logprobs", "prompt_logprobs"):
        ours, theirs = ([one and one.logprob for one in getattr(each, name)] for each in (found, expected))
        assert ours == pytest.approx(theirs, abs=1e-4)


def require_nothing_left(model: LanguageModel) -> None:
    activity = model.activity
    assert (activity.running, activity.waiting, activity.cache_bytes, model.scheduler.live) == (0, 0, 0, 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("moment", ["before a run", "after a run", "memory", "in a callback"])
def test_a_fault_leaves_every_other_text_as_it_is_alone(model, expected, moment, error):
    """At each run and callback of a call, and at every third of its allocations: in prefill, steps, batches, growth."""
    came, at, hook = True, 0, Hook()
    while came:
        model.scheduler.exclusively(model.scheduler.store.clear)
        watched = {"abcabcab": {"logits_processor": hook}}  # the first row of a batch
        begun = {
            prompt: model.stream(prompt, **options, **watched.get(prompt, {})) for prompt, options in STREAMS.items()
        }
        for prompt in READ:
            next(begun[prompt])
        with fault(model, moment, at, error, hook) as counted, contextlib.suppress(error, InputError):
            model.generate(LEAD, **OPTIONS, logits_processor=hook)
        came, failed = counted.calls > at, 0
        for prompt, stream in begun.items():
            try:
                list(stream)
                require_same(stream.completion, expected[prompt])
            except (OSError, InputError):
                failed += 1
        assert failed <= (len(READ) if came and error is OSError else 0)
        require_same(model.generate(LEAD, **OPTIONS), expected[LEAD])
        require_nothing_left(model)
        at += 3 if moment == "memory" else 1
    assert at > 6


def test_a_fault_while_a_stream_leaves_a_batch_loses_its_cache_alone(model, expected, caplog):
    streams = [model.stream(prompt, **STREAMS[prompt]) for prompt in ("abcabcab", "abc")]
    for stream in streams * 3:
        next(stream)
    with fault(model, "memory", 0, OSError) as counted:
        streams[0].close()
    assert ("the cache of a generation was lost" in caplog.text) is (counted.calls > 0)
    list(streams[1])
    require_same(streams[1].completion, expected["abc"])


class Waiting:
    """A processor of logits: in its first step it waits until other calls wait, and then raises, if it is to."""

    def __init__(self, model: LanguageModel, others: int, error: type[BaseException] | None = None) -> None:
        self.model, self.others, self.error, self.inside = model, others, error, threading.Event()

    def __call__(self, ids: Any, logits: Any) -> Any:
        if not self.inside.is_set():
            self.inside.set()
            until(lambda: self.model.activity.waiting == self.others)
            if self.error is not None:
                raise self.error
        return logits


def beside(model: LanguageModel, gate: Waiting, prompts: Sequence[str]) -> dict[str, Any]:
    """Calls in threads that begin when the first step of "f" has come to its processor: each text, or its error."""

    def called(prompt: str) -> Any:
        try:
            if prompt == "f":
                return model.generate(prompt, max_new_tokens=9, logits_processor=gate)
            assert gate.inside.wait(60)
            return model.generate(prompt, **STREAMS[prompt])
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(prompts) + 1) as pool:
        return dict(zip(["f", *prompts], pool.map(called, ["f", *prompts]), strict=True))


def test_a_leader_that_is_interrupted_leaves_no_one_waiting(model, expected):
    """Threads that wait for its step lead themselves."""
    prompts = ["abcabcab", "abc"]
    found = beside(model, Waiting(model, 2, KeyboardInterrupt), prompts)
    assert isinstance(found["f"], KeyboardInterrupt)
    for prompt in prompts:
        require_same(found[prompt], expected[prompt])


@pytest.mark.parametrize("error", [MemoryError, RunFailedError])
def test_an_error_belongs_to_the_text_whose_run_failed(model, expected, monkeypatch, error):
    """Whichever thread leads."""

    def failing(ids: Any) -> None:
        if 4 in ids and ids.size > 8:  # an e in a prefill
            raise error("injected")

    runs_of(model.require_open().graph, monkeypatch, before=failing)
    found = beside(model, Waiting(model, 2), ["de" * 40, "abc"])
    monkeypatch.undo()
    assert isinstance(found["de" * 40], error)
    assert found["f"].ids == model.generate("f", max_new_tokens=9).ids
    require_same(found["abc"], expected["abc"])


def test_an_interrupt_while_a_constraint_splits_a_text_into_tokens(model, expected, monkeypatch):
    """llguidance swallows what is raised in its call, and is of no use afterwards: the constraint begins anew."""
    call = ExactEncoder.__call__
    for moment in range(3):
        stream = model.stream("abc", **STREAMS["abc"])
        next(stream)
        encoder, came = Counted(call, moment, KeyboardInterrupt), False
        monkeypatch.setattr(ExactEncoder, "__call__", lambda *given, encoder=encoder: encoder(*given))
        try:
            model.generate("f", **{**OPTIONS, "max_new_tokens": 12})
        except KeyboardInterrupt:
            came = True
        monkeypatch.undo()
        assert came is (encoder.calls > moment)
        assert came or moment or not model.require_open().graph.batches
        list(stream)
        require_same(stream.completion, expected["abc"])


# --- forks --------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process forks here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_beside_a_step_goes_on_in_both_processes(model, expected):
    """It waits for the step that runs."""
    gate = Waiting(model, 0)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(model.generate, "abc", max_new_tokens=60, logits_processor=gate)
        assert gate.inside.wait(60)
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # where it waits for a thread that is not there
            try:
                require_same(model.generate(LEAD, **OPTIONS), expected[LEAD])
                os._exit(0)
            finally:
                os._exit(1)
        assert len(future.result(60).ids) == 60
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    require_same(model.generate(LEAD, **OPTIONS), expected[LEAD])


def test_the_hooks_of_a_child_let_it_go_on(model, expected):
    model.scheduler.before_fork()
    model.scheduler.after_fork(child=True)
    require_same(model.generate(LEAD, **OPTIONS), expected[LEAD])
