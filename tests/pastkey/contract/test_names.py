from __future__ import annotations

from pastkey.contract import names


def test_the_tensors_of_a_layer_differ_by_what_they_hold():
    made = {name(layer) for name in (names.past_key, names.past_value, names.present_key, names.present_value)
            for layer in (0, 1, 11)}  # fmt: skip
    assert len(made) == 12
    assert names.past_key(11) == "past_key_values.11.key"
    assert names.present_value(0) == "present.0.value"


def test_weights_files_are_named_as_transformers_js_counts_them():
    found = [names.weights_file("model.onnx", shard) for shard in range(3)]
    assert found == ["model.onnx_data", "model.onnx_data_1", "model.onnx_data_2"]
    assert all(names.is_weights_file(name) and names.is_weights_file(name, "model.onnx") for name in found)
    assert not names.is_weights_file("model_q4.onnx_data", "model.onnx")
    assert not any(names.is_weights_file(name) for name in ("model.onnx", "a_datas", "_data", "model.onnx_data_x"))
