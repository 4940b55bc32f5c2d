"""Drafts by another model: never another text, whatever the other model says, and nothing of it stays behind."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pastkey.errors import ResourceError
from pastkey.runtime.constraints.matcher import Matcher
from pastkey.runtime.decoding.generation import Generation
from pastkey.runtime.decoding.request import Request
from pastkey.runtime.engine.engine import Engine
from pastkey.runtime.settings import SamplingConfig
from pastkey.runtime.speculation.drafter import REJECTIONS, Drafter

from ..tiny_decoder import V

PROMPT = [5, 6, 7]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "seed": 2},
    {"temperature": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.1, "seed": 3},
]


@pytest.fixture(scope="module")
def engine(fused_bundle):
    return Engine(fused_bundle, threads=1)


@pytest.fixture(scope="module")
def other(tiny, make_bundle):
    """A model near the tiny decoder, as one that was quantized is, which sees less."""
    rng = np.random.default_rng(1)
    weights = {name: weight + rng.normal(0, 0.02, weight.shape) for name, weight in tiny.weights.items()}
    weights["position"] = weights["position"][:100]
    near = dataclasses.replace(
        tiny, context_length=100, weights={name: weight.astype(np.float32) for name, weight in weights.items()}
    )
    return Engine(make_bundle(near, "fused"), threads=1)


def drafter_over(engine: Engine) -> Drafter:
    engine.reset()
    return Drafter(lambda ids, most: engine, lambda engine: None)


def text(engine: Engine, drafter: Drafter | None = None, new: int = 60, **options: Any) -> tuple[list[int], Generation]:
    given = {name: options.pop(name) for name in ("constraint", "end_ids", "prompt_lookup") if name in options}
    generation = Generation(
        engine,
        Request(
            PROMPT,
            max_new_tokens=new,
            sampling=SamplingConfig(**options),
            drafter=drafter,
            **{"prompt_lookup": False, **given},
        ),
    )
    return list(generation), generation


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_text_is_that_without_a_draft_model(engine, other, settings):
    plain, _ = text(engine, **settings)
    for prompt_lookup in (False, True):
        drafted, generation = text(engine, drafter_over(other), prompt_lookup=prompt_lookup, **settings)
        assert drafted == plain
        assert 15 < generation.accepted_tokens < generation.draft_tokens
        assert engine.length == len(PROMPT) + 59  # the last token is not fed, and no rejected one stays


def test_its_own_draft_is_always_accepted(engine, fused_bundle):
    """Also drawn tokens: the draft is drawn by the number of its place in the text."""
    for settings in SETTINGS:
        _, generation = text(engine, drafter_over(Engine(fused_bundle, threads=1)), **settings)
        assert generation.draft_tokens == generation.accepted_tokens > 40


def test_beyond_its_context_nothing_is_drafted(engine, other):
    plain, _ = text(engine, new=200)
    drafted, generation = text(engine, drafter_over(other), new=200)
    assert drafted == plain
    assert other.length <= 100
    assert 0 < generation.draft_tokens < 100


def test_a_draft_ends_before_the_end_of_the_text(engine, fused_bundle):
    plain, _ = text(engine)
    end = next(token for i, token in enumerate(plain) if i >= 4 and token not in plain[:i])
    drafted, generation = text(engine, drafter_over(Engine(fused_bundle, threads=1)), end_ids=[end])
    assert drafted == plain[: plain.index(end)]
    assert generation.finish_reason == "stop"
    assert generation.draft_tokens == generation.accepted_tokens


class OnlyEven(Matcher):
    """A constraint: even tokens."""

    complete = False

    def __init__(self) -> None: ...

    def masked(self, logits: Any) -> Any:
        return np.where(np.arange(logits.size) % 2 == 0, logits, np.float32(-np.inf))

    def require(self, token: int) -> None:
        assert token % 2 == 0

    def follow(self, tokens: Sequence[int], start: int) -> None: ...

    def forced(self, most: int) -> list[int]:
        return []

    def allowed_draft(self, draft: Sequence[int]) -> list[int]:
        return [token for place, token in enumerate(draft) if not any(other % 2 for other in draft[: place + 1])]


def test_a_constraint_holds_for_drafts(engine, other):
    plain, _ = text(engine, constraint=OnlyEven())
    drafted, generation = text(engine, drafter_over(other), constraint=OnlyEven())
    assert drafted == plain
    assert not any(token % 2 for token in plain)
    assert generation.accepted_tokens > 5


def test_another_number_of_padded_ids_is_no_other_vocabulary(engine, tiny, make_bundle):
    drafter, sizes = drafter_over(Engine(make_bundle(tiny, "fused"), threads=1)), []
    for size in (V + 3, V - 3):
        drafter.begin(lambda logits, ids: sizes.append(logits.size) or int(np.argmax(logits)), (), size, None)  # type: ignore[func-returns-value]
        assert drafter.draft([1, 2], 9)[0] < V - 3
    assert sizes == [V + 3, V - 3]


def test_drafts_end_after_some_in_a_row_were_rejected(other):
    given_back: list[Engine] = []
    other.reset()
    drafter = Drafter(lambda ids, most: other, given_back.append)
    drafter.begin(lambda logits, ids: 9, (), V, None)
    for accepted in (0, 1, *[0] * REJECTIONS):
        assert set(drafter.draft([1, 2], 9)) == {9}
        assert not given_back
        drafter.record(1, accepted)
    assert drafter.draft([1, 2], 9) == []
    assert given_back == [other]


# --- what fails ---------------------------------------------------------------------------------------------------
def test_nan_of_the_draft_model_ends_only_the_drafts(engine, tiny, make_bundle, caplog):
    weights = {**tiny.weights, "position": tiny.weights["position"].copy()}
    weights["position"][20:] = np.nan
    broken = Engine(make_bundle(dataclasses.replace(tiny, weights=weights), "fused"), threads=1)
    given_back: list[Engine] = []
    drafter = Drafter(lambda ids, most: broken, given_back.append)
    plain, _ = text(engine)
    drafted, generation = text(engine, drafter)
    assert drafted == plain
    assert 0 < generation.accepted_tokens < 20
    assert given_back == [broken]
    assert "the draft model failed" in caplog.text


def test_no_memory_for_it_is_no_error(engine, caplog):
    def refuse(ids: Sequence[int], most: int) -> Engine:
        raise ResourceError("there is none")

    drafted, generation = text(engine, Drafter(refuse, lambda engine: None))
    assert drafted == text(engine)[0]
    assert generation.draft_tokens == 0
    assert not caplog.text


def test_an_interrupt_within_a_draft_leaves_the_text_right(engine, other, monkeypatch):
    plain, _ = text(engine)
    run, calls = other.graph.run, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 9 == 0:
            raise KeyboardInterrupt
        return run(*arguments)

    drafter = drafter_over(other)
    monkeypatch.setattr(other.graph, "run", interrupted)
    generation = Generation(engine, Request(PROMPT, max_new_tokens=60, prompt_lookup=False, drafter=drafter))
    while generation.finish_reason is None:
        with contextlib.suppress(KeyboardInterrupt):
            list(generation)
    assert generation.ids[len(PROMPT) :] == plain
    assert calls > 10
    assert generation.accepted_tokens > 10


def test_functions_of_the_users_see_no_draft(engine, other):
    seen: list[int] = []

    def watched(ids: Any, logits: Any) -> Any:
        seen.append(len(ids))
        return logits

    _, generation = text(engine, drafter_over(other), logits_processor=watched)
    assert generation.accepted_tokens > 20
    assert seen == list(range(3, 63))
