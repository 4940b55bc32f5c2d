"""A text that is longer than the context: an error, or the oldest tokens are dropped, wherever the text is made."""

from __future__ import annotations

from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime import load
from pastkey.runtime.engine import engine as engines

from ..conftest import TEMPLATE, ids_of
from ..rotary import RotaryTiny

CONTEXT, SINKS = 64, 4
BLOCK = (CONTEXT - SINKS) // 2
SHIFT: dict[str, Any] = {"context_overflow": "shift"}


def kept_of(ids: list[int], gone: int) -> list[int]:
    return [*ids[:SINKS], *ids[SINKS + gone :]]


def gone_of(count: int) -> int:
    """How many of so many tokens leave for the others to have room."""
    return -(-(count - CONTEXT) // BLOCK) * BLOCK


def continued(tiny: RotaryTiny, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens by the reference, which drops half of the tokens that are no sink if the context is full."""
    reference, rows, ids = tiny.reference(), len(prompt), list[int]()
    logits = reference.feed(prompt)[-1]
    while len(ids) < count:
        ids.append(int(logits.argmax()))
        if rows == CONTEXT:
            reference.drop(SINKS, BLOCK)
            rows -= BLOCK
        logits = reference.feed(ids[-1:])[-1]
        rows += 1
    return ids


@pytest.fixture(scope="module")
def rotary():
    return RotaryTiny.of(16, CONTEXT, pairs=4)


@pytest.fixture(scope="module", params=["fused", "standard"])
def bundle(request, make_bundle, rotary):
    return rotary.written(make_bundle, request.param)


@pytest.fixture
def lm(bundle):
    return load(bundle.path, threads=1)


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
    fixed = load(make_bundle(tiny).path, threads=1)  # its positions are learned
    with pytest.raises(InputError, match='context_overflow is "shift", and the cache of tiny cannot be shifted'):
        fixed.generate([1], context_overflow="shift")
    for call, count in ((lm.score, CONTEXT + 1), (fixed.generate, tiny.context_length + 1)):
        with pytest.raises(InputError, match=r"shorten the text, or export with a larger --context$"):
            call([1] * count)


# --- generating ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prompt_tokens", [5, 60, CONTEXT])
def test_generation_with_shifts_equals_the_reference(lm, rotary, prompt_tokens):
    prompt = ids_of(prompt_tokens)
    completion = lm.generate(prompt, max_new_tokens=150, **SHIFT)
    assert completion.ids == continued(rotary, prompt, 150)
    assert completion.finish_reason == "length"
    assert completion.dropped_tokens == gone_of(prompt_tokens + 149)
    assert completion.prompt_tokens == prompt_tokens
    cut = lm.generate(prompt, max_new_tokens=150)  # without it the text ends with the context
    assert (cut.ids, cut.finish_reason) == (completion.ids[: CONTEXT - prompt_tokens + 1], "length")


def test_several_texts_at_the_same_time(lm, rotary):
    prompts = [ids_of(count, count) for count in (3, 30, 50, 61, 64)]
    found = lm.generate(prompts, max_new_tokens=100, prompt_lookup=False, **SHIFT)
    assert [completion.ids for completion in found] == [continued(rotary, prompt, 100) for prompt in prompts]
    assert (lm.scheduler.batched > 100) is (lm.manifest.graph == "fused")


def test_a_cut_prompt_continues_as_its_kept_tokens(lm, rotary):
    ids = ids_of(500)
    kept = kept_of(ids, gone_of(500))
    completion = lm.generate(ids, max_new_tokens=60, logprobs=0, **SHIFT)
    assert completion.ids == continued(rotary, kept, 60)
    assert (completion.prompt_tokens, len(completion.logprobs)) == (500, 60)
    first = lm.generate(ids, max_new_tokens=5, reuse_prefix=True, **SHIFT)
    again = lm.generate([*ids, *first.ids], max_new_tokens=5, reuse_prefix=True, **SHIFT)
    assert again.cached_tokens == len(kept) + 3  # a text that is cut like the last prompt is computed once


def test_a_fault_within_a_shift_ends_the_texts_of_its_step(lm, monkeypatch):
    options = {"max_new_tokens": 30, "prompt_lookup": False, **SHIFT}
    expected = lm.generate(ids_of(50), **options)

    def failing(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(engines, "moved_by", failing)
        stream = lm.stream_many([ids_of(50)] * 2, **options)
        assert [next(stream)[1].ids[0] for _ in range(30)][::2] == expected.ids[:15]
        with pytest.raises(MemoryError):
            list(stream)
    assert lm.generate(ids_of(50), **options).ids == expected.ids


def test_more_forced_tokens_than_the_context_holds(make_bundle, rotary, letters):
    pytest.importorskip("llguidance")
    lm = load(rotary.written(make_bundle, tokenizer=letters).path, threads=1)
    found = lm.generate(ids_of(50), regex="[ab]f{100}[cd]", max_new_tokens=110, **SHIFT)
    assert (found.ids[1:-1], found.forced_tokens, found.finish_reason) == ([5] * 100, 100, "stop")
    assert found.dropped_tokens == 3 * BLOCK


# --- sessions and conversations -----------------------------------------------------------------------------------
def test_a_session_holds_what_is_in_the_context(lm, rotary, tmp_path):
    session, prompt = lm.session(), ids_of(50)
    found = session.generate(prompt, max_new_tokens=60, **SHIFT)
    kept = kept_of([*prompt, *found.ids], found.dropped_tokens)
    fork = session.fork()
    session.save(tmp_path / "saved")
    loaded = lm.load_session(tmp_path / "saved")
    for one in (session, fork, loaded):
        assert one.ids == kept
        more = one.generate(max_new_tokens=5, **SHIFT)
        assert (more.ids, more.cached_tokens) == (continued(rotary, kept, 5), 0)
    session.trim(20)
    assert session.generate(max_new_tokens=3).ids == continued(rotary, kept[:20], 3)


def test_a_session_takes_more_than_the_context_holds(lm):
    session, ids = lm.session(), ids_of(200)
    with pytest.raises(InputError, match="the prompt has 200 tokens"):
        session.append(ids)
    session.append(ids, **SHIFT)
    assert session.ids == kept_of(ids, gone_of(200))
    assert session.generate(max_new_tokens=2).cached_tokens == 200 - gone_of(200) - 2


def test_texts_and_a_saved_session_of_what_is_local(make_bundle, tmp_path):
    tiny = RotaryTiny.of(16, 1000, pairs=8, inside=True, window=24)
    local, whole = (load(found.path, threads=1) for found in (tiny.written(make_bundle), make_bundle(tiny)))
    prompts = [ids_of(count) for count in (10, 300, 500)]
    options: dict[str, Any] = {"max_new_tokens": 300, "prompt_lookup": False}
    found = local.generate(prompts, **options)
    assert [one.ids for one in found] == [whole.generate(prompt, **options).ids for prompt in prompts]
    assert local.scheduler.batched > 300
    session = local.session()
    session.append(ids_of(600))
    session.save(tmp_path / "saved")
    assert (tmp_path / "saved").stat().st_size < 200_000  # 600 tokens are 307,200 bytes of keys and values
    others = local.load_session(tmp_path / "saved"), session.fork()
    expected = session.generate(max_new_tokens=20)
    for other in others:
        again = other.generate(max_new_tokens=20)
        assert (again.ids, again.cached_tokens) == (expected.ids, 598)
    session.trim(100)
    assert session.generate(max_new_tokens=5).cached_tokens == 0


def test_a_conversation_keeps_what_comes_before_its_first_question(rotary, letters, make_bundle):
    config = {"chat_template": TEMPLATE.removesuffix("<assistant>")}
    lm = load(rotary.written(make_bundle, tokenizer=letters, tokenizer_config=config).path, threads=1)
    chat, options = lm.chat("be kind"), {"max_new_tokens": 10, **SHIFT}
    for question in ("abcdefghi", "hello", "once upon a time", "and then"):
        answer = chat.ask(question, **options)
    with pytest.raises(InputError, match="with this message the conversation has"):
        chat.ask("more")
    text = "".join(f"<{said['role']}>{said['content']}." for said in chat.messages[:-1])
    expected = lm.generate(text, num_sink_tokens=len("<system>be kind.<user>"), **options)
    assert (answer.text, answer.dropped_tokens) == (expected.text, expected.dropped_tokens)
    assert answer.dropped_tokens > CONTEXT
