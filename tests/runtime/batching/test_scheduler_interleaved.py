"""The scheduler's threads one at a time, in chosen orders: what the hardware may do some day, each time alike."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

from pastkey.bundle import Bundle
from pastkey.errors import InputError
from pastkey.runtime import LanguageModel, load
from pastkey.runtime.batching import scheduler as scheduler_module

from .interleaving import Interleaving, at_random, every_interleaving

if TYPE_CHECKING:
    from ..conftest import Tiny

PROMPTS = ([1, 2, 3], [4], [5, 6] * 40)
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "temperature": 1.0, "seed": 3, "prompt_lookup": False}


@pytest.fixture(scope="module")
def bundle(tiny: Tiny, letters: Tokenizer, make_bundle: Callable[..., Bundle]) -> Bundle:
    return make_bundle(tiny, "fused", tokenizer=letters)


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> list[list[int]]:
    alone = load(bundle.path, threads=1)
    return [alone.generate(prompt, **OPTIONS).ids for prompt in PROMPTS]


@pytest.fixture
def interleaved(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Interleaving]:
    """Runs functions of a new model in threads, by a choice, and looks at the model afterwards."""

    def run(choose: Callable[[int], int], *works: Callable[[LanguageModel], object]) -> Interleaving:
        interleaving = Interleaving(choose)
        with monkeypatch.context() as patch:
            patch.setattr(scheduler_module, "threading", interleaving.threading)
            model = load(bundle.path, threads=1)
            interleaving.run(*[lambda work=work: work(model) for work in works])
            assert interleaving.timeouts == 0, "somebody was not woken"
            if not model.closed:
                gc.collect()
                model.scheduler.exclusively(lambda: None)
                assert model.scheduler.live == 0
        return interleaving

    return run


def generates(place: int, expected: list[list[int]]) -> Callable[[LanguageModel], None]:
    def work(model: LanguageModel) -> None:
        assert model.generate(PROMPTS[place], **OPTIONS).ids == expected[place]

    return work


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "least"), [(1, 40), pytest.param(2, 1000, marks=pytest.mark.matrix)])
def test_two_generations_in_every_order(
    interleaved: Callable[..., Interleaving], expected: list[list[int]], changes: int, least: int
) -> None:
    works = [generates(0, expected), generates(1, expected)]
    count = sum(1 for _ in every_interleaving(changes, lambda choose: interleaved(choose, *works)))
    assert count > least


def cancels(expected: list[list[int]]) -> list[Callable[[LanguageModel], None]]:
    """A stream that another thread cancels, beside one that goes on."""
    streams: list[Any] = []

    def streamed(model: LanguageModel) -> None:
        streams.append(model.stream(PROMPTS[0], **OPTIONS))
        found = [token for chunk in streams[0] for token in chunk.ids]
        assert found == expected[0][: len(found)]

    def cancelling(model: LanguageModel) -> None:
        for stream in streams:
            stream.cancel()

    return [streamed, cancelling, generates(1, expected)]


def leaves(expected: list[list[int]]) -> list[Callable[[LanguageModel], None]]:
    """A stream that is closed after its first token, and one that is never read."""

    def closed(model: LanguageModel) -> None:
        stream, unread = model.stream(PROMPTS[0], **OPTIONS), model.stream(PROMPTS[1], **OPTIONS)
        assert next(stream).ids == expected[0][:1]
        stream.close()
        del unread

    return [closed, generates(1, expected), generates(2, expected)]


def keeps(expected: list[list[int]]) -> list[Callable[[LanguageModel], None]]:
    """A session that is appended to, forked and trimmed, beside generations that keep their prefixes."""

    def session(model: LanguageModel) -> None:
        with model.session() as first:
            first.append(PROMPTS[0])
            with first.fork() as second:
                assert second.generate(**OPTIONS).ids == expected[0]
                second.trim(2)
            assert first.generate(**OPTIONS).ids == expected[0]

    def reuses(model: LanguageModel) -> None:
        for _ in range(2):
            assert model.generate(PROMPTS[2], **OPTIONS, reuse_prefix=True).ids == expected[2]

    return [session, reuses]


def closes(expected: list[list[int]]) -> list[Callable[[LanguageModel], None]]:
    """A model that is closed while others generate."""

    def generated(model: LanguageModel) -> None:
        with contextlib.suppress(InputError):  # it may be closed already
            completion = model.generate(PROMPTS[0], **OPTIONS)
            assert completion.ids == expected[0][: len(completion.ids)]
            assert completion.finish_reason in ("length", "cancelled")

    return [generated, generated, LanguageModel.close]


SCENES: dict[str, Callable[[list[list[int]]], list[Callable[[LanguageModel], None]]]] = {
    "three generations": lambda expected: [generates(place, expected) for place in range(3)],
    "cancelled": cancels,
    "left": leaves,
    "kept": keeps,
    "closed": closes,
}


@pytest.mark.parametrize("scene", SCENES)
def test_random_orders(interleaved: Callable[..., Interleaving], expected: list[list[int]], scene: str) -> None:
    for seed in range(10):
        interleaved(at_random(seed), *SCENES[scene](expected))


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_many_random_orders(interleaved: Callable[..., Interleaving], expected: list[list[int]], scene: str) -> None:
    for seed in range(60):
        interleaved(at_random(seed, (0.05, 0.2, 0.5)[seed % 3]), *SCENES[scene](expected))
