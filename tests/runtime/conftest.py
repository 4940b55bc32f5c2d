"""The fixtures of the runtime's tests: bundles of the tiny decoder, and its references."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import hypothesis
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pastkey.contract.bundle import Bundle
from pastkey.runtime import Engine, load

from .tiny_decoder import ALPHABET, Array, Tiny, V, write_bundle

# The same examples each time, and as long as they need on a busy machine.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}.{% endfor %}<assistant>"  # in these letters
# Greedy, the decoder repeats itself: this way its texts hang on every logit before them.
DRAWN: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1}


def ids_of(count: int, seed: int = 0) -> list[int]:
    """So many ids by a seed."""
    ids: list[int] = np.random.default_rng(seed).integers(0, V, count).tolist()
    return ids


def require_close(found: Any, expected: Any, limit: float = 5e-6) -> None:
    """Compares logits, float32 with the reference's float64, in parts of the largest one."""
    assert np.shape(found) == np.shape(expected)
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


def log_softmax(logits: Array) -> Array:
    """In float64, over the last axis."""
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


def metaspace() -> Tokenizer:
    """A token for each of few letters and for the space, which it drops where a text begins."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate("abcdefghi▁")}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def stopped(*_: Any, **__: Any) -> Any:
    """Instead of a function within which Ctrl-C is pressed."""
    raise KeyboardInterrupt


@pytest.fixture(scope="session")
def tiny():
    return Tiny.random([(8, 8), (16, 16)], context_length=600)


@pytest.fixture(scope="session")
def tiny_odd():
    """Head sizes that only the standard graph supports."""
    return Tiny.random([(5, 3), (6, 6)], context_length=24)


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory):
    def make(tiny: Tiny, graph: str = "fused", **fields: Any) -> Bundle:
        return write_bundle(tmp_path_factory.mktemp("bundle") / "b", tiny, graph, **fields)

    return make


@pytest.fixture(scope="session", params=["fused", "standard"])
def bundle(request, tiny, make_bundle):
    """The tiny decoder, once with each attention."""
    return make_bundle(tiny, request.param)


@pytest.fixture
def engine(bundle):
    """Over the tiny decoder, once with each attention."""
    return Engine(bundle, threads=1)


@pytest.fixture(scope="session")
def fused_bundle(tiny, make_bundle):
    return make_bundle(tiny, "fused", golden=True)


@pytest.fixture(scope="session")
def standard_bundle(tiny, make_bundle):
    return make_bundle(tiny, "standard")


@pytest.fixture(scope="session")
def letters():
    """A tokenizer with one letter for each of the tiny decoder's ids; a is 0."""
    assert len(ALPHABET) == V
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(ALPHABET)}, []))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.fixture(scope="session")
def speaking_bundle(tiny, letters, make_bundle):
    """The tiny decoder with a tokenizer."""
    return make_bundle(tiny, "fused", tokenizer=letters)


@pytest.fixture(scope="session")
def talking(tiny, letters, make_bundle):
    """The tiny decoder with a tokenizer and a chat template."""
    config = {"chat_template": TEMPLATE}
    return make_bundle(tiny, "fused", tokenizer=letters, tokenizer_config=config, golden=True).path


def runs_of(
    graph: Any, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0, before: Callable[[Array], object] | None = None
) -> list[tuple[int, int]]:
    """The shapes (rows, tokens) of all runs of a graph from now on.

    Each needs so many seconds more, and calls `before` with its ids.
    """
    run, shapes = graph.run, list[tuple[int, int]]()

    def counted(cache: Any, ids: Any, *arguments: Any) -> Any:
        array = np.atleast_2d(ids)
        shapes.append(array.shape)
        time.sleep(seconds)
        if before is not None:
            before(array)
        return run(cache, ids, *arguments)

    monkeypatch.setattr(graph, "run", counted)
    return shapes


def ids_in(chunks: Iterable[Any]) -> list[int]:
    """The ids of a stream, or of its chunks."""
    return [token for chunk in chunks for token in chunk.ids]


@pytest.fixture(scope="session", params=["fused", "standard", "static"])
def any_bundle(request, tiny, letters, make_bundle):
    """The tiny decoder with a tokenizer, once with each graph, and so with each way that a cache can be."""
    fields = {"chunk": 8} if request.param == "static" else {}
    return make_bundle(tiny, request.param, tokenizer=letters, **fields)


@pytest.fixture(scope="module")
def model(any_bundle):
    """The tiny decoder with a tokenizer, loaded, once with each graph."""
    return load(any_bundle.path, threads=1)


@pytest.fixture(scope="module")
def lm(speaking_bundle):
    """The tiny decoder with a tokenizer, loaded."""
    return load(speaking_bundle.path, threads=1)
