"""A weights file of several graphs has equal content once."""

import errno
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError
from pastkey.export import export
from pastkey.export.graph.write import embedding_rows
from pastkey.export.graph.write.save import write_graphs
from pastkey.export.graph.write.weights_file import WeightsFile, remove_with_weights, save_with_weights
from pastkey.export.quantize.adapters import take_adaptable
from pastkey.export.quantize.rounding.rewrite import quantize
from pastkey.files.external_data import ExternalData, external_data
from pastkey.precisions import PRECISIONS
from pastkey.runtime import Engine

from ...cases import CASES
from ...plain_loop import open_graph
from ...small_graphs import model_of

RNG = np.random.default_rng(0)


def matrix(size):
    return RNG.normal(size=(size, size)).astype(np.float32)


def product(weight):
    """y = x w."""
    size = len(weight)
    text = f"g (float[1,{size}] x, float[{size},{size}] w) => (float[1,{size}] y) {{ y = MatMul(x, w) }}"
    return model_of(text, w=weight)


def test_equal_content_is_written_once_and_begins_on_a_cache_line_or_a_page(tmp_path):
    file = WeightsFile.of(tmp_path / "model.onnx")
    contents = (b"abc", b"de", b"abc", bytes(1 << 20))
    assert [file.place(content) for content in contents] == [("model.onnx_data", at) for at in (0, 64, 0, 4096)]
    data = (tmp_path / "model.onnx_data").read_bytes()
    assert data[:66] == b"abc" + bytes(61) + b"de"
    assert len(data) == file.size == 4096 + (1 << 20)


def test_shards_stay_below_their_size_and_share_equal_content(tmp_path):
    file = WeightsFile.of(tmp_path / "model.onnx", 100)
    contents = (b"a" * 60, b"b" * 35, b"c" * 36, b"d" * 99, b"a" * 60)
    shards = [names.weights_file("model.onnx", shard) for shard in range(4)]
    # 64 + 36 would be 100 bytes: not below.
    placed = [(shards[0], 0), (shards[0], 64), (shards[1], 0), (shards[2], 0), (shards[0], 0)]
    assert [file.place(content) for content in contents] == placed
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes == dict(zip(shards, (99, 36, 99), strict=False))
    assert file.size == sum(sizes.values())


def test_what_no_shard_takes_and_more_shards_than_are_read_are_refused(tmp_path, monkeypatch):
    file = WeightsFile.of(tmp_path / "model.onnx", 200)
    with pytest.raises(InputError, match="--shard-size"):
        file.place(bytes(300))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(names, "MAX_SHARDS", 2)
    file.place(b"a" * 100)
    file.place(b"b" * 100)
    with pytest.raises(InputError, match="more than the 2 that"):
        file.place(b"c" * 100)


def test_a_file_above_4_gib_is_written_and_read_at_its_offsets(tmp_path):
    weight, end = matrix(20), 5 << 30
    model, file = product(weight), WeightsFile.of(tmp_path / "model.onnx")
    with file.path.open("wb") as sparse:
        sparse.truncate(end)
    if file.path.stat().st_blocks * 512 > end // 2:
        pytest.skip("this file system has no sparse files")
    file._end = end
    file.take_weights(model)
    ir.save(model, tmp_path / "model.onnx")
    assert [*external_data(tmp_path / "model.onnx")] == [ExternalData("model.onnx_data", end, weight.nbytes)]
    (found,) = open_graph(tmp_path / "model.onnx").run(None, {"x": np.ones((1, 20), np.float32)})
    np.testing.assert_allclose(found[0], weight.sum(0), rtol=1e-5)


def test_a_graph_that_is_saved_with_its_weights_stays_as_it_is_and_goes_with_them(tmp_path):
    model, path = product(matrix(20)), tmp_path / "probe.onnx"
    save_with_weights(model, path)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["probe.onnx", "probe.onnx_data"]
    assert not isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    remove_with_weights(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size")
def test_a_weight_that_the_disk_has_no_room_for_is_an_error_with_its_number(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_with_weights(product(matrix(200)), tmp_path / "probe.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG


def test_a_small_weight_of_another_file_is_copied_into_the_graph(tmp_path):
    model = product(matrix(3))
    (tmp_path / "source").mkdir()
    ir.save(model, tmp_path / "source" / "model.onnx", external_data="data", size_threshold_bytes=0)
    given = ir.load(tmp_path / "source" / "model.onnx")
    assert isinstance(given.graph.initializers["w"].const_value, ir.ExternalTensor)
    WeightsFile(tmp_path / "data").take_weights(given)
    ir.save(given, tmp_path / "model.onnx")
    assert [*external_data(tmp_path / "model.onnx")] == []
    open_graph(tmp_path / "model.onnx")


# --- two graphs over one weights file, and nothing in them that only passes need --------------------------------------
TEXT = (
    "g (float[1,T,64] x, float[64,64] w, float[64,64] v) => (float[1,T,64] logits)"
    " { h = MatMul(x, w) logits = MatMul(h, v) }"
)


def places(file):
    graph = onnx.load(file, load_external_data=False).graph
    return {w.name: {e.key: e.value for e in w.external_data} for w in graph.initializer if w.external_data}


def test_both_graphs_read_one_file_which_has_the_weights_told(tmp_path):
    weights = {"w": matrix(64), "v": matrix(64)}
    told = write_graphs(model_of(TEXT, **weights), tmp_path, "fp32")
    all_logits = tmp_path / PRECISIONS["fp32"].graph
    assert places(all_logits) == places(tmp_path / names.LAST_LOGITS_GRAPH)
    assert set(places(all_logits)) == {*weights}
    (file,) = tmp_path.rglob("*.onnx_data")
    assert file.stat().st_size == told == 2 * 64 * 64 * 4
    for tensor in onnx.load(all_logits).graph.initializer:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), weights[tensor.name])


def test_the_mark_of_an_int8_head_is_in_no_file(tmp_path):
    model = model_of(TEXT, w=matrix(64), v=matrix(64))
    quantize(model)
    take_adaptable(model)
    assert any(node.metadata_props for node in model.graph)
    write_graphs(model, tmp_path, "int8")
    graphs = list(tmp_path.rglob("*.onnx"))
    assert len(graphs) == 2
    assert not any(node.metadata_props for graph in graphs for node in ir.load(graph).graph)


# --- pastkey's own graph is handed the embedding's rows where the table is large; nothing that it computes ------------
IDS = RNG.integers(0, 33, 12)


def inputs(file):
    return {value.name for value in onnx.load(file, load_external_data=False).graph.input}


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_rows_are_read_from_the_file(name, tmp_path, monkeypatch):
    """llama's table is also its head; gpt2 gathers positions by another input, which stays in the graph."""
    case = CASES[name]
    found = []
    for large in (1 << 20, 1):
        monkeypatch.setattr(embedding_rows, "_LARGE", large)
        export(case.build(), tmp_path / str(large), context_length=case.context)
        bundle = open_bundle(tmp_path / str(large))
        assert (names.EMBEDDING_ROWS in inputs(bundle.last_logits_graph)) == (large == 1)
        assert names.EMBEDDING_ROWS not in inputs(bundle.all_logits_graph)
        session = Engine(bundle, threads=1)
        logits = [session.prefill(IDS[:8]), *(session.decode(int(token)) for token in IDS[8:])]
        session.reset()
        logits.append(session.forward(IDS.reshape(2, 6))[1, 0])
        found.append(np.stack(logits))
    np.testing.assert_array_equal(found[0], found[1])
