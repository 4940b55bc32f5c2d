"""A text that is longer than the context: an error, or the oldest tokens go, wherever the text is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError
from pastkey.runtime import load
from pastkey.runtime.engine import engine as engines

from ..rotary import RotaryTiny

MakeBundle = Callable[..., Bundle]
CONTEXT, SINKS = 64, 4
BLOCK = (CONTEXT - SINKS) // 2


def ids_of(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 37, count).tolist()


def continued(tiny: RotaryTiny, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens by the reference, which drops half of what is no sink where the context is full."""
    reference, rows, ids = tiny.reference(), len(prompt), list[int]()
    logits = reference.feed(prompt)[-1]
    while True:
        ids.append(int(logits.argmax()))
        if len(ids) == count:
            return ids
        if rows == CONTEXT:
            reference.drop(SINKS, BLOCK)
            rows -= BLOCK
        logits = reference.feed(ids[-1:])[-1]
        rows += 1


@pytest.fixture(scope="module", params=["fused", "standard"])
def bundle(request, make_bundle, tiny_rotary):
    return make_bundle(tiny_rotary, request.param, shift=tiny_rotary.shift)


@pytest.fixture(scope="module")
def tiny_rotary():
    return RotaryTiny.of(16, CONTEXT, pairs=4)


@pytest.fixture
def lm(bundle):
    return load(bundle.path, threads=1)


SHIFT: dict[str, Any] = {"context_overflow": "shift"}
REFUSED: list[tuple[list[int], dict[str, Any], str]] = [
    ([1], {"context_overflow": "drop"}, "context_overflow is 'drop'"),
    ([1], {**SHIFT, "num_sink_tokens": 33}, "num_sink_tokens is 33"),
    ([*ids_of(100), 37], SHIFT, "token id 37 is out of range"),
    (ids_of(100), {**SHIFT, "prompt_logprobs": True}, "the prompt has 100 tokens; the context is 64"),
    (ids_of(100), {}, r"--context-overflow shift"),
]


def test_context_overflow_options_that_are_refused(lm, make_bundle, tiny):
    for prompt, options, words in REFUSED:
        with pytest.raises(InputError, match=words):
            lm.generate(prompt, **options)
    with pytest.raises(InputError, match=r"shorten the text, or export with a larger --context$"):
        lm.score(ids_of(CONTEXT + 1))
    fixed = load(make_bundle(tiny).path, threads=1)  # its positions are learned
    with pytest.raises(InputError, match='context_overflow is "shift", and the cache of tiny cannot be shifted'):
        fixed.generate([1], context_overflow="shift")
    with pytest.raises(InputError, match=r"shorten the text, or export with a larger --context$"):
        fixed.generate([1] * (tiny.context_length + 1))


