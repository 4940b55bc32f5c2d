"""A token by its settings, on hand-made probabilities: every expected value can be worked out in the head."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pastkey.errors import InputError
from pastkey.runtime.sampling import random_stream
from pastkey.runtime.sampling.history import History
from pastkey.runtime.sampling.log_probs import likeliest, token_logprob
from pastkey.runtime.sampling.processors import apply_processor
from pastkey.runtime.sampling.random_stream import EXCLUDE, MAX_SEED, Uniforms, uniform
from pastkey.runtime.sampling.sampler import Sampler
from pastkey.runtime.settings import SamplingConfig

from .vectors import defined_token, sampling_vectors

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = np.log(PROBABILITIES).astype(np.float32)


def test_a_seed_repeats_and_another_does_not():
    seeds: list[Any] = [7, np.int64(7), 8, None, None]
    samplers = [Sampler(SamplingConfig(temperature=1.0, seed=seed)) for seed in seeds]
    first, *others = ([sampler(LOGITS, [0] * place) for place in range(50)] for sampler in samplers)
    assert [first == other for other in others] == [True, False, False, False]
    assert others[-1] != others[-2]


# --- the definition of docs/output.md, bit for bit ----------------------------------------------------------------
@pytest.mark.parametrize("vector", sampling_vectors(), ids=lambda vector: vector.name)
def test_a_vectors_token_is_drawn(vector):
    token, distance = defined_token(vector.logits, vector.ids, vector.u, **vector.settings)
    assert token == vector.expected
    assert distance > 1e-6  # else rounding could decide
    assert uniform(vector.seed, len(vector.ids)) == vector.u
    assert Sampler(SamplingConfig(**vector.options))(vector.logits, vector.ids) == vector.expected


@pytest.mark.parametrize("size", [1, 2, 7, 300, 9000])
def test_the_token_is_that_of_the_definition(size):
    rng = np.random.default_rng(size)
    for _ in range(400 if size < 1000 else 80):
        logits = rng.normal(0, rng.choice([0.01, 1, 4, 30]), size).astype(np.float32)
        logits = np.round(logits) if rng.random() < 0.3 else logits  # ties
        settings = {
            "temperature": float(rng.choice([0, 0.1, 0.7, 1, 3])),
            "top_k": int(rng.choice([0, 0, 1, 5, 40, 10**6])),
            "top_p": float(rng.choice([0.01, 0.5, 0.9, 0.999, 1, 1])),
            "min_p": float(rng.choice([0, 0, 0.05, 1])),
            "repetition_penalty": float(rng.choice([0.7, 1, 1, 1.2])),
        }
        seed, ids = int(rng.integers(0, 2**63 - 1)), rng.integers(0, size, int(rng.integers(0, 60))).tolist()
        expected, _ = defined_token(logits, ids, uniform(seed, len(ids)), **settings)
        assert Sampler(SamplingConfig(**settings, seed=seed))(logits, ids) == expected, settings  # type: ignore[arg-type]


# --- the other stages -----------------------------------------------------------------------------------------------
def choice(ids: list[int] | None = None, logits: np.ndarray = LOGITS, **settings: Any) -> int:
    rest = {name: settings.pop(name) for name in ("prompt_tokens", "max_new_tokens", "end_ids") if name in settings}
    return Sampler(SamplingConfig(**settings), **rest)(logits, ids or [])


@pytest.mark.parametrize(
    ("settings", "ids", "token"),
    [
        ({"logit_bias": {2: 9.0}}, [], 2),
        ({"logit_bias": {1: -np.inf}}, [], 3),
        ({"suppress_tokens": [1, 3]}, [], 4),
        ({"bad_words_ids": [[0, 1]]}, [0], 3),
        ({"bad_words_ids": [[0, 1]]}, [4], 1),
        ({"bad_words_ids": [[1]], "end_ids": [1]}, [], 1),
        ({"presence_penalty": 1.0}, [1], 3),
        ({"frequency_penalty": 0.2}, [1], 1),
        ({"frequency_penalty": 0.2}, [1, 1], 3),
        ({"frequency_penalty": 0.2, "penalty_last_n": 2}, [1, 1, 0], 1),
        ({"repetition_penalty": 9.0, "penalty_last_n": 0}, [1, 0], 1),
        ({"repetition_penalty": 9.0, "penalty_last_n": 1}, [1, 0], 1),
        ({"repetition_penalty": 9.0, "penalty_last_n": 2}, [1, 0], 3),
        ({"no_repeat_ngram_size": 2}, [1, 1], 3),
        ({"dry_multiplier": 1.0}, [0, 2, 1, 0, 2], 3),
        ({"dry_multiplier": 1.0, "dry_penalty_last_n": 4}, [0, 2, 1, 0, 2], 1),
        ({"min_new_tokens": 2, "end_ids": [1], "prompt_tokens": 1}, [0, 0], 3),
        ({"min_new_tokens": 2, "end_ids": [1], "prompt_tokens": 1}, [0, 0, 0], 1),
        ({"forced_decoder_ids": [(1, 4)], "prompt_tokens": 2}, [0, 0, 0], 4),
        ({"forced_decoder_ids": [(1, 4)], "prompt_tokens": 2}, [0, 0], 1),
        ({"forced_eos_token_id": 0, "prompt_tokens": 1, "max_new_tokens": 3}, [0, 0, 0], 0),
        ({"forced_eos_token_id": 0, "prompt_tokens": 1, "max_new_tokens": 3}, [0, 0], 1),
        ({"logits_processor": lambda ids, logits: -logits}, [], 2),
        ({"logits_processor": [lambda ids, logits: -logits, lambda ids, logits: -logits]}, [], 1),
        ({"temperature": 1.0, "top_n_sigma": 0.1}, [], 1),
        ({"temperature": 1.0, "typical_p": 0.01}, [], 3),
    ],
)
def test_each_setting_has_its_effect(settings, ids, token):
    assert choice(ids, **settings) == token
    assert choice(ids, seed=5, **settings) == token


def test_the_order_of_the_first_half():
    """A bias is penalised; a forced token comes although it is a bad word; a function sees what is banned."""
    logits = np.array([1.0, 2.0, 0.0], np.float32)
    assert choice([0], logits, logit_bias={0: 2.0}, repetition_penalty=3.0) == 1  # (1 + 2) / 3, and not 1 / 3 + 2
    assert choice([], logits, bad_words_ids=[[2]], forced_decoder_ids=[(0, 2)]) == 2

    def look(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        assert logits.tolist() == [1, -np.inf, 0]
        return logits

    assert choice([], logits, suppress_tokens=[1], logits_processor=look) == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_place_where_all_is_banned_is_an_error(temperature):
    with pytest.raises(InputError, match="the settings ban every token at this place"):
        choice([], temperature=temperature, suppress_tokens=range(5))
    with pytest.raises(InputError, match="the settings ban every token"):
        choice([], temperature=temperature, suppress_tokens=[2], forced_decoder_ids=[(0, 2)])


def test_xtc_applies_as_often_as_is_asked_by_a_draw_of_its_own():
    config = SamplingConfig(temperature=1.0, xtc_probability=0.3, xtc_threshold=0.2, seed=4)
    sampler, plain = Sampler(config), Sampler(SamplingConfig(temperature=1.0, seed=4))
    applied = 0
    for place in range(4000):
        ids = [0] * place
        if uniform(4, place, EXCLUDE) < 0.3:
            applied += 1
            assert sampler(LOGITS, ids) != 1  # 0.4 is excluded, and 0.3 stays
        else:
            assert sampler(LOGITS, ids) == plain(LOGITS, ids)
    assert 0.27 < applied / 4000 < 0.33
    never = Sampler(SamplingConfig(temperature=1.0, xtc_probability=1.0, xtc_threshold=0.51, seed=4))
    assert [never(LOGITS, [0] * i) for i in range(50)] == [plain(LOGITS, [0] * i) for i in range(50)]


@pytest.mark.parametrize(
    "settings",
    [
        {"logit_bias": {5: 1.0}}, {"bad_words_ids": [[0], [1, 5]]}, {"forced_decoder_ids": [(0, 5)]},
        {"forced_eos_token_id": 5}, {"suppress_tokens": [5]},
    ],
)  # fmt: skip
def test_an_id_out_of_the_vocabulary_is_named(settings):
    (name,) = settings
    with pytest.raises(InputError, match=f"{name} holds 5; token ids are whole numbers from 0 to 4"):
        Sampler(SamplingConfig(**settings), vocab_size=5)
    Sampler(SamplingConfig(**settings), vocab_size=6)


@given(
    logits=arrays(np.float32, 9, elements=st.sampled_from([-3.0, 0.0, 0.5, 0.5, 2.0, float(np.float32(1e30))])),
    ids=st.lists(st.integers(0, 8), max_size=12),
    settings=st.fixed_dictionaries(
        {},
        optional={
            "repetition_penalty": st.sampled_from([2e-45, 0.5, 2.0, 1e38]),
            "presence_penalty": st.sampled_from([-2.0, 1e38]),
            "frequency_penalty": st.sampled_from([-1e38, 1.0]), "dry_multiplier": st.sampled_from([1.0, 1e38]),
            "no_repeat_ngram_size": st.integers(2, 4), "top_n_sigma": st.sampled_from([0.01, 1e38]),
            "typical_p": st.sampled_from([0.01, 0.9]), "xtc_probability": st.sampled_from([0.5, 1.0]),
            "top_k": st.integers(1, 12), "top_p": st.sampled_from([0.01, 0.9]), "min_p": st.sampled_from([0.1, 1.0]),
            "temperature": st.sampled_from([5e-324, 1e-300, 2e-45, 0.5, 1e38]), "suppress_tokens": st.just([1, 2]),
        },
    ),
)  # fmt: skip
def test_any_settings_give_a_token_that_is_not_banned(logits, ids, settings):
    """A warning of numpy's is an error here."""
    token = choice(ids, logits, seed=1, **settings)
    assert 0 <= token < 9
    assert token not in settings.get("suppress_tokens", ())
    assert choice(ids, logits, seed=1, **settings) == token


