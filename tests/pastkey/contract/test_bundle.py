"""The allowed fields of a manifest, and the names in a bundle."""

from __future__ import annotations

import json

import pytest

from pastkey.contract import names
from pastkey.contract.bundle import CacheShift, KeyRotation, KVGeometry, Manifest, parse_manifest, read_bundle
from pastkey.errors import IntegrityError
from pastkey.files.durable import write_json
from pastkey.providers import TARGETS

from ...wrong_values import without, wrong_fields

MANIFEST = Manifest(
    "0", "m", "fp32", "cpu", "fused", "", 8, 8, (KVGeometry(1, 8, 8),), 20, 10, "1.26.0", CacheShift()
).to_json()
TURN = {"layers": [0], "first": 0, "interleaved": False, "angles": [1.0, 0.1, 0.01, 0.001]}
STATIC = {"chunk": 4, "masked": -100.0, "windows": [0]}


def test_how_keys_turn_is_read_as_it_was_written(tmp_path):
    content = MANIFEST | {"windows": [5], "shift": {"refused": "", "rotations": [TURN]}}
    write_json(tmp_path / names.MANIFEST, content)
    manifest = read_bundle(tmp_path).manifest
    assert manifest.shift == CacheShift(rotations=(KeyRotation((0,), 0, False, (1.0, 0.1, 0.01, 0.001)),))
    assert json.loads(json.dumps(manifest.to_json())) == json.loads(json.dumps(content))


@pytest.mark.parametrize(("version", "told"), [(7, "reads 8: make the bundle again"), (9, "reads 8: upgrade pastkey")])
def test_only_the_newest_format_is_read(version, told, tmp_path):
    write_json(tmp_path / names.MANIFEST, MANIFEST | {"format_version": version})
    with pytest.raises(IntegrityError, match=rf"bundle format version {version}; this pastkey {told}"):
        read_bundle(tmp_path)


def test_a_field_that_is_missing_or_of_another_type_or_out_of_range_is_told_with_the_file(tmp_path):
    cases = [*wrong_fields(Manifest)]
    assert len(cases) > 300
    for name, value in cases:
        with pytest.raises(IntegrityError, match=r"/pastkey\.json "):
            parse_manifest(tmp_path, without(MANIFEST, name, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target", "CPU"),
        ("target", "tensorrt"),  # a provider, and no target
        ("target", "z" * 1_000_000),
        ("precision", "fp8"),
        ("graph", "other"),
        ("graph", "static"),  # without its sizes
        ("static", STATIC),
        ("compiled", {"provider": "qnn", "options": {}, "onnxruntime": "1.32.0"}),
        ("rows", [{"rows": 1, "size": 1}]),
        ("states", [{"kind": "conv_state", "shape": [1, 2, 3]}]),
        ("states", [{"kind": "key", "shape": [1, 2, 3]}]),
        ("shift", {"rotations": [{**TURN, "layers": [1]}]}),
        ("shift", {"rotations": [{**TURN, "first": 1}]}),
        ("min_onnxruntime", "1.23; x"),
    ],
)
def test_fields_that_do_not_agree_are_refused(key, value, tmp_path):
    write_json(tmp_path / names.MANIFEST, MANIFEST | {key: value})
    with pytest.raises(IntegrityError, match=rf"pastkey\.json is not valid.*{key}") as refused:
        read_bundle(tmp_path)
    assert len(str(refused.value)) < 1000


def test_every_target_and_static_graphs_are_read_but_with_no_hidden_states(tmp_path):
    for target in TARGETS:
        assert parse_manifest(tmp_path, MANIFEST | {"target": target}).target == target
    content = MANIFEST | {"graph": "static", "static": STATIC}
    assert parse_manifest(tmp_path, content).graph == "static"
    with pytest.raises(IntegrityError, match="hidden_size"):
        parse_manifest(tmp_path, content | {"hidden_size": 8})


def test_weights_files_are_named_as_transformers_js_counts_them():
    found = [names.weights_file("model.onnx", shard) for shard in range(3)]
    assert found == ["model.onnx_data", "model.onnx_data_1", "model.onnx_data_2"]
    assert all(names.is_weights_file(name) and names.is_weights_file(name, "model.onnx") for name in found)
    assert not names.is_weights_file("model_q4.onnx_data", "model.onnx")
    assert not any(names.is_weights_file(name) for name in ("model.onnx", "a_datas", "_data", "model.onnx_data_x"))
