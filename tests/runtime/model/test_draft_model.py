"""A model with a draft model: every way to generate gives the text of the model alone."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from pastkey.errors import InputError, MissingFileError, OptionError
from pastkey.runtime import load
from pastkey.runtime.speculation.worth import Worth

from ..conftest import runs_of

DRAWN: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "seed": 1, "prompt_lookup": False}


@pytest.fixture(scope="module")
def near(tiny, letters, make_bundle):
    """A bundle of the same vocabulary that mostly says the same."""
    rng = np.random.default_rng(1)
    weights = {name: weight + rng.normal(0, 0.02, weight.shape) for name, weight in tiny.weights.items()}
    weights = {name: weight.astype(np.float32) for name, weight in weights.items()}
    return make_bundle(dataclasses.replace(tiny, weights=weights), "fused", tokenizer=letters).path


@pytest.fixture
def always(monkeypatch):
    """Three tokens are drafted in each step, whatever that costs."""
    monkeypatch.setattr(Worth, "tokens", lambda self, rate, behind, most: min(3, most))


@pytest.fixture
def drafted(speaking_bundle, near, always):
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
    prompts = ["abc", "de", "f"]
    assert [done.ids for done in drafted.generate(prompts, **DRAWN)] == [
        lm.generate(prompt, **DRAWN).ids for prompt in prompts
    ]
    assert [done.ids for done in drafted.generate("abc", n=3, **DRAWN)] == [
        done.ids for done in lm.generate("abc", n=3, **DRAWN)
    ]


def test_a_session_goes_on_in_both_caches(drafted, lm, monkeypatch):
    """The draft model reads no more of the text than what is new to it."""
    assert drafted.draft is not None
    engine = drafted.draft.model.parts.require_open()
    read = runs_of(engine.graph, monkeypatch)
    session, other = drafted.session(), lm.session()
    for text in ("abcdefgh" * 10, "ij", "kl"):
        assert session.generate(text, **DRAWN).text == other.generate(text, **DRAWN).text
    assert max(tokens for _, tokens in read) >= 80
    assert sum(tokens > 8 for _, tokens in read) == 1
    session.close()


def test_its_caches_count_as_memory(speaking_bundle, near, always, lm):
    """Where there is no room for it, a text does without."""
    needed = lm.memory.estimate(3 + 40 + 1)
    expected = lm.generate("abc", **DRAWN).ids
    for memory, drafts in ((int(1.5 * needed), False), (int(2.5 * needed), True)):
        with load(speaking_bundle.path, threads=1, draft=near, max_memory=memory) as model:
            for _ in range(3):
                found = model.generate("abc", **DRAWN)
                assert found.ids == expected
                assert (found.draft_tokens > 0) == drafts


def test_a_path_is_closed_with_the_model_and_a_model_is_not(speaking_bundle, near, always):
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
def other_letters(order: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(order)}, []))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.mark.parametrize(
    ("order", "difference"),
    [
        ("bacdefghijklmnopqrstuvwxyzé日 .<>ABCDE", "the model's token (0|1), '(a|b)', is its (0|1)"),
        ("abcdefghijklmnopqrstuvwxyzé日 .<>ABCDX", "the model's token 36, 'E', it does not have"),
        ("abcdefghijklmnopqrstuvwxyzé日 .<>ABCDEXY", "it has 2 tokens that the model does not have"),
    ],
)
def test_another_vocabulary_is_refused(tiny, speaking_bundle, make_bundle, order, difference):
    other = make_bundle(tiny, "fused", tokenizer=other_letters(order))
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


@pytest.mark.parametrize("kind", ["standard", "static"])
def test_any_graph_may_draft(
    tiny, letters, speaking_bundle, lm, always,
    make_bundle, kind):  # fmt: skip
    fields = {"chunk": 8} if kind == "static" else {}
    other = make_bundle(tiny, kind, tokenizer=letters, **fields)
    with load(speaking_bundle.path, threads=1, draft=other.path) as model:
        found = model.generate("abc", **DRAWN)
        assert found.ids == lm.generate("abc", **DRAWN).ids
        assert found.accepted_tokens == found.draft_tokens > 20


def test_options_are_named(lm, drafted, speaking_bundle, tmp_path):
    with pytest.raises(OptionError, match="did you mean 'draft'"):
        drafted.generate("abc", drafts=True)
    assert lm.generate("abc", draft=False, max_new_tokens=1).new_tokens == 1
    with pytest.raises(MissingFileError):
        load(speaking_bundle.path, draft=tmp_path / "none")
