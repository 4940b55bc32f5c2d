"""Each call gives what the model gives that is opened here."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pastkey
from pastkey.bundle import Bundle
from pastkey.errors import InputError, OptionError, UntrustedBundleError
from pastkey.runtime import LanguageModel
from pastkey.runtime.sandbox import process
from pastkey.runtime.sandbox.limits import Limits
from pastkey.runtime.sandbox.model import UntrustedModel

from .conftest import EASY, beside, children, descriptors, opened, told

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7, "top_k": 9},
    {"temperature": 0.8, "seed": 1, "logprobs": 3, "prompt_logprobs": True},
    {"logit_bias": {3: 50.0, 5: -float("inf")}, "max_new_tokens": 4},
    {"stop": ["c", "zz"], "bad_words": ["d"], "suppress_tokens": (1, 2), "bad_words_ids": [np.array([4])]},
    {"min_new_tokens": np.int64(3), "keep_special_tokens": True, "prompt_lookup": False, "logits_processor": ()},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_generate(untrusted: UntrustedModel, trusted: LanguageModel, options: dict[str, Any]) -> None:
    given = {"max_new_tokens": 12, **options}
    prompts: list[Any] = ["hello world.", [1, 2, 3], np.array([5, 6])]
    for prompt in prompts:
        assert told(untrusted.generate(prompt, **given)) == told(trusted.generate(prompt, **given))


def test_generate_several(untrusted: UntrustedModel, trusted: LanguageModel) -> None:
    """Of several prompts, and of one several times, which share its prefill."""
    heard: list[tuple[int, int]] = []
    prompts = ["ab", "hello", "xyz."]
    models: tuple[LanguageModel, ...] = (untrusted, trusted)
    both = [
        list(map(beside, model.generate(prompts, lambda *told: heard.append(told), max_new_tokens=5)))
        for model in models
    ]
    assert both[0] == both[1]
    assert heard == [(1, 3), (2, 3), (3, 3)] * 2
    asked: dict[str, Any] = {"n": 3, "seed": 5, "temperature": 1.0, "max_new_tokens": 6}
    drawn = [model.generate("hello world. " * 4, **asked) for model in models]
    assert list(map(beside, drawn[0])) == list(map(beside, drawn[1]))
    assert [one.cached_tokens > 0 for one in drawn[0]] == [False, True, True]
    assert dict(untrusted.stream_many(prompts, max_new_tokens=1)).keys() == {0, 1, 2}


def test_logits_score_and_ids(untrusted: UntrustedModel, trusted: LanguageModel) -> None:
    ids = list(range(30))
    assert untrusted.logits(ids).dtype == np.float32
    np.testing.assert_array_equal(untrusted.logits(ids), trusted.logits(ids))
    untrusted.logits(np.array(ids))[0] = 0  # it may be written to
    assert untrusted.score("hello") == trusted.score("hello")
    assert untrusted.score(ids) == trusted.score(ids)
    assert untrusted.prompt_ids("hello") == trusted.prompt_ids("hello")
    assert untrusted.manifest == trusted.manifest
    assert untrusted.sampling_defaults == trusted.sampling_defaults
    assert untrusted.tokenizer is not None
    assert untrusted.tokenizer.decode([0, 1]) == "ab"


def test_int8_and_what_authors_set(tiny: Any, letters: Any, make_bundle: Callable[..., Bundle]) -> None:
    bundle = make_bundle(
        tiny, "fused", tokenizer=letters, int8_kv=True,
        generation_config={"do_sample": True, "temperature": 0.6, "suppress_tokens": [3]},
    )  # fmt: skip
    with opened(bundle.path) as model, pastkey.load(bundle.path, threads=1) as here:
        assert model.sampling_defaults == here.sampling_defaults != {}
        prompt = [number % 37 for number in range(400)]
        assert told(model.generate(prompt, max_new_tokens=20)) == told(here.generate(prompt, max_new_tokens=20))
        assert model.manifest == here.manifest


def test_embeddings(tiny: Any, letters: Any, make_bundle: Callable[..., Bundle], untrusted: UntrustedModel) -> None:
    bundle = make_bundle(tiny, "fused", tokenizer=letters, hidden_size=24)
    with opened(bundle.path) as model, pastkey.load(bundle.path, threads=1) as here:
        many: list[Any] = ["hello", ["ab", "the cat"], [1, 2], [[1, 2], [3]], np.array([[1, 2], [3, 4]])]
        for text in many:
            mine, theirs = model.embed(text), here.embed(text)
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)
        for options in ({"pooling": "none"}, {"pooling": "last", "normalize": False}):
            np.testing.assert_array_equal(model.embed("hello", **options), here.embed("hello", **options))
        with pytest.raises(InputError, match="pooling is 'most'"):
            model.embed("a", pooling="most")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--hidden-states"):
        untrusted.embed("hello")


def test_errors_are_those_of_the_model(untrusted: UntrustedModel, trusted: LanguageModel) -> None:
    calls: list[Callable[[LanguageModel], object]] = [
        lambda lm: lm.generate(""),
        lambda lm: lm.generate([]),
        lambda lm: lm.generate([99]),
        lambda lm: lm.generate([1] * 700),
        lambda lm: lm.generate("ß"),
        lambda lm: lm.generate("\ud800"),
        lambda lm: lm.generate(b"bytes"),
        lambda lm: lm.generate("a", temperature=-1),
        lambda lm: lm.generate("a", temperature=float("inf")),
        lambda lm: lm.generate("a", stop=""),
        lambda lm: lm.generate("a", timeout=0),
        lambda lm: lm.generate("a", temprature=1),  # type: ignore[call-overload]
        lambda lm: lm.stream(["a", "b"]),  # type: ignore[list-item]
        lambda lm: lm.logits([]),
        lambda lm: lm.logits([0.5]),  # type: ignore[list-item]
        lambda lm: lm.score([]),
        lambda lm: lm.generate("a", n=0),
    ]
    for call in calls:
        with pytest.raises((InputError, OptionError)) as theirs:
            call(trusted)
        with pytest.raises(type(theirs.value)) as mine:
            call(untrusted)
        assert str(mine.value) == str(theirs.value)


def test_threads_and_tasks(untrusted: UntrustedModel, trusted: LanguageModel) -> None:
    prompts = ["abc", "hello", "world.", "xyz", "q", "the cat", "dog", "a b c d"]
    alone = [beside(trusted.generate(prompt, max_new_tokens=20)) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda prompt: beside(untrusted.generate(prompt, max_new_tokens=20)), prompts))
    assert found == alone

    async def tasks() -> list[Any]:
        return await asyncio.gather(*(untrusted.agenerate(prompt, max_new_tokens=20) for prompt in prompts))

    assert [beside(one) for one in asyncio.run(tasks())] == alone


def test_a_task_that_is_cancelled_ends_its_generation(untrusted: UntrustedModel) -> None:
    async def cancelled() -> None:
        stream = untrusted.astream("hello", max_new_tokens=500)
        chunks: list[str] = []

        async def read() -> None:
            async for chunk in stream:
                chunks.append(chunk.text)
                if len(chunks) == 3:
                    task.cancel()

        task = asyncio.create_task(read())
        with pytest.raises(asyncio.CancelledError):
            await task
        await stream.aclose()
        assert stream.completion is not None
        assert stream.completion.finish_reason == "cancelled"
        assert 3 <= stream.completion.new_tokens <= 10

    asyncio.run(cancelled())
    assert untrusted.generate("a", max_new_tokens=1).new_tokens == 1


def test_what_it_lacks_is_said(untrusted: UntrustedModel, talking_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="logits_processor is a function"):
        untrusted.generate("a", logits_processor=lambda ids, logits: logits)
    with pytest.raises(AttributeError, match="an UntrustedModel has no 'scheduler'"):
        _ = untrusted.scheduler
    with pytest.raises(InputError, match="the engine of an untrusted bundle is in another process"):
        untrusted.new_engine()
    with pytest.raises(InputError, match="reads no session"):
        untrusted.load_session(tmp_path)
    with pytest.raises(InputError, match="runs on the processor alone"):
        pastkey.load(talking_bundle.path, "cuda", trust=False)
    with pytest.raises(InputError, match="limits are for a bundle that is not trusted, and trust is True"):
        pastkey.load(talking_bundle.path, limits=EASY)
    with pytest.raises(InputError, match="limits is 5; "):
        pastkey.load(talking_bundle.path, trust=False, limits=5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the engine of an untrusted bundle is in another process"):
        pastkey.load(talking_bundle.path, threads=1, draft=untrusted)
    for odd in (0, 1, "no", None):
        with pytest.raises(InputError, match="True or False was expected"):
            pastkey.load(talking_bundle.path, trust=odd)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="path is 5; the path of a bundle folder was expected"):
        pastkey.load(5, trust=False)  # type: ignore[arg-type]
    assert "fp32" in repr(untrusted)
    assert untrusted.limits is not None
    assert untrusted.limits.seconds == 60


def test_settings_of_numpy(talking_bundle: Bundle) -> None:
    given: dict[str, Any] = {"max_memory": np.int64(10**9), "prefix_bytes": np.int64(0), "max_batch": np.int32(2)}
    with opened(talking_bundle.path, allow_fallback=True, **given) as model:
        assert model.max_batch == 2
        assert len(model.generate(["a", "b", "c"], max_new_tokens=1)) == 3


def test_a_closed_model(talking_bundle: Bundle) -> None:
    model = opened(talking_bundle.path)
    copy = pickle.dumps(model)
    stream = model.stream("hello", max_new_tokens=500)
    next(stream)
    reading = threading.Thread(target=lambda: [None for _ in stream])
    reading.start()
    model.close()
    reading.join()
    assert stream.completion is not None
    assert stream.completion.finish_reason in ("cancelled", "length")
    assert next(stream, None) is None
    assert model.closed
    model.close()
    for call in (lambda: model.generate("a"), lambda: model.logits([1]), model.session, lambda: model.executor):
        with pytest.raises(InputError, match="this model is closed"):
            call()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        with pickle.loads(copy) as again:
            assert again.limits.seconds == 60
            assert again.generate("a", max_new_tokens=1).new_tokens == 1


def test_one_that_nobody_holds_is_ended(talking_bundle: Bundle) -> None:
    gc.collect()
    before, threads = set(Path("/proc/self/fd").iterdir()), threading.active_count()
    for _ in range(3):
        model = opened(talking_bundle.path)
        assert model.generate("a", max_new_tokens=1).new_tokens == 1
        stream = model.stream("ab", max_new_tokens=9)
        del model
        gc.collect()
        next(stream)  # which holds it
        del stream
        gc.collect()
    assert set(Path("/proc/self/fd").iterdir()) == before
    assert threading.active_count() <= threads  # those of other models may end meanwhile


@pytest.mark.slow  # starts twenty processes
def test_twenty_loads_leave_nothing(talking_bundle: Bundle) -> None:
    before = descriptors(), threading.active_count(), children()
    for _ in range(20):
        with opened(talking_bundle.path) as model:
            assert model.generate("a", max_new_tokens=1).new_tokens == 1
    assert (descriptors(), threading.active_count(), children()) == before


# A whole of one token, with other fields.
HELPERS = """
import dataclasses
from pastkey.runtime.completion import Completion
def whole(**fields):
    return P.Whole.of(dataclasses.replace(Completion('x', [1], 'stop', 5, 1, 0.0, 0.0), **fields))
