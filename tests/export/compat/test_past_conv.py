"""What `check` says of the rows that short convolutions keep beside keys and values."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import pastkey
from pastkey.contract import names
from pastkey.export import export

from ..graft.own.registry import DECODERS
from .editing import edit, edit_graph, graph_input, record, verdicts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def convolution(tmp_path_factory):
    own, out = DECODERS["short_conv"], tmp_path_factory.mktemp("convolution") / "bundle"
    export(own.make(), out, precision="fp32", context_length=own.context)
    return out


def test_a_short_convolution_is_for_pastkey_and_plain_onnxruntime(convolution):
    found = verdicts(convolution)
    assert [program for program, verdict in found.items() if verdict.loads] == ["pastkey", "onnxruntime"]
    assert pastkey.load(convolution).generate([1, 2, 3], max_new_tokens=4).ids
    for verdict in found.values():
        assert verdict.loads or any("the input 'past_conv.0'" in text for text in verdict.reasons), verdict


def rows_of(size: int) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        graph_input(graph, names.past_conv(0)).type.tensor_type.shape.dim[2].dim_value = size

    return change


def no_first_rows(graph: onnx.GraphProto) -> None:
    graph.output.remove(next(value for value in graph.output if value.name == names.present_conv(0)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rows_of(31), "'past_rows', 31) in the graph; pastkey.json says ('batch_size', 'past_rows', 32)"),
        (no_first_rows, "has no output 'present_conv.0'"),
        (lambda graph: graph.input.remove(graph_input(graph, names.past_conv(0))), "past_conv.0 is not in the graph"),
    ],
)
def test_rows_other_than_the_manifests_stop_pastkey(change, words, convolution, tmp_path):
    folder = Path(shutil.copytree(convolution, tmp_path / "bundle"))
    edit_graph(folder, change, precision="fp32")
    record(folder)
    assert any(words in text for text in verdicts(folder)["pastkey"].reasons)


def test_rows_that_the_manifest_does_not_tell_of_are_not_fed(convolution, tmp_path):
    folder = Path(shutil.copytree(convolution, tmp_path / "bundle"))
    edit(folder, names.MANIFEST, lambda c: c.pop("states"))
    assert "the input 'past_conv.0', which is not fed" in verdicts(folder)["pastkey"].reasons[0]
