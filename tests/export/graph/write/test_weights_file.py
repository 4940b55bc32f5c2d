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
from pastkey.export.graph.write.save import count_operators, write_graphs
from pastkey.export.graph.write.weights_file import WeightsFile, remove_with_weights, save_with_weights
from pastkey.export.quantize.adapters import take_adaptable
from pastkey.export.quantize.rounding.rewrite import quantize
from pastkey.files.external_data import ExternalData, external_data
from pastkey.precisions import PRECISIONS
from pastkey.runtime import Engine

from ...cases import CASES
from ...plain_loop import onnxruntime
from ...small_graphs import model_of


def test_equal_content_is_written_once_and_begins_on_a_cache_line(tmp_path):
    file = WeightsFile(tmp_path / "data")
    assert [file.place(content) for content in (b"abc", b"de", b"abc")] == [("data", 0), ("data", 64), ("data", 0)]
    assert (tmp_path / "data").read_bytes() == b"abc" + bytes(61) + b"de"


def test_large_content_begins_on_a_page(tmp_path):
    file = WeightsFile.of(tmp_path / "model.onnx")
    assert [file.place(content)[1] for content in (b"abc", bytes(1 << 20))] == [0, 4096]
    assert (tmp_path / "model.onnx_data").stat().st_size == file.size == 4096 + (1 << 20)


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
    file = WeightsFile.of(tmp_path / "model.onnx", 2 * 10**6)
    with pytest.raises(InputError, match=r"a weight takes 3 MB, and .* smaller than 2 MB: .* larger --shard-size$"):
        file.place(bytes(3 * 10**6))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(names, "MAX_SHARDS", 2)
    file.place(b"a" * 10**6)
    file.place(b"b" * 10**6)
    with pytest.raises(
        InputError, match=r"files smaller than 2 MB would be more than the 2 that transformers\.js reads"
    ):
        file.place(b"c" * 10**6)


def test_a_file_above_4_gib_is_written_and_read_at_its_offsets(tmp_path):
    weight = np.random.default_rng(0).normal(size=(20, 20)).astype(np.float32)
    model = model_of("g (float[1,20] x, float[20,20] w) => (float[1,20] y) { y = MatMul(x, w) }", w=weight)
    file, end = WeightsFile.of(tmp_path / "model.onnx"), 5 << 30
    with file.path.open("wb") as sparse:
        sparse.truncate(end)
    if file.path.stat().st_blocks * 512 > end // 2:
        pytest.skip("this file system has no sparse files")
    file._end = end
    file.take_weights(model)
    ir.save(model, tmp_path / "model.onnx")
    assert [*external_data(tmp_path / "model.onnx")] == [ExternalData("model.onnx_data", end, weight.nbytes)]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = np.ones((1, 20), np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight, rtol=1e-5)


