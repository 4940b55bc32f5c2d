"""Shared by the tests of training: a separate cache folder, a text, and one finished run."""

from __future__ import annotations

import shutil

import pytest

from pastkey.train import loop

from .helpers import tiny, write_corpus


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The user's cache folder, empty."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


@pytest.fixture
def text(tmp_path):
    return write_corpus(tmp_path / "text.txt")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The run of `tiny()`, finished. Its text is next to it."""
    folder = tmp_path_factory.mktemp("whole")
    loop.train(tiny(), folder / "c", data=[write_corpus(folder / "text.txt")])
    return folder / "c"


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that run."""
    return shutil.copytree(whole, tmp_path / "copy")
