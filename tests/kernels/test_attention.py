"""DecoderAttention against GroupQueryAttention, numpy and itself, at every level of this machine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from .conftest import each_level
from .graphs import case, draw, evicted, in_numpy
from .running import Array, Case

FORMS = ("float32", "float16")
WINDOWS = (1, 2, 100, 127, 128, 129, 1000)

Inputs = tuple[dict[str, Array], dict[str, Any]]  # and attributes
NONE: dict[str, Any] = {}

# GroupQueryAttention computes the same, by name.
HEADS: dict[str, Inputs] = {
    f"{heads} heads of {d}, {name}": (draw([length], new, heads, d, rotary=rotary, packed=packed), NONE)
    for heads in ((2, 2), (9, 3), (8, 1))
    for d in (32, 48, 64, 80, 96, 128, 256)
    for name, length, new, rotary, packed in (
        ("one token", 261, 1, d, True),
        ("some tokens", 133, 5, d // 2 // 16 * 16, False),
        ("a prompt", 37, 37, d, True),
    )
}
FEATURES: dict[str, Inputs] = {
    "rows of different lengths": (draw([260, 3, 130], 1, rotary=64), {}),
    "a first prompt with padding": (draw([40, 1, 17], 40, rotary=64), {}),
    "soft cap": (draw([150], 7, size=4), {"softcap": 5.0}),
    "smooth softmax": (draw([150], 7), {"smooth_softmax": 1}),
    "sinks": (draw([150], 7, sink=True), {}),
    "window, soft cap and sinks": (draw([150], 3, sink=True), {"local_window_size": 20, "softcap": 30.0}),
    "interleaved": (draw([150], 7, rotary=64), {"rotary_interleaved": 1}),
    "interleaved in part": (draw([150], 7, rotary=32, packed=False), {"rotary_interleaved": 1, "scale": 0.3}),
    "many heads": (draw([70], 3, (71, 1)), {}),
}
WINDOWED: dict[str, Inputs] = {
    f"window {w}, {new} tokens": (draw([length], new), {"local_window_size": w})
    for w in WINDOWS
    for length, new in ((300, 1), (140, 140))
}
SAME = HEADS | FEATURES | WINDOWED
# Prompts over a float16 cache: the level amx has separate products for more than 8 new tokens.
PROMPTS: dict[str, Inputs] = {
    f"prompt, {name}": (draw(lengths, new, heads, d, **{"form": "float16", **more}), attributes)
    for name, lengths, new, heads, d, more, attributes in (
        ("heads of 32", [37], 37, (4, 4), 32, NONE, NONE),
        ("heads of 48", [300], 9, (6, 2), 48, NONE, NONE),
        ("heads of 80", [150], 40, (6, 2), 80, {"rotary": 80}, NONE),
        ("heads of 256", [140], 33, (8, 1), 256, NONE, NONE),
        ("rows of different lengths", [260, 13, 130], 13, (6, 2), 64, {"rotary": 64}, NONE),
        ("padding", [40, 1, 17], 40, (6, 2), 64, NONE, NONE),
        ("window", [300], 45, (6, 2), 64, NONE, {"local_window_size": 20}),
        ("soft cap and sinks", [150], 70, (6, 2), 64, {"sink": True, "size": 4}, {"softcap": 5.0}),
        ("many heads", [70], 12, (71, 1), 64, NONE, NONE),
    )
}
# Windowed cases over caches whose first tokens are gone, as many of each row.
EVICTED: dict[str, tuple[dict[str, Array], dict[str, Any], tuple[int, ...]]] = {
    f"{form}, {new} new, window {window}, without {gone}": (
        draw(lengths, new, form=form, rotary=64),
        {"local_window_size": window},
        gone,
    )
    for form in FORMS
    for lengths, new, window, gone in (
        ([300], 1, 20, (280,)),  # all that the token does not see
        ([300], 1, 20, (1,)),
        ([300], 45, 20, (236,)),  # within a block of 16
        ([300], 45, 130, (126,)),
        ([260, 130, 9], 1, 100, (150, 30, 0)),
        ([300], 9, 1, (291,)),
    )
}
SAME_BITS = 8  # new tokens; more have another rounding at the level amx over a float16 cache
LENGTHS = {"decode": ([300], 1), "drafts": ([300], 8), "rows": ([300, 9, 128], 1), "chunk": ([300], 40)}
PROMPT = 290  # more than two parts of 128
CAPS = (1e-30, 0.1, 5.0, 50.0, 1e3, 1e5, 1e8, 1e30)
ALONE = (0, 1, 127, 128, 200, 289)


def heads_of(feed: dict[str, Array]) -> tuple[int, int]:
    g, d = feed["past_key"].shape[1], feed["past_key"].shape[3]
    width = feed["query"].shape[2] // d
    return (width if "key" in feed else width - 2 * g), g


def named(feed: dict[str, Array], attributes: dict[str, Any]) -> dict[str, Any]:
    h, g = heads_of(feed)
    return {"num_heads": h, "kv_num_heads": g, "do_rotary": int("cos" in feed)} | attributes


def native(feeds: list[dict[str, Array]], threads: int = 1, **attributes: Any) -> Case:
    return case(feeds, threads=threads, **named(feeds[0], attributes))


def step(feed: dict[str, Array], i: int, keys: Array, values: Array) -> dict[str, Array]:
    """Only token i of a prompt, over a cache."""
    lengths = {"seqlens_k": np.full_like(feed["seqlens_k"], i), "total_sequence_length": np.array(i + 1, np.int32)}
    return feed | lengths | {"query": feed["query"][:, i : i + 1], "past_key": keys, "past_value": values}


def special() -> dict[str, dict[str, Array]]:
    """Inputs with NaN or infinity, 8 new tokens after 142 of 150."""
    made = {name: draw([150], 8) for name in ("query", "inf query", "value", "key", "past", "beyond", "inf past")}
    made["query"]["query"][0, 3, 5] = np.nan  # head 0
    made["inf query"]["query"][0, 3, 5] = np.inf
    made["value"]["query"][0, 3, 8 * 64] = np.nan  # key head 0: query heads 0, 1, 2
    made["key"]["query"][0, 3, 6 * 64] = np.nan
    made["past"]["past_value"][0, 1, 2, 7] = np.nan
    made["inf past"]["past_key"][0, 1, 2, 7] = np.inf
    made |= {name: draw([153], 11, form="float16") for name in ("value of a prompt", "beyond a prompt")}
    made["value of a prompt"]["query"][0, 3, 8 * 64] = np.nan
    made["value float16"] = draw([150], 8, form="float16")
    made["value float16"]["query"][0, 3, 8 * 64] = np.inf
    made["before the window"] = draw([150], 8)
    for name in ("past_key", "past_value"):
        made["beyond"][name][:, :, 150:] = made["beyond a prompt"][name][:, :, 153:] = np.nan
        made["before the window"][name][:, :, :130] = np.nan
    return made


def cases() -> dict[Any, Case]:
    made: dict[Any, Case] = {}
    for name, (feed, attributes) in (SAME | PROMPTS).items():
        made["ours", name] = native([feed], **attributes)
        if name in SAME:
            made["theirs", name] = case([feed], "GroupQueryAttention", **named(feed, attributes))
    for form in FORMS:
        for name, (lengths, new) in LENGTHS.items():
            for threads in (1, 2, 3, 4):
                made["form", form, name, threads] = native([draw(lengths, new, form=form)], threads)
        for window in (-1, 130):
            feed = draw([PROMPT], PROMPT, rotary=64, form=form)
            made["prompt", form, window] = native([feed], local_window_size=window)
    for name, (feed, attributes, gone) in EVICTED.items():
        made["whole", name] = native([feed], **attributes)
        made["left", name] = native([evicted(feed, *gone)], **attributes)
    for cap in CAPS:
        made["cap", cap] = native([draw([150], 7)], softcap=cap)
    for name, feed in special().items():
        made["special", name] = native([feed], local_window_size=13 if name == "before the window" else -1)
    tiny = draw([150], 1, form="float16")
    tiny["query"][0, 0, 6 * 64 :] = 2.0 ** np.linspace(-30, 18, 256)
    made["float16",] = native([tiny])
    return made


CASES = cases()


@pytest.fixture(scope="module")
def outcomes(run):
    """The outcomes of all cases at a level, run once, and of single tokens over the caches of prompts."""

    @functools.cache
    def once(level):
        found, steps = run(level, CASES), {}
        for key, outcome in found.items():
            assert not outcome.error, key
            if key[0] == "prompt":
                alone = [step(CASES[key].feeds[0], i, *outcome.outputs[0][1:]) for i in ALONE]
                steps["alone", *key[1:]] = native(alone, local_window_size=key[2])
        return found | run(level, steps)

    return once


def same(a: Array, b: Array) -> bool:
    """Bit for bit, but for the payload of NaN."""
    return np.array_equal(a, b, equal_nan=True) and bool((np.signbit(a) == np.signbit(b))[~np.isnan(a)].all())


def agree(level: str, tokens: int, a: Sequence[Array], b: Sequence[Array]) -> bool:
    """The same output and cache; by bits, but for a prompt's output of AMX."""
    y, *cache = a
    other, *kept = b
    if level == "amx" and cache[0].dtype == np.float16 and tokens > SAME_BITS:
        nan = np.isnan(y)
        near = np.abs(np.where(nan, 0, y) - np.where(nan, 0, other)).max() < 3e-5 * np.nanmax(np.abs(other))
        return bool(near and (nan == np.isnan(other)).all()) and all(map(same, cache, kept))
    return all(map(same, a, b))


