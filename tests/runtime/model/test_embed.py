"""Embeddings against the decoder in numpy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError, NumericsError, ResourceError
from pastkey.runtime import Engine, load
from pastkey.runtime.engine import decoder_graph

from ..conftest import ids_of, require_close
from ..tiny_decoder import E

POOLINGS = {"mean": lambda states: states.mean(0), "last": lambda states: states[-1], "none": lambda states: states}


@pytest.fixture(scope="module", params=["fused", "standard", "no_padding"])
def embedding_bundle(request, tiny, letters, make_bundle):
    graph = "fused" if request.param == "fused" else "standard"
    fields = {"padding": False} if request.param == "no_padding" else {}
    return make_bundle(tiny, graph, tokenizer=letters, hidden_size=E, **fields)


@pytest.fixture(scope="module")
def embedder(embedding_bundle):
    return load(embedding_bundle.path, threads=1)


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("length", [1, 2, 9, 40])
def test_one_text_has_what_the_head_multiplies_pooled(embedder, tiny, pooling, length, monkeypatch):
    monkeypatch.setattr(decoder_graph, "PREFILL_CHUNK", 16)  # so that the longest needs three runs
    ids = ids_of(length)
    expected = POOLINGS[pooling](tiny.hidden_states(ids))
    plain = embedder.embed(ids, pooling=pooling, normalize=False)
    assert (plain.dtype, plain.shape) == (np.float32, expected.shape)
    np.testing.assert_allclose(plain, expected, atol=1e-5)
    np.testing.assert_allclose(embedder.embed(ids, pooling=pooling), unit(expected), atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_several_texts_have_the_vectors_of_each_alone_in_their_order(embedder, tiny, pooling):
    texts = [ids_of(length, length) for length in (7, 300, 1, 7, 30, 2, 129, 30, 1, 5, 5, 5, 6, 90)]
    expected = np.stack([unit(POOLINGS[pooling](tiny.hidden_states(ids))) for ids in texts])
    found = embedder.embed(texts, pooling=pooling)
    assert found.shape == (len(texts), E)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_text_is_encoded_as_a_prompt(embedder):
    ids = embedder.prompt_ids("abc")
    for text in (ids, np.array(ids)):
        np.testing.assert_array_equal(embedder.embed("abc"), embedder.embed(text))
    np.testing.assert_array_equal(embedder.embed(["abc", "b"])[0], embedder.embed("abc"))
    assert embedder.embed(["abc"]).shape == (1, E)


def test_threads_and_generations_beside_it_change_nothing(embedder):
    texts = [ids_of(length) for length in (6, 17, 260, 3)]
    expected, continuation = embedder.embed(texts), embedder.generate("abc", max_new_tokens=20).ids
    with ThreadPoolExecutor(4) as pool:
        vectors = [pool.submit(embedder.embed, texts) for _ in range(4)]
        generated = [pool.submit(embedder.generate, "abc", max_new_tokens=20) for _ in range(4)]
    assert all(np.array_equal(future.result(), expected) for future in vectors)
    assert all(future.result().ids == continuation for future in generated)


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "the text is empty"),
    ([5] * 601, {}, "the context is"),
    ([[5], [5] * 601], {}, "text 1 of the list: the prompt has"),
    ([[5], []], {}, "text 1 of the list: the text is empty"),
    ([999], {}, "token id 999"),
    ("a", {"pooling": "cls"}, "pooling is 'cls'; it must be one of mean, last, none"),
    (["a", "b"], {"pooling": "none"}, "one text at a time"),
]


@pytest.mark.parametrize(("text", "options", "words"), WRONG)
def test_what_cannot_be_embedded(embedder, text, options, words):
    with pytest.raises(InputError, match=words):
        embedder.embed(text, **options)


def test_a_bundle_without_hidden_states_says_how_it_gets_them(lm, model):
    with pytest.raises(InputError, match=r"pastkey export SOURCE --out BUNDLE --hidden-states"):
        lm.embed("abc")
    with pytest.raises(InputError, match="no hidden states"):
        model.embed("abc")


def test_hidden_states_that_are_not_finite(tiny, make_bundle):
    found = load(make_bundle(tiny.spoilt(slice(4, 5)), "fused", hidden_size=E).path, threads=1, verify=False)
    assert np.isfinite(found.embed([[1, 2, 3], [1, 2, 3, 4]])).all()
    with pytest.raises(NumericsError, match=r"hidden states at position . of row 0 .*: the source itself computes"):
        found.embed([1, 2, 3, 4, 5])


def test_a_limit_holds_for_the_texts_that_are_run_together(embedding_bundle, embedder):
    texts, room = [ids_of(length) for length in (5, 6, 7)], 3 * embedder.memory.estimate(128)
    with load(embedding_bundle.path, threads=1, max_memory=room) as limited:
        for _ in range(2):  # nothing stays promised
            np.testing.assert_allclose(limited.embed(texts), embedder.embed(texts), atol=1e-6)
    with load(embedding_bundle.path, threads=1, max_memory=room // 3 - 1) as limited, pytest.raises(ResourceError):
        limited.embed(texts)


def test_an_engine_gives_logits_and_hidden_states_in_any_order(embedding_bundle, tiny):
    ids = ids_of(12)
    logits, states = tiny(ids), tiny.hidden_states(ids)
    engine = Engine(embedding_bundle, threads=1)
    require_close(engine.hidden_states([ids[:4]])[0], states[:4])
    require_close(engine.decode(ids[4]), logits[4])
    require_close(engine.hidden_states([ids[5:6]])[0], states[5:6])
    require_close(engine.all_logits(ids[6:9]), logits[6:9])
    kept = engine.hidden_states([ids[9:]])
    engine.decode(ids[0])  # which writes into other memory
    require_close(kept[0], states[9:])


def test_the_all_logits_graph_says_that_the_other_has_them(embedding_bundle):
    with pytest.raises(InputError, match='open graph="last_logits"'):
        Engine(embedding_bundle, graph="all_logits").hidden_states([[1]])
