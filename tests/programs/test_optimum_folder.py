"""Decoders that optimum exports in a separate environment: pastkey's bundle of the folder, which optimum loads."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import pastkey
from benchmarks.environments import environment
from pastkey.export import export
from pastkey.export.source.onnx_folder.decoder import GivenDecoder
from pastkey.export.source.open import open_source

from ..shared import ran
from .environments import OPTIMUM

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

PROMPT = [5, 17, 256, 80, 3, 41]
NEW = 24
LOADED = """
import sys, torch
from optimum.onnxruntime import ORTModelForCausalLM
model = ORTModelForCausalLM.from_pretrained(sys.argv[1], subfolder="onnx", file_name="model.onnx")
ids = torch.tensor([[int(token) for token in sys.argv[2].split(",")]])
settings = {"do_sample": False, "max_new_tokens": int(sys.argv[3]), "pad_token_id": 0}
print(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1]:].tolist())
"""


def run(*command: object) -> str:
    settings = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    return ran(environment(*OPTIMUM), *command, env=os.environ | settings).stdout


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2"])
def test_what_optimum_exports_becomes_a_fused_bundle_that_it_loads(kind, tmp_path):
    run(Path(__file__).with_name("optimum_folder.py"), kind, tmp_path)
    folder, bundle = tmp_path / "onnx-folder", tmp_path / "bundle"
    report = export(folder, bundle, "fp32")
    assert report.manifest.graph == "fused"
    assert report.manifest.padding
    decoder = open_source(folder).module
    assert isinstance(decoder, GivenDecoder)
    ids = list(PROMPT)
    for _ in range(NEW):
        ids.append(int(decoder.run(np.array([ids]))[0][0, -1].argmax()))
    expected = ids[len(PROMPT) :]
    assert pastkey.load(bundle).generate(PROMPT, max_new_tokens=NEW).ids == expected
    assert run("-c", LOADED, bundle, ",".join(map(str, PROMPT)), NEW).strip() == str(expected)
    assert export(folder, tmp_path / "int8", "int8").manifest.quality["kl_divergence"] < 0.05
