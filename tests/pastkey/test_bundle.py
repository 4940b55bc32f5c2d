"""What a manifest may say."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pastkey import names
from pastkey.bundle import KVGeometry, Manifest, open_bundle, read_bundle
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


def test_what_a_file_manager_leaves_in_a_folder_is_passed_over(tmp_path: Path) -> None:
    """A file that is anything else is refused: onnxruntime might be led to it."""
    (tmp_path / "onnx").mkdir()
    listed = {}
    for name in (names.ALL_LOGITS_GRAPH["fp32"], names.LAST_LOGITS_GRAPH):
        (tmp_path / name).write_bytes(b"")
        listed[name] = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (tmp_path / names.MANIFEST).write_text(json.dumps(MANIFEST | {"precision": "fp32", "files": listed}))
    for left in (".DS_Store", "._pastkey.onnx", "Thumbs.db"):
        (tmp_path / "onnx" / left).write_bytes(b"x")
    assert open_bundle(tmp_path).path == tmp_path
    (tmp_path / "onnx" / "other.onnx_data").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"other\.onnx_data is not listed in pastkey\.json: it was added"):
        open_bundle(tmp_path)