@pytest.mark.parametrize("name", SAME)
def test_equals_group_query_attention(outcomes, name):
    found = outcomes("portable")
    feed = SAME[name][0]
    ours, theirs = found["ours", name].outputs[0], found["theirs", name].outputs[0]
    new = feed["query"].shape[1]
    for b, last in enumerate(feed["seqlens_k"]):
        real = min(last + 1, new)
        past = last + 1 - real
        assert np.abs(ours[0][b, :real] - theirs[0][b, :real]).max() < 5e-6
        assert (ours[0][b, real:] == 0).all()  # padding
        for given, mine, other in zip(("past_key", "past_value"), ours[1:], theirs[1:], strict=True):
            assert np.abs(mine[b, :, : last + 1] - other[b, :, : last + 1]).max() < 1e-6
            assert same(mine[b, :, :past], feed[given][b, :, :past])
            assert same(mine[b, :, last + 1 :], feed[given][b, :, last + 1 :])


@each_level
def test_every_level_gives_the_bits_of_the_reference(outcomes, level):
    found, reference = outcomes(level), outcomes("portable")
    for key in reference:
        if key[0] != "theirs":
            new = CASES[key].feeds[0]["query"].shape[1] if key in CASES else 1
            for ours, theirs in zip(found[key].outputs, reference[key].outputs, strict=True):
                assert agree(level, new, ours, theirs), key


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LENGTHS)
def test_every_form_of_the_cache_equals_numpy(outcomes, form, name):
    feed = draw(*LENGTHS[name], form=form)
    y, keys, values = outcomes("portable")["form", form, name, 1].outputs[0]
    expected = in_numpy(feed, (6, 2), form)
    assert np.abs(y - expected[0]).max() < 5e-6
    assert same(keys, expected[1])
    assert same(values, expected[2])