# --- generating ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prompt_tokens", [5, 60, CONTEXT])
def test_generation_with_shifts_equals_the_reference(lm, tiny_rotary, prompt_tokens):
    prompt = ids_of(prompt_tokens)
    completion = lm.generate(prompt, max_new_tokens=150, context_overflow="shift")
    assert completion.ids == continued(tiny_rotary, prompt, 150)
    assert completion.finish_reason == "length"
    assert completion.dropped_tokens == -(-(prompt_tokens + 149 - CONTEXT) // BLOCK) * BLOCK
    assert completion.prompt_tokens == prompt_tokens
    cut = lm.generate(prompt, max_new_tokens=150)  # without it the text ends with the context
    assert (cut.ids, cut.finish_reason) == (completion.ids[: CONTEXT - prompt_tokens + 1], "length")


def test_several_texts_at_the_same_time(lm, tiny_rotary):
    prompts = [ids_of(count, count) for count in (3, 30, 50, 61, 64)]
    found = lm.generate(prompts, max_new_tokens=100, context_overflow="shift", prompt_lookup=False)
    assert [completion.ids for completion in found] == [continued(tiny_rotary, prompt, 100) for prompt in prompts]
    assert (lm.scheduler.batched > 100) is (lm.manifest.graph == "fused")


def test_a_cut_prompt_continues_as_its_kept_tokens(lm, tiny_rotary):
    ids = ids_of(500)
    gone = -(-(500 - CONTEXT) // BLOCK) * BLOCK
    kept = [*ids[:SINKS], *ids[SINKS + gone :]]
    completion = lm.generate(ids, max_new_tokens=60, context_overflow="shift", logprobs=0)
    assert completion.ids == continued(tiny_rotary, kept, 60)
    assert (completion.prompt_tokens, len(completion.logprobs)) == (500, 60)
    first = lm.generate(ids, max_new_tokens=5, context_overflow="shift", reuse_prefix=True)
    again = lm.generate([*ids, *first.ids], max_new_tokens=5, context_overflow="shift", reuse_prefix=True)
    assert again.cached_tokens == len(kept) + 3  # what is cut as the last prompt was is computed once


def test_what_was_shifted_is_no_prefix(lm):
    prompt = ids_of(50)
    options = {"max_new_tokens": 40, "context_overflow": "shift", "reuse_prefix": True}
    found = lm.generate(prompt, **options)
    kept = [*prompt, *found.ids]
    kept = [*kept[:SINKS], *kept[SINKS + found.dropped_tokens :]]
    assert lm.generate(kept, **options).cached_tokens == 0


@pytest.mark.parametrize("others", [0, 1])
def test_a_fault_within_a_shift_ends_the_texts_of_its_step(lm, monkeypatch, others):
    options = {"max_new_tokens": 30, "context_overflow": "shift", "prompt_lookup": False}
    expected = lm.generate(ids_of(50), **options)
    with monkeypatch.context() as patched:
        patched.setattr(engines, "moved_by", interrupted)
        stream = lm.stream_many([ids_of(50)] * (1 + others), **options)
        found = [next(stream)[1].ids[0] for _ in range(15 * (1 + others))]
        with pytest.raises(MemoryError):
            list(stream)
    assert found[:: 1 + others] == expected.ids[:15]
    assert lm.generate(ids_of(50), **options).ids == expected.ids


def interrupted(*_: object) -> None:
    raise MemoryError


def test_more_forced_tokens_than_the_context_holds(make_bundle, tiny_rotary, letters):
    pytest.importorskip("llguidance")
    lm = load(make_bundle(tiny_rotary, "fused", tokenizer=letters, shift=tiny_rotary.shift).path, threads=1)
    found = lm.generate(ids_of(50), regex="[ab]f{100}[cd]", max_new_tokens=110, **SHIFT)
    assert (found.ids[1:-1], found.forced_tokens, found.finish_reason) == ([5] * 100, 100, "stop")
    assert found.dropped_tokens == 3 * BLOCK


# --- sessions -----------------------------------------------------------------------------------------------------
def test_a_session_holds_what_is_in_the_context(lm, tiny_rotary, tmp_path):
    session, prompt = lm.session(), ids_of(50)
    found = session.generate(prompt, max_new_tokens=60, context_overflow="shift")
    text = [*prompt, *found.ids]
    kept = [*text[:SINKS], *text[SINKS + found.dropped_tokens :]]
    assert session.ids == kept
    fork = session.fork()
    session.save(tmp_path / "saved")
    loaded = lm.load_session(tmp_path / "saved")
    assert loaded.ids == kept
    expected = continued(tiny_rotary, kept, 5)
    for one in (session, fork, loaded):
        more = one.generate(max_new_tokens=5, context_overflow="shift")
        assert (more.ids, more.cached_tokens) == (expected, 0)
    session.trim(20)
    assert session.generate(max_new_tokens=3).ids == continued(tiny_rotary, kept[:20], 3)


def test_a_session_takes_more_than_the_context_holds(lm):
    session = lm.session()
    with pytest.raises(InputError, match="the prompt has 200 tokens"):
        session.append(ids_of(200))
    session.append(ids_of(200), context_overflow="shift")
    gone = -(-(200 - CONTEXT) // BLOCK) * BLOCK
    assert session.ids == [*ids_of(200)[:SINKS], *ids_of(200)[SINKS + gone :]]
    assert session.generate(max_new_tokens=2).cached_tokens == 200 - gone - 2


def test_a_saved_session_of_what_is_local(make_bundle, tmp_path):
    tiny = RotaryTiny.of(16, 1000, pairs=8, inside=True, window=24)
    lm = load(make_bundle(tiny, "fused", shift=tiny.shift, window=24).path, threads=1)
    session, ids = lm.session(), ids_of(600)
    session.append(ids)
    session.save(tmp_path / "saved")
    loaded = lm.load_session(tmp_path / "saved")
    fork = session.fork()
    expected = session.generate(max_new_tokens=20)
    assert (tmp_path / "saved").stat().st_size < 200_000  # 600 tokens are 307,200 bytes of keys and values
    for other in (loaded, fork):
        found = other.generate(max_new_tokens=20)
        assert (found.ids, found.cached_tokens) == (expected.ids, 598)
    session.trim(100)
    assert session.generate(max_new_tokens=5).cached_tokens == 0


def test_local_texts_at_the_same_time(make_bundle):
    tiny = RotaryTiny.of(16, 1000, pairs=8, inside=True, window=24)
    local = load(make_bundle(tiny, "fused", shift=tiny.shift, window=24).path, threads=1)
    whole = load(make_bundle(tiny, "fused").path, threads=1)
    prompts = [ids_of(count, count) for count in (10, 300, 500)]
    options = {"max_new_tokens": 300, "prompt_lookup": False}
    found = local.generate(prompts, **options)  # type: ignore[call-overload]
    assert [one.ids for one in found] == [whole.generate(prompt, **options).ids for prompt in prompts]  # type: ignore[call-overload]
    assert local.scheduler.batched > 300


# --- conversations and commands -----------------------------------------------------------------------------------
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}.{% endfor %}"


def test_a_conversation_keeps_what_comes_before_its_first_question(tiny_rotary, letters, make_bundle):
    config = {"chat_template": TEMPLATE}
    fields = {"tokenizer": letters, "tokenizer_config": config, "shift": tiny_rotary.shift}
    lm = load(make_bundle(tiny_rotary, "fused", **fields).path, threads=1)
    chat, options = lm.chat("be kind"), {"max_new_tokens": 10, "context_overflow": "shift"}
    for question in ("abcdefghi", "hello", "once upon a time", "and then"):
        answer = chat.ask(question, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="with this message the conversation has"):
        chat.ask("more")
    text = "".join(f"<{said['role']}>{said['content']}." for said in chat.messages[:-1])
    assert len(text) > 2 * CONTEXT
    head = len("<system>be kind.<user>")
    expected = lm.generate(text, num_sink_tokens=head, **options)  # type: ignore[call-overload]
    assert (answer.text, answer.dropped_tokens) == (expected.text, expected.dropped_tokens)
    assert answer.dropped_tokens > CONTEXT
