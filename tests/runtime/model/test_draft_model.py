"""A model with a draft model: every way to generate gives the text of the model without it."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from pastkey.errors import InputError
from pastkey.runtime import load

from ..conftest import runs_of
from ..tiny_decoder import ALPHABET

DRAWN: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "seed": 1, "prompt_lookup": False}


@pytest.fixture(scope="module")
def near(tiny, letters, make_bundle):
    """A bundle of the same vocabulary that mostly says the same."""
    rng = np.random.default_rng(1)
    weights = {n: (w + rng.normal(0, 0.02, w.shape)).astype(np.float32) for n, w in tiny.weights.items()}
    return make_bundle(dataclasses.replace(tiny, weights=weights), "fused", tokenizer=letters).path


@pytest.fixture
def drafted(speaking_bundle, near):
    with load(speaking_bundle.path, threads=1, draft=near) as model:
        yield model


def test_every_call_gives_the_text_of_the_model_alone(drafted, lm):
    expected, found = (model.generate("abc", logprobs=0, **DRAWN) for model in (lm, drafted))
    assert (found.text, found.ids) == (expected.text, expected.ids)
    numbers = [[place.logprob for place in one.logprobs] for one in (expected, found)]
    np.testing.assert_allclose(numbers[1], numbers[0], atol=1e-4)
    assert 20 < found.accepted_tokens < found.draft_tokens
    assert "".join(chunk.text for chunk in drafted.stream("abc", **DRAWN)) == expected.text
    assert asyncio.run(drafted.agenerate("abc", **DRAWN)).text == expected.text
    assert drafted.generate("abc", draft=False, **DRAWN).draft_tokens == 0
    several: list[tuple[Any, dict[str, Any]]] = [(["abc", "de", "f"], {}), ("abc", {"n": 3})]
    for prompts, options in several:
        one, other = (model.generate(prompts, **options, **DRAWN) for model in (drafted, lm))
        assert [done.ids for done in one] == [done.ids for done in other]


def test_a_session_goes_on_in_both_caches(drafted, lm, monkeypatch):
    """The draft model reads only the part of the text that is new to it."""
    read = runs_of(drafted.draft.model.parts.require_open().graph, monkeypatch)
    with drafted.session() as session, lm.session() as other:
        for text in ("abcdefgh" * 10, "ij", "kl"):
            assert session.generate(text, **DRAWN).text == other.generate(text, **DRAWN).text
    assert max(tokens for _, tokens in read) >= 80
    assert sum(tokens > 8 for _, tokens in read) == 1


def test_its_caches_count_as_memory(speaking_bundle, near, lm):
    """Where there is no room for it, a text does without."""
    needed = lm.memory.estimate(3 + 40 + 1)
    expected = lm.generate("abc", **DRAWN).ids
    for memory, drafts in ((int(1.5 * needed), False), (int(2.5 * needed), True)):
        with load(speaking_bundle.path, threads=1, draft=near, max_memory=memory) as model:
            for _ in range(3):
                found = model.generate("abc", **DRAWN)
                assert found.ids == expected
                assert (found.draft_tokens > 0) == drafts


def test_a_path_is_closed_with_the_model_and_a_model_is_not(speaking_bundle, near):
    with load(speaking_bundle.path, threads=1, draft=near) as model:
        assert model.draft is not None
    assert model.draft.model.closed
    own = load(near, threads=1)
    with load(speaking_bundle.path, threads=1, draft=own) as model:
        assert model.generate("abc", **DRAWN).draft_tokens > 0
        own.close()
        assert model.generate("abc", **DRAWN).draft_tokens == 0
    with load(near, threads=1) as own:
        load(speaking_bundle.path, threads=1, draft=own).close()
        assert not own.closed


def test_a_pickled_model_has_its_draft_model(drafted):
    with pickle.loads(pickle.dumps(drafted)) as again:
        assert again.draft.opened
        assert again.generate("abc", **DRAWN).ids == drafted.generate("abc", **DRAWN).ids
    assert again.draft.model.closed
    assert not drafted.draft.model.closed


# --- what is refused ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("order", "difference"),
    [
        ("ba" + ALPHABET[2:], "the model's token (0|1), '(a|b)', is its (0|1)"),
        (ALPHABET[:-1] + "X", "the model's token 36, 'E', it does not have"),
        (ALPHABET + "XY", "it has 2 tokens that the model does not have"),
    ],
)
def test_another_vocabulary_is_refused(tiny, speaking_bundle, make_bundle, order, difference):
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(order)}, []))
    other = make_bundle(tiny, "fused", tokenizer=tokenizer)
    with pytest.raises(InputError, match=difference):
        load(speaking_bundle.path, threads=1, draft=other.path)


def test_without_tokenizers_the_number_of_ids_counts(fused_bundle):
    load(fused_bundle.path, threads=1, draft=fused_bundle.path).close()
    model, other = load(fused_bundle.path, threads=1), load(fused_bundle.path, threads=1)
    manifest = dataclasses.replace(other.manifest, vocab_size=40)
    other.parts = dataclasses.replace(other.parts, bundle=dataclasses.replace(other.bundle, manifest=manifest))
    with pytest.raises(InputError, match="it has 40 token ids, and the model has 37"):
        load(model.bundle.path, threads=1, draft=other)


def test_a_graph_that_decodes_token_by_token_is_refused(standard_bundle, fused_bundle):
    with pytest.raises(InputError, match=r"a draft model is of no use to .*which decodes token by token"):
        load(standard_bundle.path, threads=1, draft=fused_bundle.path)


@pytest.mark.parametrize(("kind", "fields"), [("standard", {}), ("static", {"chunk": 8})])
def test_any_graph_may_draft(kind, fields, tiny, letters, speaking_bundle, lm, make_bundle):
    other = make_bundle(tiny, kind, tokenizer=letters, **fields)
    with load(speaking_bundle.path, threads=1, draft=other.path) as model:
        found = model.generate("abc", **DRAWN)
    assert found.ids == lm.generate("abc", **DRAWN).ids
    assert found.accepted_tokens == found.draft_tokens > 20
