"""A model to talk with."""

from __future__ import annotations

from pathlib import Path

import pytest

from pastkey.runtime import LanguageModel, load


@pytest.fixture(scope="session")
def model(talking: Path) -> LanguageModel:
    return load(talking, threads=1)
