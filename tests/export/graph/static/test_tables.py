"""Tables that the host reads: Core ML's graph gathers nothing and computes no angles, and computes the same."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import IntegrityError
from pastkey.export import export
from pastkey.export.graph.static.tables import replace_operators, tabulate_positions, take_tables
from pastkey.export.graph.write.weights_file import WeightsFile
from pastkey.runtime import load
from pastkey.runtime.engine.engine import Engine

from ....shared import divided
from ...cases import CASES
from ...small_graphs import model_of, run_model

RNG = np.random.default_rng(0)


def for_core_ml(name, made_once):
    case = CASES[name]
    how: dict[str, Any] = {"precision": "fp32", "target": "coreml", "chunk": 7, "context_length": case.context}
    return made_once(f"{name}-coreml", lambda folder: export(case.build(), folder / "b", **how)) / "b"


@pytest.mark.parametrize("name", divided(["gpt2", "gpt_j", "encoder_layers"], quick=["gpt2"], ci=["gpt_j"]))
def test_core_ml_takes_every_node_in_one_part(name, made_once):
    out = for_core_ml(name, made_once)
    bundle = open_bundle(out)
    assert bundle.manifest.parity["fp32"]["ok"]
    assert (bundle.manifest.target, bundle.manifest.graph) == ("coreml", "static")
    for path in bundle.static_graphs:
        model = onnx.load(path, load_external_data=False)
        said = re.search(r"(\d+) partitions with a total of (\d+)/(\d+) nodes", usability(path))
        assert (said[1], said[2]) == ("1", said[3])
        assert not {"Gather", "Cos", "Sin", "Reciprocal"} & {node.op_type for node in model.graph.node}
        assert not {names.INPUT_IDS, names.POSITION_IDS} & {value.name for value in model.graph.input}
    assert load(out, "cpu", threads=1).generate([1, 2, 3], max_new_tokens=5).new_tokens == 5


def usability(path):
    """The judgement of onnxruntime's checker for Core ML's newer format."""
    checker = "onnxruntime.tools.check_onnx_model_mobile_usability"
    command = [sys.executable, "-m", checker, "--log_level", "info", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).partition("Checking CoreML MLProgram")[2]


def test_a_table_that_is_too_small_is_refused(made_once, tmp_path):
    bundle = open_bundle(Path(shutil.copytree(for_core_ml("gpt2", made_once), tmp_path / "b")))
    for path in bundle.static_graphs:
        model = onnx.load(path, load_external_data=False)
        (entry,) = model.metadata_props
        places = json.loads(entry.value)
        places["token_rows_0"]["shape"][0] -= 1
        entry.value = json.dumps(places)
        onnx.save(model, path)
    with pytest.raises(IntegrityError, match=r"the table of the input 'token_rows_0' is .* is needed: export it again"):
        Engine(bundle, providers="cpu", threads=1)


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_positions_make_is_a_table_of_the_context(tokens, tmp_path):
    angles = RNG.normal(size=(4,)).astype(np.float32)
    text = (
        f"g (int64[1,{tokens}] position_ids, float[4,1] angles, float[4,{tokens}] x) => (float[4,{tokens}] logits) {{ "
        "p = Cast <to = 1> (position_ids) a = Mul(angles, p) c = Cos(a) logits = Mul(c, x) }"
    )
    model = model_of(text, angles=angles[:, None])
    x = RNG.normal(size=(4, tokens)).astype(np.float32)
    file = WeightsFile(tmp_path / "tables")
    positions = np.arange(2, 2 + tokens)[None]
    (expected,) = run_model(model, x=x, position_ids=positions)
    tabulate_positions(model, tokens, 7, file)
    assert [node.op_type for node in model.graph] == ["Gather", "Reshape", "Transpose", "Mul"]
    np.testing.assert_allclose(run_model(model, x=x, position_ids=positions)[0], expected, atol=1e-6)
    take_tables(model, tokens, file)
    assert [node.op_type for node in model.graph] == ["Reshape", "Transpose", "Mul"]
    ((name, place),) = json.loads(model.metadata_props[names.TABLES]).items()
    assert (place["of"], place["axis"], place["shape"]) == (names.POSITION_IDS, 1, [7, 1, 4])
    table = np.fromfile(tmp_path / "tables", "<f4").reshape(7, 4)
    np.testing.assert_allclose(table, np.cos(np.arange(7)[:, None] * angles), atol=1e-6)
    (found,) = run_model(model, x=x, **{name: table[None, 2 : 2 + tokens]})
    np.testing.assert_allclose(found, np.cos(angles[:, None] * positions) * x, atol=1e-6)


@pytest.mark.parametrize("index", [0, 2, -1])
def test_what_core_ml_lacks_is_written_in_other_operators(index):
    model = model_of(
        "g (float[3,2] x, int64 index) => (float[2] logits) { y = Reciprocal(x) z = Neg(y) logits = Gather(z, index) }",
        index=np.array(index),
    )
    model.graph.outputs[0].shape = None
    x = np.array([[1, 2], [-4, 3], [5, 6]], np.float32)
    (expected,) = run_model(model, x=x)
    replace_operators(model)
    assert [node.op_type for node in model.graph] == ["Div", "Mul", "Slice", "Squeeze"]
    np.testing.assert_array_equal(run_model(model, x=x)[0], expected)
    np.testing.assert_array_equal(expected, -1 / x[index])
