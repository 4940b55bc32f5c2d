"""The tests of packed weights keep every matrix in its file."""

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.export.source import stored_tensors


@pytest.fixture(autouse=True)
def every_matrix_is_large(monkeypatch):
    monkeypatch.setattr(stored_tensors, "LARGE", 1000)