@pytest.mark.parametrize(
    ("field", "value", "token"),
    [
        ("suppress_tokens", [3, 4], 2),
        ("bad_words_ids", [[2, 4], [2, 3]], 2),
        ("forced_decoder_ids", [[0, 1], [3, 0]], 0),
        ("dry_sequence_breakers", [[1], [2]], 4),
    ],
)
def test_ids_may_be_an_array(field, value, token):
    assert choice([0, 1, 2], np.arange(5, dtype=np.float32), **{field: np.array(value)}) == token


def test_stages_show_what_a_call_draws_from():
    config = SamplingConfig(temperature=0.5, top_k=3, min_p=0.3, seed=4, suppress_tokens=(1,))
    shown = list(Sampler(config).stages(LOGITS, [2]))
    assert [name for name, _ in shown] == ["penalties", "temperature", "top_k", "min_p"]
    assert [int((scores > -math.inf).sum()) for _, scores in shown] == [4, 4, 3, 1]
    assert int(shown[-1][1].argmax()) == Sampler(config)(LOGITS, [2]) == 3


# --- the stream of random numbers -----------------------------------------------------------------------------------
WORD = 2**32 - 1


# Random123 1.14, tests/kat_vectors, "threefry2x32 20".
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((WORD, WORD), (WORD, WORD), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_generator_gives_the_published_answers(counter, key, answer):
    assert random_stream.threefry2x32(key, counter) == answer


def test_the_numbers_and_seeds_of_the_documentation():
    """In docs/bundle-format.md, for those who write the stream in another language."""
    assert uniform(0, 0) == 0.41845711022987275
    assert uniform(0, 1) == 0.3146817218764961
    assert uniform(1, 5) == 0.49113639551488
    assert uniform(MAX_SEED, 1000) == 0.0955491390217722
    assert random_stream.continuation_seed(1, 1) == 3683160032914396005
    assert random_stream.continuation_seed(MAX_SEED, 7) == 6868561896620353006


@pytest.mark.parametrize("seed", [0, 2**40 + 5, MAX_SEED])
def test_numbers_of_a_block_are_those_of_their_places(seed):
    numbers = Uniforms(seed)
    for place in (*range(130), 3, 2**31 - 1, 2**31, 2**32 - 1, 64):
        assert numbers.at(place) == uniform(seed, place), place


def test_lanes_continuations_and_fresh_seeds_differ():
    assert len({uniform(1, 2, lane) for lane in range(8)}) == 8
    for seed in (0, 1, MAX_SEED):
        seeds = [random_stream.continuation_seed(seed, number) for number in range(50)]
        assert seeds[0] == seed
        assert len({*seeds}) == 50
        assert 0 <= min(seeds) <= max(seeds) <= MAX_SEED
    fresh = {random_stream.fresh_seed() for _ in range(20)}
    assert len(fresh) == 20
    assert 0 <= min(fresh) <= max(fresh) <= MAX_SEED


# --- a caller's function --------------------------------------------------------------------------------------------
GIVEN = np.array([1.0, -np.inf, 3.0], np.float32)
IDS = np.array([4, 5])


def test_it_is_given_copies_that_it_may_write_into():
    GIVEN.flags.writeable = IDS.flags.writeable = False

    def processor(ids: Any, logits: Any) -> Any:
        assert (ids.dtype, ids.tolist(), logits.dtype) == (np.int64, [4, 5], np.float32)
        np.testing.assert_array_equal(logits, GIVEN)
        ids[0] = 0
        logits[2] = -np.inf
        return logits

    np.testing.assert_array_equal(apply_processor(GIVEN, IDS, processor), [1, -np.inf, -np.inf])
    assert (GIVEN[2], IDS[0]) == (3, 4)


def test_it_is_given_float32_also_of_what_float32_cannot_hold():
    found = apply_processor(np.array([1e308, -1e308, -np.inf]), IDS, lambda _, logits: logits)
    most = np.finfo(np.float32).max
    np.testing.assert_array_equal(found, [most, -most, -np.inf])


def test_it_may_give_another_array_of_another_precision():
    found = apply_processor(GIVEN, IDS, lambda _, logits: logits.astype(np.float64) * 2)
    np.testing.assert_array_equal(found, [2, -np.inf, 6])


def raising(ids: Any, logits: Any) -> Any:
    raise KeyError("no such word")


class Wrong:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, ids: Any, logits: Any) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (raising, "logits_processor raising raised KeyError: 'no such word'"),
        (Wrong(None), "logits_processor Wrong returned NoneType; .* return an array of numpy"),
        (Wrong(np.zeros(4)), r"returned float64 of shape \(4,\); logits of shape \(3,\)"),
        (Wrong(np.zeros(3, np.int64)), r"returned int64 of shape \(3,\)"),
        (Wrong(np.array([0, np.inf, 1])), "returned NaN or infinity"),
        (lambda ids: ids, "raised TypeError"),
    ],
)
def test_what_is_wrong_with_it_is_told(processor, message):
    with pytest.raises(InputError, match=message):
        apply_processor(GIVEN, IDS, processor)