@pytest.mark.parametrize("cap", CAPS)
def test_a_soft_cap_of_any_size_equals_numpy(outcomes, cap):
    expected = in_numpy(draw([150], 7), (6, 2), "float32", cap)
    assert np.abs(outcomes("portable")["cap", cap].outputs[0][0] - expected[0]).max() < 5e-6


@each_level
def test_any_number_of_threads_gives_the_same_bits(outcomes, level):
    found = outcomes(level)
    for form in FORMS:
        for name in LENGTHS:
            one, *more = (found["form", form, name, threads].outputs[0] for threads in (1, 2, 3, 4))
            for others in more:
                assert all(map(same, others, one)), (form, name)


@each_level
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [-1, 130])
def test_a_token_alone_has_the_bits_it_has_in_a_prompt(outcomes, level, form, window):
    found = outcomes(level)
    whole, keys, values = found["prompt", form, window].outputs[0]
    for i, (y, *cache) in zip(ALONE, found["alone", form, window].outputs, strict=True):
        assert agree(level, PROMPT if form == "float16" else 1, [whole[0, i], keys, values], [y[0, 0], *cache])


@each_level
@pytest.mark.parametrize("name", EVICTED)
def test_tokens_that_no_window_sees_may_be_gone(outcomes, level, name):
    feed, _, gone = EVICTED[name]
    found = outcomes(level)
    whole, *kept = found["whole", name].outputs[0]
    left, *cached = found["left", name].outputs[0]
    assert same(left, whole)
    for given, now, before in zip(("past_key", "past_value"), cached, kept, strict=True):
        for b, (count, last) in enumerate(zip(gone, feed["seqlens_k"], strict=True)):
            assert same(now[b, :, : last + 1 - count], before[b, :, count : last + 1]), given


def not_finite(found, name) -> set[tuple[int, int]]:
    """The new tokens and heads whose output is all NaN; the others are finite, or partly so."""
    y = found["special", name].outputs[0][0][0].reshape(-1, 6, 64)
    return {(i, h) for i in range(len(y)) for h in range(6) if np.isnan(y[i, h]).any()}


@each_level
def test_nan_and_infinity_reach_what_sees_them_and_nothing_else(outcomes, level):
    found = outcomes(level)
    later = {(i, h) for i in range(3, 8) for h in range(3)}
    assert not_finite(found, "query") == not_finite(found, "inf query") == {(3, 0)}
    assert not_finite(found, "key") == not_finite(found, "value") == later
    assert not_finite(found, "past") == {(i, h) for i in range(8) for h in range(3, 6)}
    assert not_finite(found, "inf past") <= {(i, h) for i in range(8) for h in range(3, 6)} != set()
    assert not_finite(found, "value of a prompt") == {(i, h) for i in range(3, 11) for h in range(3)}
    for unread in ("beyond", "beyond a prompt", "before the window"):
        assert np.isfinite(found["special", unread].outputs[0][0]).all()
    y = found["special", "value float16"].outputs[0][0][0].reshape(8, 6, 64)
    assert {(i, h) for i in range(8) for h in range(6) if not np.isfinite(y[i, h]).all()} == later


def test_float16_is_rounded_to_even_from_subnormal_to_infinity(outcomes):
    written = CASES["float16",].feeds[0]["query"][0, 0, 6 * 64 :].reshape(4, 64)
    _, keys, values = outcomes("portable")["float16",].outputs[0]
    with np.errstate(over="ignore"):
        expected = written.astype(np.float16)
    assert np.isinf(expected).any()
    assert same(keys[0, :, 149], expected[:2])
    assert same(values[0, :, 149], expected[2:])
