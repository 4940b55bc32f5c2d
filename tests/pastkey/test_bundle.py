"""What a manifest may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pastkey import names
from pastkey.bundle import KVGeometry, Manifest, read_bundle
from pastkey.errors import IntegrityError
from pastkey.folder import write_json

MANIFEST = Manifest("0", "m", "fp32", "cpu", "fused", "", 8, 8, (KVGeometry(1, 8, 8),), 20, 10, "1.23.0").to_json()


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_json(tmp_path / names.MANIFEST, MANIFEST)
    assert read_bundle(tmp_path).manifest.to_json() == MANIFEST


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", True),
        ("context_length", 0),
        ("opset", "20"),
        ("layers", [{"kv_heads": "1", "key_head_size": 8, "value_head_size": 8}]),
        ("layers", [{"kv_heads": 1, "key_head_size": -8, "value_head_size": 8}]),
        ("layers", [{"kv_heads": 1}]),
        ("layers", 3),
        ("eos_token_ids", [1e400]),
        ("eos_token_ids", 5),
        ("bos_token_id", "1"),
        ("min_onnxruntime", 1.23),
        ("target", ["cpu"]),
        ("operators", [1]),
        ("parity", "good"),
        ("precision", "fp8"),
        ("precision", []),
        ("graph", "other"),
        ("padding", 1),
    ],
)
def test_a_field_of_another_kind_is_told_in_a_sentence(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / names.MANIFEST).write_text(json.dumps(MANIFEST | {key: value}))
    with pytest.raises(IntegrityError, match=r"pastkey\.json is not valid"):
        read_bundle(tmp_path)