"""


@pytest.mark.parametrize(
    ("what", "answer", "told"),
    [
        ("load", "P.Loaded({'kind': 'bundle'}, True)", "answered with no manifest"),
        ("defaults", "P.Values({'temperature': -1})", "answered with no sampling defaults"),
        ("defaults", "P.Values({'colour': 1})", "answered with no sampling defaults"),
        ("defaults", "P.Values({'stop': ['x']})", "answered with no sampling defaults"),
        ("logits", "(P.Shape(5, 5), bytes(100))", "answered with logits of shape|answered with an array of"),
        ("logits", "(P.Shape(2, 37), bytes(10))", "answered with logits of shape"),
        ("logits", "(P.Shape(2, 37), bytes(10**6))", "answered with an array of 1,000,000 bytes"),
        ("embed", "(P.Shape(0, 0), b'')", "answered with embeddings of shape"),
        ("embed", "(P.Shape(1, 7), bytes(28))", "answered with an array of 28 bytes"),
        ("template", "P.Template('x' * 10**6, ())", "answered with a chat template that is too long"),
        ("next", "P.Step()", "answered with nothing"),
        (
            "next",
            "P.Step(piece=P.Piece('x' * 900_000, ()))",
            "answered with a text of more than 1,200,000 characters",
        ),
        ("next", "P.Step(piece=P.Piece('', ()))", "answered with more than 20 new tokens"),
        ("next", "P.Step(piece=P.Piece('x', (1,) * 9))", "answered with more than 20 new tokens"),
        ("next", "P.Step(piece=P.Piece('x', (37,)))", "answered with a token of id 37"),
        ("next", "P.Step(whole=whole(new_tokens=2))", "answered with 1 ids of 2 tokens"),
        ("next", "P.Step(whole=whole(ids=(99,)))", "answered with a token of id 99"),
        ("next", "P.Step(whole=whole(text='x' * 2_000_000))", "answered with a text of more than 1,200,000 characters"),
        ("next", "P.Step(piece=P.Piece('x' * 17_000_000, ()))", r"answered with a message of 17,0\d\d,\d\d\d bytes"),
        ("encode", "P.Text('x')", "gave an answer that is none"),
        ("encode", "P.Ids((1,) * 100_000)", r"answered with a message of 3\d\d,\d\d\d bytes"),
    ],
)
def test_a_process_that_was_taken_over(
    talking_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, what: str, answer: str, told: str
) -> None:
    """It answers well until this call."""
    hook = "from pastkey.runtime.sandbox import server\nimport pastkey.runtime.sandbox.protocol as P\n"
    hook += HELPERS + f"server.Server.do_{what} = lambda self, **given: {answer}\n"
    boot = process.BOOT.replace("; ", "\n").replace("from pastkey", hook + "from pastkey", 1)
    monkeypatch.setattr(process, "BOOT", boot)

    def use() -> None:
        with opened(talking_bundle.path, Limits(seconds=60.0)) as model:
            assert model.sampling_defaults == {}
            model.logits([1, 2])
            model.chat()
            if what == "embed":
                model.embed("hello")
            model.generate("hello", max_new_tokens=20)
            model.prompt_ids("hello")

    with pytest.raises(UntrustedBundleError, match=told):
        use()
