"""What onnxruntime says of a run is a sentence."""

from __future__ import annotations

import numpy as np
import pytest

from pastkey.errors import IntegrityError
from pastkey.runtime import Engine
from pastkey.runtime.providers.inference import OrtSession, RunFailedError
from pastkey.runtime.providers.ort import RunError


def test_a_run_that_fails_names_the_graph(standard_bundle):
    graph = standard_bundle.all_logits_graph
    session = OrtSession(str(graph), providers=["CPUExecutionProvider"])
    with pytest.raises(RunFailedError, match=r"cannot run .*model\.onnx") as caught:
        session.run(None, {value.name: np.zeros(len(value.shape) * [1], np.int8) for value in session.get_inputs()})
    assert isinstance(caught.value, IntegrityError)
    assert isinstance(caught.value, RunError)  # who asks for onnxruntime's own errors still gets them
    binding = session.io_binding()
    with pytest.raises(RunFailedError, match="cannot run"):
        session.run_with_iobinding(binding)


def test_an_engine_runs_by_it(standard_bundle):
    assert isinstance(Engine(standard_bundle).onnx, OrtSession)
