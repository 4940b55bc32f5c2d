"""`pastkey verify` as a user types it: exit status, one sentence, one JSON object."""

from __future__ import annotations

import json
import shutil

import pytest

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle

from ..runtime.tiny_decoder import relisted
from .commands import fails
from .measure import conftest as measure

altered = measure.altered


def test_verify_is_said_in_sentences_and_as_one_object_with_a_figure_per_check(small, factory, command):
    status, out, err = command("verify", small)
    assert (status, out) == (0, "")
    assert f"{small} against own uncached run, 12 tokens: equal" in err
    status, printed, _ = command("verify", small, f"{factory}:Small", "--json")
    assert (status, printed.count("\n")) == (0, 1)
    result = json.loads(printed)
    assert (result["ok"], result["reference"]) == (True, "source")
    for name in ("prefill", "decode", "chunks_of_7", "chunks_of_64", "batch"):
        assert 0 <= result["checks"][name]["value"] <= 1e-5
    assert result["checks"]["greedy"] == {
        "ok": True, "measure": "first_difference", "value": None, "limit": None, "detail": "",
    }  # fmt: skip


def test_altered_weights_with_a_matching_manifest_are_a_difference(small, factory, altered, command):
    changed = relisted(altered(open_bundle(small), measure.scaled("qkv.weight", 3.0)).path).path
    status, printed, _ = command("verify", changed, f"{factory}:Small", "--json")
    result = json.loads(printed)
    assert (status, printed.count("\n"), result["ok"], result["checks"]["prefill"]["ok"]) == (1, 1, False, False)
    status, printed, told = command("verify", changed, f"{factory}:Small")
    assert (status, printed) == (1, "")
    assert "DIFFERENT" in told
    assert "FAIL prefill" in told


def test_a_key_is_asked_for_before_anything_else(small, tmp_path, command):
    pytest.importorskip("cryptography")
    bundle, key, public = tmp_path / "bundle", tmp_path / "me.pem", tmp_path / "me.pub.pem"
    shutil.copytree(small, bundle)
    fails(command("verify", bundle, "--key", public), "no such file", "me.pub.pem")
    assert command("sign", bundle, "--new-key", key)[0] == 0
    status, out, err = command("verify", bundle, "--key", public)
    assert (status, out) == (0, "")
    assert f"signed by the key in {public}" in err
    status, printed, _ = command("verify", bundle, "--key", public, "--json")
    assert (status, json.loads(printed)["signed_by"]) == (0, str(public))
    assert command("sign", "--new-key", tmp_path / "other.pem")[0] == 0
    other, unsigned = tmp_path / "other.pub.pem", "is not a signature of pastkey.json by the key"
    fails(command("verify", bundle, "--key", other), unsigned)
    graph = bundle / "onnx" / "model.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    fails(command("verify", bundle, "--key", public), "model.onnx was altered: its sha256")
    (bundle / names.MANIFEST).write_text("{}", encoding="utf-8")
    fails(command("verify", bundle, "--key", public), unsigned)
