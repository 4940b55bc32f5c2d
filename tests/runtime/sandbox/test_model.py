"""Each call gives what the model gives that is opened here, and a process that was taken over is not believed."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import pastkey
from pastkey.errors import InputError, OptionError, UntrustedBundleError
from pastkey.runtime.sandbox import chat_format, process, stream
from pastkey.runtime.sandbox.limits import Limits

from .conftest import EASY, hooked, opened, told

OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.8, "seed": 1, "logprobs": 3, "prompt_logprobs": True},
    {"logit_bias": {3: 50.0, 5: -float("inf")}, "stop": ["c", "zz"], "bad_words": ["d"], "suppress_tokens": (1, 2)},
    {"min_new_tokens": np.int64(3), "keep_special_tokens": True, "bad_words_ids": [np.array([4])]},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_generate(untrusted, trusted, options):
    given = {"max_new_tokens": 12, **options}
    prompts: list[Any] = ["hello world.", np.array([5, 6])]
    for prompt in prompts:
        assert told(untrusted.generate(prompt, **given)) == told(trusted.generate(prompt, **given))


def test_scores_rows_streams_tasks_and_conversations(untrusted, trusted):
    assert untrusted.score("hello") == trusted.score("hello")
    assert untrusted.manifest == trusted.manifest
    assert untrusted.sampling_defaults == trusted.sampling_defaults
    many = [[one.ids for one in model.generate(["ab", "hello"], max_new_tokens=5)] for model in (untrusted, trusted)]
    assert many[0] == many[1]
    chunks = [list(model.stream("hello", max_new_tokens=9, logprobs=2)) for model in (untrusted, trusted)]
    assert chunks[0] == chunks[1]
    assert told(asyncio.run(untrusted.agenerate("ab"))) == told(trusted.generate("ab"))
    chats = [model.chat(system="be kind", special_tokens_as_text=True) for model in (untrusted, trusted)]
    for question in ("hello", "a<b>c"):
        mine, theirs = (chat.ask(question, max_new_tokens=6) for chat in chats)
        assert told(mine) == told(theirs)
    assert chats[0].messages == chats[1].messages
    assert isinstance(untrusted.chat().format, chat_format.SandboxedChatFormat)
    with untrusted.stream("hello", max_new_tokens=500) as left:
        seen = [next(left) for _ in range(4)]
    assert isinstance(left, stream.SandboxedStream)
    assert left.completion is not None
    assert (left.completion.finish_reason, left.completion.text) == ("cancelled", "".join(one.text for one in seen))


@pytest.mark.parametrize(
    "call",
    [
        lambda lm: lm.generate(""),
        lambda lm: lm.generate([99]),
        lambda lm: lm.generate("\ud800"),
        lambda lm: lm.generate("a", temperature=-1),
        lambda lm: lm.generate("a", temprature=1),
    ],
)
def test_errors_are_those_of_the_model(untrusted, trusted, call):
    with pytest.raises((InputError, OptionError)) as theirs:
        call(trusted)
    with pytest.raises(type(theirs.value)) as mine:
        call(untrusted)
    assert str(mine.value) == str(theirs.value)


def test_what_it_lacks_is_said(untrusted, talking_bundle):
    with pytest.raises(InputError, match="logits_processor is a function"):
        untrusted.generate("a", logits_processor=lambda ids, logits: logits)
    with pytest.raises(AttributeError, match=r"a sandboxed model has no 'session'; it has generate, .* trust=True"):
        untrusted.session()
    with pytest.raises(OptionError, match="has no option 'n'"):
        untrusted.generate("a", n=2)
    with pytest.raises(InputError, match="runs on the CPU alone"):
        pastkey.load(talking_bundle.path, "cuda", trust=False)
    with pytest.raises(InputError, match="limits are for a bundle that is not trusted, and trust is True"):
        pastkey.load(talking_bundle.path, limits=EASY)  # type: ignore[call-overload]
    with pytest.raises(InputError, match="trust is None"):
        pastkey.load(talking_bundle.path, trust=None)  # type: ignore[call-overload]
    assert untrusted.limits is not None
    assert untrusted.limits.seconds == 60


def test_a_closed_model(talking_bundle):
    model = opened(talking_bundle.path)
    reading = model.stream("hello", max_new_tokens=500)
    next(reading)
    model.close()
    assert [*reading] == []
    for call in (lambda: model.generate("a"), lambda: model.score([1]), model.chat):
        with pytest.raises(InputError, match="this model is closed"):
            call()


@pytest.mark.parametrize(
    ("what", "answer", "words"),
    [
        ("load", "{'kind': 'bundle'}", "answered with no manifest"),
        ("defaults", "{'temperature': -1}", "answered with no sampling defaults"),
        ("next", "P.Step(5, P.Chunk('x', [1] * 9))", "answered with more than 20 new tokens"),
        ("next", "P.Step(5, P.Chunk('x', [37]))", "answered with a token of id 37"),
        ("next", "P.Step(5, P.Chunk('x' * 17_000_000, []))", r"answered with a message of 17,0\d\d,\d\d\d bytes"),
    ],
)
def test_a_process_that_was_taken_over(talking_bundle, monkeypatch, what, answer, words):
    """It answers well until this call."""
    hook = "from pastkey.runtime.sandbox import protocol as P, server\n"
    hook += f"server.Server.do_{what} = lambda self, **given: {answer}\n"
    monkeypatch.setattr(process, "BOOT", hooked(hook))

    def use() -> None:
        with opened(talking_bundle.path, Limits(seconds=60.0)) as model:
            assert model.sampling_defaults == {}
            model.generate("hello", max_new_tokens=20)

    with pytest.raises(UntrustedBundleError, match=words):
        use()
