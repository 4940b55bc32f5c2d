"""The sampling that a model's authors name."""

from __future__ import annotations

import dataclasses

import pytest

from pastkey.errors import IntegrityError
from pastkey.runtime import ChatOptions, load
from pastkey.runtime.model.generation_config import sampling_defaults

ALL = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.05}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, **ALL}, ALL),
        ({"do_sample": True, "temperature": 0.7, "top_k": None, "top_p": 1.0}, {"temperature": 0.7}),
        ({"temperature": 0.7, "top_k": 20}, {}),
        ({"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"eos_token_id": 3, "max_length": 40, "num_beams": 4}, {}),
    ],
)
def test_what_counts(tiny, make_bundle, found, expected):
    bundle = make_bundle(tiny, "fused", generation_config=found)
    assert sampling_defaults(bundle) == expected
    unlisted = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, files={}))
    assert sampling_defaults(unlisted) == {}


def test_the_library_uses_them_on_request_only(tiny, make_bundle):
    found = {"do_sample": True, "temperature": 3.0}
    model = load(make_bundle(tiny, "fused", generation_config=found).path, threads=1)
    assert model.sampling_defaults == {"temperature": 3.0}
    greedy = model.generate([1, 2, 3], max_new_tokens=20)
    options: ChatOptions = {**model.sampling_defaults, "max_new_tokens": 20, "seed": 1}
    drawn = model.generate([1, 2, 3], **options)
    assert drawn.ids == model.generate([1, 2, 3], max_new_tokens=20, seed=1, temperature=3.0).ids != greedy.ids


@pytest.mark.parametrize(("name", "value"), [("temperature", "hot"), ("top_p", 2), ("repetition_penalty", 0)])
def test_a_value_out_of_range_is_told(tiny, make_bundle, name, value):
    bundle = make_bundle(tiny, "fused", generation_config={"do_sample": True, name: value})
    with pytest.raises(IntegrityError, match=rf"generation_config\.json is not valid: {name} is {value!r}"):
        sampling_defaults(bundle)
