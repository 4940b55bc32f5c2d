"""An option of a sampler stands in several places: where it is declared, typed, typed in a command, and explained."""

from __future__ import annotations

import dataclasses
import re

from pastkey.runtime.commands.flags import SAMPLING
from pastkey.runtime.settings import CHAT_OPTIONS, GENERATE_OPTIONS, GenerateOptions, SamplingConfig, SamplingOptions

# What a command line has no flag for, and why.
UNTYPED = {
    "dry_sequence_breakers": "texts with newlines, or lists of ids",
    "logit_bias": "a mapping",
    "bad_words_ids": "lists of ids: --bad-word takes texts",
    "forced_decoder_ids": "pairs",
    "forced_eos_token_id": "a chat and a text end by themselves or at once",
    "logits_processor": "a function",
}

FIELDS = {field.name for field in dataclasses.fields(SamplingConfig)}


def test_every_field_of_a_sampler_is_an_option_and_a_flag() -> None:
    assert FIELDS
    assert FIELDS <= CHAT_OPTIONS
    assert SAMPLING.keys() == FIELDS - UNTYPED.keys()
    assert UNTYPED.keys() <= FIELDS
    assert SamplingOptions.__optional_keys__ == FIELDS


def test_every_option_is_explained() -> None:
    explained = re.findall(r"^ *- `(\w+)` \(", GenerateOptions.__doc__ or "", re.MULTILINE)
    assert sorted(explained) == sorted(GENERATE_OPTIONS)
