"""An option of a sampler stands in several places: where it is declared, typed, typed in a command, and explained."""

from __future__ import annotations

import dataclasses
import re

from pastkey.runtime import LanguageModel, cli
from pastkey.runtime.settings import CHAT_OPTIONS, GENERATE_OPTIONS, SamplingConfig

FIELDS = {field.name for field in dataclasses.fields(SamplingConfig)}


def test_every_field_of_a_sampler_is_an_option_and_a_flag() -> None:
    assert FIELDS
    assert FIELDS <= CHAT_OPTIONS
    assert cli._SAMPLING.keys() == FIELDS


def test_generate_explains_every_option() -> None:
    explained = re.findall(r"^ +- `(\w+)` \(", LanguageModel.generate.__doc__ or "", re.MULTILINE)
    assert sorted(explained) == sorted(GENERATE_OPTIONS)
