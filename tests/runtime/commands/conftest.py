"""A bundle to talk with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer

from pastkey.contract.bundle import Bundle
from pastkey.runtime import LanguageModel, load

from .conversation import TEMPLATE

if TYPE_CHECKING:
    from ..conftest import Tiny


@pytest.fixture(scope="session")
def talking(tiny: Tiny, letters: Tokenizer, make_bundle: Callable[..., Bundle]) -> Path:
    """A bundle with a chat template."""
    return make_bundle(tiny, "fused", tokenizer=letters, tokenizer_config={"chat_template": TEMPLATE}).path


@pytest.fixture(scope="session")
def model(talking: Path) -> LanguageModel:
    return load(talking, threads=1)
