"""Values captured segment by segment are those of the whole graph; and which calibration texts can be used."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer, processors

from pastkey.contract import names
from pastkey.errors import InputError, MissingFileError
from pastkey.export.quantize.calibrate.activations import probing
from pastkey.export.quantize.calibrate.calibration import read_calibration
from pastkey.export.quantize.calibrate.segments import captured
from pastkey.export.quantize.rounding.matrices import matmul_weight

from ....shared import divided

WINDOWS = [np.random.default_rng(seed).integers(0, 37, size) for seed, size in enumerate((30, 30, 11))]


def read_by_matmuls(model: ir.Model) -> list[str]:
    """The activations that weights are multiplied with, made by nodes."""
    read = [node.inputs[0] for node in model.graph if matmul_weight(node) is not None]
    return list(dict.fromkeys(str(value.name) for value in read if value is not None and value.producer() is not None))


@pytest.mark.parametrize(
    "name", divided(["llama", "gpt2", "one_block_twice", "nano_gpt"], quick=["llama"], ci=["one_block_twice"])
)
def test_every_segmentation_gives_the_values_of_one_run(name, exported):
    graph = exported(name).bundle.all_logits_graph
    files = sorted(graph.parent.iterdir())
    wanted = [*read_by_matmuls(ir.load(graph)), names.LOGITS]
    with probing(ir.load(graph), graph.parent, wanted) as probe:
        whole = [probe(ids) for ids in WINDOWS]
    runs: list[list[dict[str, np.ndarray]]] = []
    for kept_bytes in (1, 25, 10**9):
        captures = [dict[str, np.ndarray]() for _ in WINDOWS]
        order, sizes = list[str](), dict.fromkeys(wanted, 10)
        for segment in captured(ir.load(graph), graph.parent, WINDOWS, sizes, kept_bytes=kept_bytes):
            order += segment.wanted
            assert len(segment.wanted) <= max(kept_bytes // 10, 1)
            for found, values in zip(captures, segment, strict=True):
                assert set(values) == set(segment.wanted)
                found.update(values)
        assert sorted(order) == sorted(wanted)
        runs.append(captures)
    assert sorted(graph.parent.iterdir()) == files
    for *some, all_at_once, packed in zip(*runs, whole, strict=True):
        for value in wanted:
            for found in some:
                np.testing.assert_array_equal(found[value], all_at_once[value])
            # onnxruntime adds the terms of a packed weight's products in another order.
            largest = np.abs(packed[value]).max()
            np.testing.assert_allclose(all_at_once[value], packed[value], rtol=0, atol=1e-5 * largest)


# --- values inside a graph are those that the graph computes, and looking leaves no trace -----------------------------
def test_a_probe_sees_values_inside_and_leaves_the_graph_and_the_folder_as_they_were(exported, computed):
    graph = exported("llama").bundle.all_logits_graph
    model = ir.load(graph)
    before, files = ir.to_proto(model).SerializeToString(), sorted(graph.parent.iterdir())
    head = next(node for node in model.graph if node.outputs[0].name == names.LOGITS)
    inside = str(head.inputs[0].name)
    ids = np.arange(9)
    with probing(model, graph.parent, [names.LOGITS, inside]) as probe:
        found = probe(ids)
    assert found[inside].shape == (9, 48)
    np.testing.assert_allclose(found[names.LOGITS], computed(ir.load(graph), ids), rtol=1e-5, atol=1e-6)
    embedding = exported("llama").weights()["model.embed_tokens.weight"]
    np.testing.assert_allclose(found[inside] @ embedding.T, found[names.LOGITS], rtol=1e-4, atol=1e-5)
    assert ir.to_proto(model).SerializeToString() == before
    assert sorted(graph.parent.iterdir()) == files


def test_weights_that_were_changed_in_memory_count(exported, computed):
    graph = exported("llama").bundle.all_logits_graph
    model = ir.load(graph)
    value = model.graph.initializers["model.layers.0.mlp.up_proj.weight"]
    value.const_value = ir.Tensor(value.const_value.numpy() * 2, name=value.name)
    ids = np.arange(9)
    with probing(model, graph.parent, [names.LOGITS]) as probe:
        found = probe(ids)[names.LOGITS]
    assert not list(graph.parent.glob("probe*"))
    np.testing.assert_allclose(found, computed(model, ids), rtol=1e-5, atol=1e-6)
    assert np.abs(found - computed(ir.load(graph), ids)).max() > 1e-3


# --- the user's calibration text: what can be used, and what is refused before any work -------------------------------
OWN = "leave out --calibration for text of the model's own"


@pytest.fixture
def tokenizer(word_tokenizer):
    return word_tokenizer.to_str().encode()


def words(count: int) -> str:
    return " ".join(f"w{i % 7}" for i in range(count))


def test_the_fewest_and_most_equal_tokens_that_are_taken(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(words(64))
    assert read_calibration(file, tokenizer, 8) == [i % 7 for i in range(64)]
    file.write_text("w1 " * 10 + "w5 " * 90)
    assert read_calibration(file, tokenizer, 8) == [1] * 10 + [5] * 90


REFUSED = {
    "empty": (b"", "is empty: a text of at least 64 tokens"),
    "one token": (b"w1", f"is too short to calibrate on, 1 token: .*; {OWN}"),
    "63 tokens": (words(63).encode(), "is too short to calibrate on, 63 tokens: at least 64 are needed"),
    "binary": (bytes(range(256)), "is not UTF-8 text: byte 128 is 0x80"),
    "all the same": (b"w5 " * 100, f"is one token 100 times in 100 for this tokenizer, .*, or {OWN}"),
    "nearly the same": (b"w1 " * 9 + b"w5 " * 91, "is one token 91 times in 100"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_text_that_cannot_be_used_is_one_sentence(name, tokenizer, tmp_path):
    content, sentence = REFUSED[name]
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"^\S*text\.txt {sentence}"):
        read_calibration(file, tokenizer, 8)


def test_tokens_that_the_tokenizer_adds_do_not_make_a_text(word_tokenizer, tmp_path):
    adding = Tokenizer.from_str(word_tokenizer.to_str())
    adding.post_processor = processors.TemplateProcessing("<end> $A <end>", special_tokens=[("<end>", 60)])
    file = tmp_path / "text.txt"
    file.write_text("w5 " * 100)
    with pytest.raises(InputError, match="is one token 100 times in 102"):
        read_calibration(file, adding.to_str().encode(), 8)


def test_no_file_a_folder_and_no_tokenizer(tokenizer, tmp_path):
    with pytest.raises(MissingFileError, match=r"no such file: .*none\.txt"):
        read_calibration(tmp_path / "none.txt", tokenizer, 8)
    with pytest.raises(InputError, match="is a folder; a file was expected"):
        read_calibration(tmp_path, tokenizer, 8)
    with pytest.raises(InputError, match="no tokenizer to read a calibration text with: give --tokenizer FILE"):
        read_calibration(tmp_path / "none.txt", None, 8)
