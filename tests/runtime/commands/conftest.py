"""A model to talk with."""

from __future__ import annotations

import pytest

from pastkey.runtime import load


@pytest.fixture(scope="session")
def model(talking):
    return load(talking, threads=1)
