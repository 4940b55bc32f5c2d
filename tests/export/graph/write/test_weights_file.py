"""A weights file of several graphs has equal content once."""

from __future__ import annotations

import errno
import sys

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.contract import names
from pastkey.errors import InputError
from pastkey.export.graph.write.weights_file import WeightsFile, remove_with_weights, save_with_weights
from pastkey.files.external_data import ExternalData, external_data

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