# --- the ids as an array --------------------------------------------------------------------------------------------
def test_a_list_that_grows_and_others_between():
    history, ids = History(), [1, 2]
    for token in range(1000):
        ids.append(token)
        assert history.of(ids).tolist() == ids
    for other in ([7, 8], [], ids[:5], (4, 5)):
        assert history.of(other).tolist() == [*other]
    with pytest.raises(ValueError, match="read-only"):
        history.of([1])[0] = 2
    assert history.of([1]).dtype == np.int64


# --- log-probabilities ----------------------------------------------------------------------------------------------
@given(
    logits=arrays(np.float32, st.integers(1, 40), elements=st.floats(-300, 300, width=32)),
    top=st.integers(0, 45),
    place=st.integers(0, 39),
)
def test_they_are_the_log_softmax(logits, top, place):
    token = place % logits.size
    wide = logits.astype(np.float64) - logits.max()
    expected = wide - np.log(np.exp(wide).sum())
    found = token_logprob(logits, token, top)
    assert found.id == token
    assert found.logprob == pytest.approx(expected[token], rel=1e-6, abs=1e-5)
    best = np.argsort(-logits, kind="stable")[:top]
    assert [i for i, _ in found.top] == best.tolist()
    np.testing.assert_allclose([p for _, p in found.top], expected[best], rtol=1e-6, atol=1e-5)


def test_of_equal_ones_the_smaller_id_comes_first():
    assert likeliest(np.array([1, 5, 5, 2, 5], np.float32), 2) == [1, 2]
    assert likeliest(np.array([1, 5], np.float32), 0) == []
