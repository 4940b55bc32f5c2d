"""An interrupt at any moment of a call that runs the steps of all: every other text stays the one of its call alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

import pastkey.runtime
from pastkey.bundle import Bundle
from pastkey.errors import InputError
from pastkey.runtime import LanguageModel, load
from pastkey.runtime.batching.scheduler import Scheduler
from pastkey.runtime.completion import Completion
from pastkey.runtime.generate import Generation
from pastkey.runtime.sampling.log_probs import TokenLogprob
from pastkey.runtime.text.token_bytes import ExactEncoder

from ..interrupt import interrupted
from .waiting import until

if TYPE_CHECKING:
    from ..conftest import Tiny

FOLDER = Path(pastkey.runtime.__file__).parent
NEVER = -1_000_000
DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 1, "logprobs": 1}

# By prompt the options of two streams, for which the interrupted call runs steps, too.
STREAMS: dict[str, dict[str, dict[str, Any]]] = {
    "alike": {"abcabcab": {"max_new_tokens": 12}, "de": {"max_new_tokens": 9}},
    "near their ends": {"abcabcab": {"max_new_tokens": 5}, "de": {"max_new_tokens": 4}},
    "with drafts": {"abababab": {"max_new_tokens": 12, "prompt_lookup": True}, "de": {"max_new_tokens": 4}},
    "with constraints": {
        "abc": {"max_new_tokens": 30, "regex": "[a-d][ef]gggg[hi]jjj[kl]", "logprobs": None},
        "de": {"max_new_tokens": 30, "regex": "x[a-h]{3,9}yyyyyy", "logprobs": None},
    },
    "from their prompts": {
        "abcabcab" * 20: {"max_new_tokens": 4, "prompt_logprobs": True},
        "de" * 40: {"max_new_tokens": 4},
    },
}

# All moments take minutes.
EVERY = pytest.mark.parametrize("every", [97, pytest.param(1, marks=pytest.mark.matrix)])


@pytest.fixture(scope="module", params=["fused", "standard", "static", "int8_kv"])
def bundle(
    request: pytest.FixtureRequest, tiny: Tiny, letters: Tokenizer, make_bundle: Callable[..., Bundle]
) -> Bundle:
    fields: dict[str, dict[str, Any]] = {"static": {"chunk": 8}, "int8_kv": {"int8_kv": True}}
    kind = "fused" if request.param == "int8_kv" else request.param
    return make_bundle(tiny, kind, tokenizer=letters, **fields.get(request.param, {}))


def loaded(bundle: Bundle) -> LanguageModel:
    """The model, whose int8 cache is used after a few tokens, where it has one."""
    model = load(bundle.path, threads=1)
    model.require_open().graph.int8_kv_from = 8
    return model


def same(model: LanguageModel, found: Completion | None, expected: Completion) -> bool:
    """In a run with others the last bits may differ; an int8 cache may have rounded other rows."""
    assert found is not None
    tolerance = 1e-4 if model.bundle.int8_kv_graph is None else 0.02
    told = [
        (done.text, done.ids, done.finish_reason, done.forced_tokens, done.cached_tokens) for done in (found, expected)
    ]
    return told[0] == told[1] and all(
        alike(ours, theirs, tolerance)
        for ours, theirs in (
            (found.logprobs, expected.logprobs),
            (found.prompt_logprobs, expected.prompt_logprobs),
        )
    )


def alike(ours: Sequence[TokenLogprob | None], theirs: Sequence[TokenLogprob | None], tolerance: float) -> bool:
    values = [[None if one is None else one.logprob for one in each] for each in (ours, theirs)]
    return len(values[0]) == len(values[1]) and all(
        one is other is None or abs(one - other) < tolerance for one, other in zip(*values, strict=True)
    )


# Python tells of an interrupt within a `__del__`, and goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@EVERY
@pytest.mark.parametrize("kind", STREAMS)
def test_a_call_that_leads(bundle: Bundle, kind: str, every: int) -> None:
    model, streams = loaded(bundle), STREAMS[kind]
    options = {prompt: {"prompt_lookup": False, **DRAWN, **given} for prompt, given in streams.items()}
    last: dict[str, Any] = {"prompt_lookup": False, **DRAWN, "max_new_tokens": 5}
    expected = {prompt: model.generate(prompt, **given) for prompt, given in options.items()}
    after = model.generate("f", **last)
    for moment in range(0, 99999, every):
        begun = {prompt: model.stream(prompt, **given) for prompt, given in options.items()}
        for _ in range(0 if kind == "from their prompts" else 2):
            for stream in begun.values():
                next(stream)
        others = [stream._generation for stream in begun.values()]
        with others_waiting(model, others), interrupted(FOLDER, moment) as interrupt:
            model.generate("f", **last)
        for prompt, stream in begun.items():
            for _ in stream:
                pass
            assert same(model, stream.completion, expected[prompt]), (moment, prompt)
        assert same(model, model.generate("f", **last), after), moment
        require_nothing_left(model)
        if not interrupt.came:
            break
    assert moment > 300


@contextlib.contextmanager
def others_waiting(model: LanguageModel, generations: list[Generation]) -> Iterator[None]:
    """As if a thread each waited for the next token."""
    scheduler = model.scheduler
    scheduler._live += [generation for generation in generations if generation not in scheduler._live]
    scheduler._waiting += generations
    yield
    scheduler._waiting.clear()


def require_nothing_left(model: LanguageModel) -> None:
    scheduler = model.scheduler
    scheduler.exclusively(lambda: None)
    assert scheduler.live == 0
    assert (scheduler._waiting, scheduler._asking, scheduler._left) == ([], [], [])


# Python tells of an interrupt within a `__del__`, and goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@EVERY
def test_a_session_that_generates(bundle: Bundle, every: int) -> None:
    model, options = loaded(bundle), {**DRAWN, "prompt_lookup": False}
    expected, prompt = model.generate("abcab", max_new_tokens=12, **options), model.prompt_ids("abcab")
    for moment in range(0, 99999, every):
        session = model.session()
        session.append("abcab")
        with interrupted(FOLDER, moment) as interrupt:
            session.generate("", max_new_tokens=6, **options)
        new = len(session.ids) - len(prompt)
        assert session.ids == [*prompt, *expected.ids[:new]], moment
        session.generate("", max_new_tokens=12 - new, **options)
        assert session.ids == [*prompt, *expected.ids], moment
        session.close()
        require_nothing_left(model)
        if not interrupt.came:
            break
    assert moment > 300


@EVERY
def test_a_session_that_a_text_is_appended_to(bundle: Bundle, every: int) -> None:
    model, options = loaded(bundle), {**DRAWN, "prompt_lookup": False, "max_new_tokens": 4}
    first, both = model.prompt_ids("abcab"), model.prompt_ids("abcab" + "fghij" * 40)
    texts = [model.generate(ids, **options).ids for ids in (first, both)]
    for moment in range(0, 99999, every):
        session = model.session()
        session.append(first)
        with interrupted(FOLDER, moment) as interrupt:
            session.append(both[len(first) :])
        assert session.ids in (first, both), moment
        assert session.generate(**options).ids == texts[session.ids[: len(both)] == both], moment
        session.close()
        require_nothing_left(model)
        if not interrupt.came:
            break
    assert moment > 50


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@EVERY
def test_a_session_whose_first_token_fails(bundle: Bundle, every: int, tmp_path: Path) -> None:
    model, first, file = loaded(bundle), "abcab", tmp_path / "a.session"

    def fails(*_: object) -> None:
        raise ValueError("no")

    for moment in range(0, 99999, every):
        session = model.session()
        session.append(first)
        ids = list(session.ids)
        with interrupted(FOLDER, moment) as interrupt, contextlib.suppress(InputError):
            session.generate("defg" * 6, logits_processor=fails, max_new_tokens=3)
        session.save(file)
        assert session.ids[: len(ids)] == ids
        assert model.load_session(file).ids == session.ids, moment
        session.close()
        require_nothing_left(model)
        if not interrupt.came:
            break
    assert moment > 300


@pytest.mark.parametrize("logprobs", [None, 1])
def test_an_interrupt_while_a_constraint_splits_a_text_into_tokens(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, logprobs: int | None
) -> None:
    model, calls, interrupt_at = loaded(bundle), [0], [-1]
    options: dict[str, Any] = {"max_new_tokens": 30, "regex": "[a-d][ef]gggg[hi]jjj[kl]", "logprobs": logprobs}
    expected, encode = model.generate("abc", **options), ExactEncoder.__call__

    def interrupted_once(self: ExactEncoder, text: str) -> list[int]:
        calls[0] += 1
        if calls[0] - 1 == interrupt_at[0]:
            raise KeyboardInterrupt
        return encode(self, text)

    monkeypatch.setattr(ExactEncoder, "__call__", interrupted_once)
    came = True
    while came:
        interrupt_at[0] += 1
        calls[0] = NEVER
        stream = model.stream("abc", **options)
        next(stream)
        calls[0], came = 0, False
        with others_waiting(model, [stream._generation]):
            try:
                model.generate("f", max_new_tokens=8)
            except KeyboardInterrupt:
                came = True
            assert came == (calls[0] > interrupt_at[0])
        calls[0] = NEVER
        for _ in stream:
            pass
        assert same(model, stream.completion, expected)
        calls[0] = 0
        interrupted_too = False
        try:
            model.generate("abc", **options)
        except KeyboardInterrupt:
            interrupted_too = True
        assert interrupted_too == (calls[0] > interrupt_at[0])
        came = came or interrupted_too
        calls[0] = NEVER
        assert same(model, model.generate("abc", **options), expected)
    assert interrupt_at[0] > 0


def fork_hooks(model: LanguageModel, *names: str) -> list[Callable[[], None]]:
    """Each twice: the second does what an interrupt kept the first from."""
    hooks: dict[str, Callable[[Scheduler], None]] = {
        "before": Scheduler.before_fork,
        "after": lambda scheduler: scheduler.after_fork(child=False),
    }
    return [partial(hooks[name], model.scheduler) for name in names for _ in range(2)]


def test_the_hooks_of_a_fork(bundle: Bundle) -> None:
    model, moment, came = loaded(bundle), 0, True
    expected = model.generate("abc", max_new_tokens=3, temperature=0).ids
    hooks = fork_hooks(model, "before", "after")
    while came:
        came = False
        for place in range(4):
            for number, hook in enumerate(hooks):
                with interrupted(FOLDER, moment if number == place else 99999) as interrupt:
                    hook()
                came = came or interrupt.came
                if number == 1:
                    assert model.scheduler._is_within
            assert model.scheduler._lead is None
            assert model.generate("abc", max_new_tokens=3, temperature=0).ids == expected, (place, moment)
            require_nothing_left(model)
        moment += 1
    assert moment > 5


def test_two_threads_that_fork_at_once(bundle: Bundle) -> None:
    model, held = loaded(bundle), threading.Event()
    with ThreadPoolExecutor(4) as pool:
        holder = pool.submit(model.scheduler.exclusively, lambda: held.wait(60))
        until(lambda: model.scheduler._is_led)
        forks = [pool.submit(lambda: [hook() for hook in fork_hooks(model, "before", "after")]) for _ in range(2)]
        until(lambda: len(model.scheduler._asking) == 3)
        held.set()
        holder.result(timeout=60)
        for fork in forks:
            fork.result(timeout=60)
        assert pool.submit(model.generate, "abc", max_new_tokens=3).result(timeout=60).new_tokens == 3
    require_nothing_left(model)
