"""Each call gives what the model gives that is opened here."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pastkey
from pastkey.errors import InputError, OptionError, UntrustedBundleError
from pastkey.runtime.sandbox import process
from pastkey.runtime.sandbox.limits import Limits

from .conftest import EASY, beside, hooked, opened, told

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7, "top_k": 9},
    {"temperature": 0.8, "seed": 1, "logprobs": 3, "prompt_logprobs": True},
    {"logit_bias": {3: 50.0, 5: -float("inf")}, "max_new_tokens": 4},
    {"stop": ["c", "zz"], "bad_words": ["d"], "suppress_tokens": (1, 2), "bad_words_ids": [np.array([4])]},
    {"min_new_tokens": np.int64(3), "keep_special_tokens": True, "prompt_lookup": False, "logits_processor": ()},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_generate(untrusted, trusted, options):
    given = {"max_new_tokens": 12, **options}
    prompts: list[Any] = ["hello world.", [1, 2, 3], np.array([5, 6])]
    for prompt in prompts:
        assert told(untrusted.generate(prompt, **given)) == told(trusted.generate(prompt, **given))


def test_generate_several(untrusted, trusted):
    prompts = ["ab", "hello", "xyz."]
    mine, theirs = (list(map(beside, model.generate(prompts, max_new_tokens=5))) for model in (untrusted, trusted))
    assert mine == theirs
    with pytest.raises(InputError, match="no token covers"):
        untrusted.generate(["ab", "ß"])


def test_score(untrusted, trusted):
    ids = list(range(30))
    assert untrusted.score("hello") == trusted.score("hello")
    assert untrusted.score(ids) == trusted.score(ids)
    assert untrusted.manifest == trusted.manifest
    assert untrusted.sampling_defaults == trusted.sampling_defaults


def test_int8_and_what_authors_set(tiny, letters, make_bundle):
    bundle = make_bundle(
        tiny, "fused", tokenizer=letters, int8_kv=True,
        generation_config={"do_sample": True, "temperature": 0.6, "suppress_tokens": [3]},
    )  # fmt: skip
    with opened(bundle.path) as model, pastkey.load(bundle.path, threads=1) as here:
        assert model.sampling_defaults == here.sampling_defaults != {}
        prompt = [number % 37 for number in range(400)]
        assert told(model.generate(prompt, max_new_tokens=20)) == told(here.generate(prompt, max_new_tokens=20))
        assert model.manifest == here.manifest


def test_errors_are_those_of_the_model(untrusted, trusted):
    calls: list[Callable[[Any], object]] = [
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
        lambda lm: lm.generate("a", temprature=1),
        lambda lm: lm.stream(["a", "b"]),
        lambda lm: lm.score([]),
        lambda lm: lm.score([0.5]),
    ]
    for call in calls:
        with pytest.raises((InputError, OptionError)) as theirs:
            call(trusted)
        with pytest.raises(type(theirs.value)) as mine:
            call(untrusted)
        assert str(mine.value) == str(theirs.value)


def test_threads_and_tasks(untrusted, trusted):
    prompts = ["abc", "hello", "world.", "xyz", "q", "the cat", "dog", "a b c d"]
    alone = [beside(trusted.generate(prompt, max_new_tokens=20)) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda prompt: beside(untrusted.generate(prompt, max_new_tokens=20)), prompts))
    assert found == alone

    async def tasks() -> list[Any]:
        return await asyncio.gather(*(untrusted.agenerate(prompt, max_new_tokens=20) for prompt in prompts))

    assert [beside(one) for one in asyncio.run(tasks())] == alone


def test_a_task_that_is_cancelled_ends_its_generation(untrusted):
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


def test_what_it_lacks_is_said(untrusted, talking_bundle):
    with pytest.raises(InputError, match="logits_processor is a function"):
        untrusted.generate("a", logits_processor=lambda ids, logits: logits)
    for name in ("session", "embed", "logits", "scheduler"):
        with pytest.raises(AttributeError, match=f"a sandboxed model has no '{name}'; it has generate, .* trust=True"):
            getattr(untrusted, name)
    with pytest.raises(OptionError, match="has no option 'n'"):
        untrusted.generate("a", n=2)
    with pytest.raises(InputError, match="runs on the CPU alone"):
        pastkey.load(talking_bundle.path, "cuda", trust=False)
    with pytest.raises(InputError, match="limits are for a bundle that is not trusted, and trust is True"):
        pastkey.load(talking_bundle.path, limits=EASY)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        pastkey.load(talking_bundle.path, threads=1, draft=untrusted)
    with pytest.raises(InputError, match="trust is None"):
        pastkey.load(talking_bundle.path, trust=None)  # type: ignore[call-overload]
    assert "fp32" in repr(untrusted)
    assert untrusted.limits is not None
    assert untrusted.limits.seconds == 60


def test_settings_of_numpy(talking_bundle):
    given: dict[str, Any] = {"max_memory": np.int64(10**9), "prefix_bytes": np.int64(0), "max_batch": np.int32(2)}
    with opened(talking_bundle.path, allow_fallback=True, **given) as model:
        assert len(model.generate(["a", "b", "c"], max_new_tokens=1)) == 3


def test_a_closed_model(talking_bundle):
    model = opened(talking_bundle.path)
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
    for call in (lambda: model.generate("a"), lambda: model.score([1]), model.chat, lambda: model.sampling_defaults):
        with pytest.raises(InputError, match="this model is closed"):
            call()


def test_one_that_nobody_holds_is_ended(talking_bundle):
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


@pytest.mark.parametrize(
    ("what", "answer", "told"),
    [
        ("load", "{'kind': 'bundle'}", "answered with no manifest"),
        ("defaults", "{'temperature': -1}", "answered with no sampling defaults"),
        ("defaults", "{'colour': 1}", "answered with no sampling defaults"),
        ("defaults", "{'stop': ['x']}", "answered with no sampling defaults"),
        ("score", "[1]", "gave an answer that is none"),
        ("format", "P.Format('x' * 10**6, ())", "answered with a chat template that is too long"),
        ("chat_ids", "'x' * 65_000_000", r"answered with a message of 65,000,0\d\d bytes"),
        ("next", "P.Step()", "answered with nothing"),
        ("next", "P.Step(5, P.Chunk('x' * 900_000, []))", "answered with a text of more than 1,200,000 characters"),
        ("next", "P.Step(5, P.Chunk('', []))", "answered with more than 20 new tokens"),
        ("next", "P.Step(5, P.Chunk('x', [1] * 9))", "answered with more than 20 new tokens"),
        ("next", "P.Step(5, P.Chunk('x', [37]))", "answered with a token of id 37"),
        ("next", "P.Step(5, P.Chunk('x', [-1]))", "answered with a token of id -1"),
        ("next", "P.Step(5, P.Chunk('x' * 17_000_000, []))", r"answered with a message of 17,0\d\d,\d\d\d bytes"),
    ],
)
def test_a_process_that_was_taken_over(talking_bundle, monkeypatch, what, answer, told):
    """It answers well until this call."""
    hook = "from pastkey.runtime.sandbox import server\nimport pastkey.runtime.sandbox.protocol as P\n"
    hook += f"server.Server.do_{what} = lambda self, **given: {answer}\n"
    monkeypatch.setattr(process, "BOOT", hooked(hook))

    def use() -> None:
        with opened(talking_bundle.path, Limits(seconds=60.0)) as model:
            assert model.sampling_defaults == {}
            model.score([1, 2])
            model.generate("hello", max_new_tokens=20)
            model.chat().ask("a")

    with pytest.raises(UntrustedBundleError, match=told):
        use()
