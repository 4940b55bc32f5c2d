"""An input is what its array held when it was given, by whichever way it came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pastkey.runtime.engine.binding import Binding
from pastkey.runtime.providers.inference import OrtSession

from ...onnx_text import encode_model

GRAPH = '<ir_version: 10, opset_import: ["": 21]> g (int64[N, M] x) => (int64[N, M] y) { y = Identity(x) }'


@pytest.mark.parametrize("device", ["CPUExecutionProvider", "DeviceExecutionProvider"])
def test_each_run_has_what_was_given_to_it(device, monkeypatch):
    session = OrtSession(encode_model(GRAPH, {})[0], providers=["CPUExecutionProvider"])
    monkeypatch.setattr(session, "get_providers", lambda: [device])
    binding = Binding(session)

    def told() -> Any:
        binding.bind_output("y")
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy().tolist()

    for rows in ([[1, 2]], [[3, 4]], [[5]], [[6], [7]], [[8, 9]]):
        array = np.array(rows, np.int64)
        binding.feed("x", array)
        array[:] = 0
        assert told() == rows
    binding.feed("x", np.array([[1, 2], [3, 4]], np.int64).T)  # its layout does not count
    assert told() == [[1, 3], [2, 4]]
    binding.feed("x", np.array([[5, 6], [7, 8]], np.int64))
    assert told() == [[5, 6], [7, 8]]
