"""What a manifest may say."""

from __future__ import annotations

import json

import pytest

from pastkey.contract import names
from pastkey.contract.bundle import CacheShift, KeyRotation, KVGeometry, Manifest, read_bundle
from pastkey.errors import IntegrityError
from pastkey.files.durable import write_json
from pastkey.providers import TARGETS

MANIFEST = Manifest("0", "m", "fp32", "cpu", "fused", "", 8, 8, (KVGeometry(1, 8, 8),), 20, 10, "1.23.0").to_json()


TURN = {"layers": [0], "first": 0, "interleaved": False, "angles": [1.0, 0.1, 0.01, 0.001]}


def test_how_keys_turn_is_read_as_it_was_written(tmp_path):
    content = MANIFEST | {"window": 5, "shift": {"refused": "", "rotations": [TURN]}}
    write_json(tmp_path / names.MANIFEST, content)
    manifest = read_bundle(tmp_path).manifest
    assert manifest.shift == CacheShift(rotations=(KeyRotation((0,), 0, False, (1.0, 0.1, 0.01, 0.001)),))
    assert json.loads(json.dumps(manifest.to_json())) == json.loads(json.dumps(content))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", True),
        ("context_length", 0),
        ("layers", [{"kv_heads": "1", "key_head_size": 8, "value_head_size": 8}]),
        ("layers", [{"kv_heads": 1, "key_head_size": -8, "value_head_size": 8}]),
        ("eos_token_ids", [1e400]),
        ("bos_token_id", "1"),
        ("target", ["cpu"]),
        ("target", ""),
        ("target", "../cpu"),
        ("target", "CPU"),
        ("target", "tensorrt"),  # a provider, and no target
        ("target", "z" * 1_000_000),
        ("parity", "good"),
        ("precision", "fp8"),
        ("graph", "other"),
        ("window", 0),
        ("shift", {"rotations": [{**TURN, "layers": [1]}]}),
        ("shift", {"rotations": [{**TURN, "first": 1}]}),
        ("shift", {"rotations": [{**TURN, "first": -1}]}),
        ("shift", {"rotations": [{**TURN, "angles": [4.0]}]}),
        ("shift", {"rotations": [{"layers": [0]}]}),
        ("shift", {"refused": 1}),
    ],
)
def test_a_field_of_another_kind_is_told_in_a_sentence(key, value, tmp_path):
    (tmp_path / names.MANIFEST).write_text(json.dumps(MANIFEST | {key: value}))
    with pytest.raises(IntegrityError, match=r"pastkey\.json is not valid"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_of_export_is_read(target, tmp_path):
    write_json(tmp_path / names.MANIFEST, MANIFEST | {"target": target})
    assert read_bundle(tmp_path).manifest.target == target
