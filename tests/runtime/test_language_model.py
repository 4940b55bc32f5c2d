from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import pastkey
from pastkey import names
from pastkey.bundle import Bundle
from pastkey.errors import InputError, IntegrityError, MissingFileError, NumericsError, ProviderError
from pastkey.runtime import Chunk, Completion, LanguageModel, load

if TYPE_CHECKING:
    from conftest import Tiny


@pytest.fixture(scope="module")
def model(speaking_bundle: Bundle) -> LanguageModel:
    return load(speaking_bundle.path, threads=1)


def greedy(tiny: Tiny, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(np.argmax(tiny(ids)[-1])))
    return ids[len(prompt) :]


def test_generate_continues_a_text(model: LanguageModel, tiny: Tiny, letters: Tokenizer) -> None:
    expected = greedy(tiny, letters.encode("once upon").ids, 12)
    completion = model.generate("once upon", max_new_tokens=12)
    assert completion.ids == expected
    assert completion.text == letters.decode(expected)
    assert completion.finish_reason == "length"
    assert (completion.prompt_tokens, completion.new_tokens) == (9, 12)
    assert completion.prefill_seconds > 0
    assert completion.decode_seconds > 0


def test_a_prompt_of_ids_is_the_same_as_its_text(model: LanguageModel, letters: Tokenizer) -> None:
    ids = letters.encode("abc").ids
    expected = model.generate("abc", max_new_tokens=8)
    for prompt in (ids, tuple(ids), np.array(ids)):
        completion = model.generate(prompt, max_new_tokens=8)
        assert (completion.ids, completion.text) == (expected.ids, expected.text)
    assert all(type(token) is int for token in expected.ids)


def test_stream_is_generate_in_pieces(model: LanguageModel) -> None:
    settings = {"max_new_tokens": 15, "temperature": 1.5, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "seed": 3}
    expected = model.generate("abc", **settings)
    chunks = list(model.stream("abc", **settings))
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert list(itertools.chain.from_iterable(chunk.ids for chunk in chunks)) == expected.ids


def test_a_stream_refuses_before_the_first_chunk(model: LanguageModel) -> None:
    with pytest.raises(InputError, match="temperature"):
        model.stream("abc", temperature=-1)


def test_a_stop_string_ends_the_text_before_it(model: LanguageModel) -> None:
    text = model.generate("abc", max_new_tokens=30).text
    stop = text[5:8]
    completion = model.generate("abc", max_new_tokens=30, stop=["~", stop])
    assert completion.text == text[: text.index(stop)]
    assert completion.finish_reason == "stop_string"
    assert completion.new_tokens == len(completion.ids) < 30
    assert model.generate("abc", max_new_tokens=30, stop=stop).text == completion.text


def test_text_held_back_for_a_stop_string_comes_at_the_end(model: LanguageModel) -> None:
    text = model.generate("abc", max_new_tokens=10).text
    completion = model.generate("abc", max_new_tokens=10, stop=text[-2:] + "~")
    assert (completion.text, completion.finish_reason) == (text, "length")
    assert "".join(chunk.text for chunk in model.stream("abc", max_new_tokens=10, stop=text[-2:] + "~")) == text


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [3], 3, None])
def test_a_stop_string_that_is_none_is_refused(model: LanguageModel, stop: object) -> None:
    with pytest.raises(InputError, match="stop is"):
        model.generate("abc", stop=stop)


@pytest.mark.parametrize("prompt", [None, 3])
def test_a_prompt_that_is_none_is_refused(model: LanguageModel, prompt: Any) -> None:
    with pytest.raises(InputError, match="a text or a sequence of token ids was expected"):
        model.generate(prompt)


def test_logits_of_nothing_are_refused(model: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"shape \(T,\), at least one; found .* of shape \(0,\)"):
        model.logits([])


