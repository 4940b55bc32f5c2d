"""What the tests of training share: a cache folder of their own, and a text."""

from __future__ import annotations

import pytest

from .helpers import write_corpus


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The user's cache folder, empty."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


@pytest.fixture
def text(tmp_path):
    return write_corpus(tmp_path / "text.txt")
