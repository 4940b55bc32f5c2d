"""An interrupt at any moment of a call that runs the steps of all: every other text stays the one of its call alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

import pastkey.runtime
from pastkey.bundle import Bundle
from pastkey.runtime import LanguageModel, load
from pastkey.runtime.completion import Completion

from ..interrupt import interrupted

if TYPE_CHECKING:
    from ..conftest import Tiny

FOLDER = Path(pastkey.runtime.__file__).parent
DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 1, "logprobs": 1}

# By prompt the options of two streams, both of which the interrupted call decodes ahead.
STREAMS: dict[str, dict[str, dict[str, Any]]] = {
    "alike": {"abcabcab": {"max_new_tokens": 12}, "de": {"max_new_tokens": 9}},
    "near their ends": {"abcabcab": {"max_new_tokens": 5}, "de": {"max_new_tokens": 4}},
    "with drafts": {"abababab": {"max_new_tokens": 12, "prompt_lookup": True}, "de": {"max_new_tokens": 4}},
    "with constraints": {
        "abc": {"max_new_tokens": 30, "regex": "[a-d][ef]gggg[hi]jjj[kl]", "logprobs": None},
        "de": {"max_new_tokens": 30, "regex": "x[a-h]{3,9}yyyyyy", "logprobs": None},
    },
}

# All moments take minutes.
EVERY = pytest.mark.parametrize("every", [97, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.matrix])])


@pytest.fixture(scope="module", params=["fused", "standard", "static", "int8_kv"])
def bundle(
    request: pytest.FixtureRequest, tiny: Tiny, letters: Tokenizer, make_bundle: Callable[..., Bundle]
) -> Bundle:
    fields: dict[str, dict[str, Any]] = {"static": {"chunk": 8}, "int8_kv": {"int8_kv": True}}
    kind = "fused" if request.param == "int8_kv" else request.param
    return make_bundle(tiny, kind, tokenizer=letters, **fields.get(request.param, {}))


def same(found: Completion | None, expected: Completion) -> bool:
    assert found is not None
    return (found.text, found.ids, found.finish_reason, len(found.logprobs)) == (
        expected.text,
        expected.ids,
        expected.finish_reason,
        len(expected.logprobs),
    )


# Python tells of an interrupt within a `__del__`, and goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@EVERY
@pytest.mark.parametrize("kind", STREAMS)
def test_a_call_that_leads(bundle: Bundle, kind: str, every: int) -> None:
    model, streams = load(bundle.path, threads=1), STREAMS[kind]
    options = {prompt: {"prompt_lookup": False, **DRAWN, **given} for prompt, given in streams.items()}
    last: dict[str, Any] = {"prompt_lookup": False, **DRAWN, "max_new_tokens": 5}
    expected = {prompt: model.generate(prompt, **given) for prompt, given in options.items()}
    after = model.generate("f", **last)
    for moment in range(0, 99999, every):
        begun = {prompt: model.stream(prompt, **given) for prompt, given in options.items()}
        for _ in range(2):
            for stream in begun.values():
                next(stream)
        with interrupted(FOLDER, moment) as interrupt:
            model.generate("f", **last)
        for prompt, stream in begun.items():
            for _ in stream:
                pass
            assert same(stream.completion, expected[prompt]), (moment, prompt)
        assert same(model.generate("f", **last), after), moment
        require_nothing_left(model)
        if not interrupt.came:
            break
    assert moment > 1000


def require_nothing_left(model: LanguageModel) -> None:
    scheduler = model.scheduler
    scheduler.exclusively(lambda: None)
    assert scheduler.live == 0
    assert (scheduler._waiting, scheduler._asking, scheduler._left) == ([], [], [])


# Python tells of an interrupt within a `__del__`, and goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@EVERY
def test_a_session_that_generates(bundle: Bundle, every: int) -> None:
    model, options = load(bundle.path, threads=1), {**DRAWN, "prompt_lookup": False}
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
    assert moment > 1000


@EVERY
def test_a_session_that_a_text_is_appended_to(bundle: Bundle, every: int) -> None:
    model, options = load(bundle.path, threads=1), {**DRAWN, "prompt_lookup": False, "max_new_tokens": 4}
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
    assert moment > 100