def test_a_graph_that_is_saved_with_its_weights_stays_as_it_is_and_goes_with_them(tmp_path):
    weight = np.ones((20, 20), np.float32)
    model = model_of("g (float[1,20] x, float[20,20] w) => (float[1,20] y) { y = MatMul(x, w) }", w=weight)
    path = tmp_path / "probe.onnx"
    save_with_weights(model, path)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["probe.onnx", "probe.onnx_data"]
    assert not isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    remove_with_weights(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size")
def test_a_weight_that_the_disk_has_no_room_for_is_an_error_with_its_number(tmp_path):
    import resource

    weight = np.ones((200, 200), np.float32)
    model = model_of("g (float[1,200] x, float[200,200] w) => (float[1,200] y) { y = MatMul(x, w) }", w=weight)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (weight.nbytes // 2, before[1]))
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            save_with_weights(model, tmp_path / "probe.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.ENOSPC


def test_a_small_weight_of_another_file_is_copied_into_the_graph(tmp_path):
    model = model_of(
        "g (float[1,3] x, float[3] b) => (float[1,3] y) { y = Add(x, b) }", b=np.arange(3, dtype=np.float32)
    )
    (tmp_path / "source").mkdir()
    ir.save(model, tmp_path / "source" / "model.onnx", external_data="data", size_threshold_bytes=0)
    given = ir.load(tmp_path / "source" / "model.onnx")
    assert isinstance(given.graph.initializers["b"].const_value, ir.ExternalTensor)
    WeightsFile(tmp_path / "data").take_weights(given)
    ir.save(given, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones((1, 3), np.float32)})[0].tolist() == [[1, 2, 3]]


def test_two_graphs_share_their_weights(tmp_path):
    weight, small = np.random.default_rng(0).normal(size=(20, 20)).astype(np.float32), np.ones(20, np.float32)
    x = np.ones((1, 20), np.float32)
    file = WeightsFile(tmp_path / "data")
    for number in range(2):
        text = "g (float[1,20] x, float[20,20] w, float[20] b) => (float[1,20] y) { z = MatMul(x, w) y = Add(z, b) }"
        model = model_of(text, w=weight.copy(), b=small)
        file.take_weights(model)
        ir.save(model, tmp_path / f"{number}.onnx")
        session = onnxruntime.InferenceSession(tmp_path / f"{number}.onnx", providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight + 1, rtol=1e-5)
    assert (tmp_path / "data").stat().st_size == weight.nbytes


# --- two graphs over one weights file, and nothing in them that only passes need --------------------------------------
TEXT = (
    "g (float[1,T,64] x, float[64,64] w, float[64,64] v) => (float[1,T,64] logits)"
    " { h = MatMul(x, w) logits = MatMul(h, v) }"
)


def written(folder, w, v):
    """The bytes that are told, and the two graphs without their weights."""
    told = write_graphs(model_of(TEXT, w=w, v=v), folder, "fp32")
    all_logits, last_logits = (
        onnx.load(folder / name, load_external_data=False)
        for name in (PRECISIONS["fp32"].graph, names.LAST_LOGITS_GRAPH)
    )
    return told, all_logits, last_logits


def places(model):
    return {w.name: {e.key: e.value for e in w.external_data} for w in model.graph.initializer if w.external_data}


def test_both_graphs_read_one_file_which_has_the_weights_told(tmp_path):
    rng = np.random.default_rng(0)
    w, v = (rng.normal(size=(64, 64)).astype(np.float32) for _ in range(2))
    told, all_logits, last_logits = written(tmp_path, w, v)
    assert places(all_logits) == places(last_logits)
    assert set(places(all_logits)) == {"w", "v"}
    (file,) = tmp_path.rglob("*.onnx_data")
    assert file.stat().st_size == told == w.nbytes + v.nbytes
    stored = onnx.load(tmp_path / PRECISIONS["fp32"].graph)
    for tensor in stored.graph.initializer:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), {"w": w, "v": v}[tensor.name])


def test_the_mark_of_an_int8_head_is_in_no_file(tmp_path):
    w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    model = model_of(TEXT, w=w, v=w + 1)
    quantize(model)
    take_adaptable(model)
    assert any(node.metadata_props for node in model.graph)
    write_graphs(model, tmp_path, "int8")
    graphs = list(tmp_path.rglob("*.onnx"))
    assert len(graphs) == 2
    for graph in graphs:
        assert not any(node.metadata_props for node in ir.load(graph).graph)


def test_the_manifest_counts_the_operators_of_the_all_logits_graph(exported):
    made = exported("llama", "int8")
    assert dict(made.bundle.manifest.operators) == count_operators(ir.load(made.bundle.all_logits_graph))


# --- pastkey's own graph is handed the embedding's rows where the table is large; nothing that it computes ------------
IDS = np.random.default_rng(0).integers(0, 33, 12)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_rows_are_read_from_the_file(name, tmp_path, monkeypatch):
    """llama's table is its head too; gpt2 gathers positions by another input, which stays in the graph."""
    case = CASES[name]
    found = []
    for folder, large in ((tmp_path / "inside", 1 << 20), (tmp_path / "outside", 1)):
        monkeypatch.setattr(embedding_rows, "_LARGE", large)
        export(case.build(), folder, context_length=case.context)
        bundle = open_bundle(folder)
        inputs = {value.name for value in onnx.load(bundle.last_logits_graph, load_external_data=False).graph.input}
        assert (names.EMBEDDING_ROWS in inputs) == (large == 1)
        common = {value.name for value in onnx.load(bundle.all_logits_graph, load_external_data=False).graph.input}
        assert names.EMBEDDING_ROWS not in common
        session = Engine(bundle, threads=1)
        logits = [session.prefill(IDS[:8]), *(session.decode(int(token)) for token in IDS[8:])]
        session.reset()
        logits.append(session.forward(IDS.reshape(2, 6))[1, 0])
        found.append(np.stack(logits))
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.slow
def test_float32_and_small_tables_stay_in_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_rows, "_LARGE", 1)
    case = CASES["llama"]
    export(case.build(), tmp_path / "fp32", context_length=case.context, precision="fp32")
    graph = onnx.load(open_bundle(tmp_path / "fp32").last_logits_graph, load_external_data=False).graph
    assert names.EMBEDDING_ROWS not in {value.name for value in graph.input}