def test_threads_take_turns(model: LanguageModel) -> None:
    prompts = [[1, 2, 3 + i] for i in range(8)]
    expected = [(model.generate(ids, max_new_tokens=40).ids, model.logits(ids)) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            generated = [pool.submit(model.generate, ids, max_new_tokens=40) for ids in prompts]
            logits = [pool.submit(model.logits, ids) for ids in prompts]
            for (ids, exact), one, other in zip(expected, generated, logits, strict=True):
                assert one.result().ids == ids
                np.testing.assert_array_equal(other.result(), exact)


def test_a_stream_that_another_thread_takes_over_ends_and_spoils_nothing(model: LanguageModel) -> None:
    """Whichever comes first: right to its end, or refused."""
    prompts = [[1, 2, 3 + i] for i in range(8)]
    expected = [model.generate(ids, max_new_tokens=40).ids for ids in prompts]

    def streamed(place: int) -> bool:
        told: list[int] = []
        with contextlib.suppress(InputError):  # "another generation began"
            for chunk in model.stream(prompts[place], max_new_tokens=40):
                told += chunk.ids
        assert told == expected[place][: len(told)]
        return told == expected[place]

    with ThreadPoolExecutor(4) as pool:
        finished = list(pool.map(streamed, [place for _ in range(10) for place in range(8)]))
    assert any(finished)
    assert [model.generate(ids, max_new_tokens=40).ids for ids in prompts] == expected


def test_an_end_token_ends_the_text(
    model: LanguageModel, tiny: Tiny, letters: Tokenizer, make_bundle: Callable[..., Bundle]
) -> None:
    free = model.generate("abc", max_new_tokens=30)
    end = next(token for i, token in enumerate(free.ids) if i > 3 and token not in free.ids[:i])
    ending = load(make_bundle(tiny, "fused", tokenizer=letters, eos_token_ids=(end,)).path, threads=1)
    completion = ending.generate("abc", max_new_tokens=30)
    assert completion.finish_reason == "stop"
    assert completion.ids == free.ids[: free.ids.index(end)]
    assert completion.text == letters.decode(completion.ids)


def test_generations_do_not_leak_into_one_another(model: LanguageModel) -> None:
    first = model.generate("hello", max_new_tokens=10)
    stream = model.stream("world", max_new_tokens=10)
    next(stream)  # left unfinished
    assert model.generate("hello", max_new_tokens=10).ids == first.ids


def test_logits_of_every_position(model: LanguageModel, tiny: Tiny) -> None:
    ids = [3, 1, 4, 1, 5]
    for given in (ids, np.array(ids)):
        logits = model.logits(given)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, tiny(ids), atol=1e-4)


def test_a_bundle_without_tokenizer_speaks_ids(bundle: Bundle, tiny: Tiny) -> None:
    model = load(bundle.path, threads=1)
    completion = model.generate([1, 2, 3], max_new_tokens=6)
    assert completion.ids == greedy(tiny, [1, 2, 3], 6)
    assert completion.text == ""
    assert [chunk.ids for chunk in model.stream([1, 2, 3], max_new_tokens=2)] == [[t] for t in completion.ids[:2]]
    with pytest.raises(InputError, match=r"has no tokenizer.*--prompt-ids"):
        model.generate("text")
    with pytest.raises(InputError, match="no tokenizer"):
        model.generate([1], stop=["a"])


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(model: LanguageModel, prompt: str | list[int]) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        model.generate(prompt)


def test_a_prompt_beyond_the_context_is_refused(model: LanguageModel) -> None:
    with pytest.raises(InputError, match="the prompt has 700 tokens; the context is 600"):
        model.generate("a" * 700)
    completion = model.generate("a" * 600)
    assert (completion.new_tokens, completion.finish_reason) == (1, "length")


def test_nan_is_an_error_not_a_text(tiny: Tiny, make_bundle: Callable[..., Bundle]) -> None:
    weights = dict(tiny.weights) | {"wo1": np.full_like(tiny.weights["wo1"], np.inf)}
    broken = make_bundle(type(tiny)(tiny.layers, tiny.context_length, weights), "fused")
    with pytest.raises(NumericsError, match="not finite"):
        load(broken.path, threads=1).generate([1, 2])


def test_a_damaged_bundle_is_refused_before_it_is_opened(speaking_bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    shutil.copytree(speaking_bundle.path, folder)
    graph = folder / names.LAST_GRAPH
    content = bytearray(graph.read_bytes())
    content[-1] ^= 1
    graph.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"pastkey\.onnx was altered"):
        load(folder, verify=True)
    with pytest.raises(MissingFileError, match="no such bundle"):
        load(tmp_path / "none")


def test_an_absent_provider_is_refused(speaking_bundle: Bundle) -> None:
    with pytest.raises(ProviderError, match="'coreml'"):
        load(speaking_bundle.path, providers="coreml")


def test_the_package_itself_offers_it() -> None:
    assert (pastkey.load, pastkey.LanguageModel, pastkey.Completion) == (load, LanguageModel, Completion)
