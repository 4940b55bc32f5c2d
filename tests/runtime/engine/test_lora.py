"""Adapters as peft saves them, refusals, and how the names in them are matched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.runtime import load
from pastkey.runtime.engine.channels import changed, rotation

from ..adapters import lora, merged, write_adapter, write_safetensors

IDS = [3, 14, 15, 9, 2, 6]


@pytest.fixture(scope="module")
def lm(tiny, make_bundle):
    return load(make_bundle(tiny, adapters=True).path)


def require_merged(lm: Any, folder: Path, decoder: Any) -> None:
    """With this adapter the model computes what the decoder does."""
    lm.load_adapter("under test", folder)
    try:
        np.testing.assert_allclose(lm.logits(IDS, "under test"), decoder(IDS), rtol=0, atol=1e-3)
    finally:
        lm.unload_adapter("under test")


WEIGHTS = ["wq0", "wo1", "wv0"]


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"lora_alpha": 6}, (3, 3, 3)),
        ({"lora_alpha": 6, "use_rslora": True}, [6 / 2**0.5] * 3),
        ({"lora_alpha": 6, "alpha_pattern": {"wq0": 2, "w.1": 4, "model": 9}}, (1, 2, 3)),
        ({"lora_alpha": 6, "alpha_pattern": {r"^model\.wq\d$": 2, "^wv0": 9, "wo1": 4}}, (1, 2, 3)),
    ],
)
def test_the_scale_is_that_of_peft(config, scales, lm, tiny, tmp_path):
    matrices = lora(tiny, WEIGHTS)
    scaled = {module: (a, scale * b) for scale, (module, (a, b)) in zip(scales, matrices.items(), strict=True)}
    require_merged(lm, write_adapter(tmp_path / "a", matrices, **config), merged(tiny, scaled))


def half(array: Any) -> tuple[Any, Any]:
    return array.astype(np.float16), array.astype(np.float16).astype(np.float32)


def bfloat16(array: Any) -> tuple[Any, Any]:
    stored = (array.view(np.uint32) >> 16).astype(np.uint16)
    return stored, (stored.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(("form", "rank"), [(half, 2), (bfloat16, 2), (half, 0)])
def test_other_forms_of_matrices_are_read(form, rank, lm, tiny, tmp_path):
    """A matrix of a form, and its float32 numbers."""
    (a, read_a), (b, read_b) = map(form, lora(tiny, ["wk0"], rank=rank)["model.wk0"])
    folder = write_adapter(tmp_path / "a", {"model.wk0": (a, b)}, lora_alpha=2)
    require_merged(lm, folder, merged(tiny, {"model.wk0": (read_a, read_b)}))


def tensors(name: str, array: Any) -> Any:
    """Replaces one tensor of the adapter."""
    return lambda file: write_safetensors(file, {f"base_model.model.model.{name}": array})


ONES = np.ones((2, 24), np.float32)


@pytest.mark.parametrize(
    ("config", "change", "error", "words"),
    [
        ({"peft_type": "IA3"}, None, InputError, "an adapter of the type 'IA3'; LORA was expected"),
        ({"use_dora": True}, None, InputError, "a LoRA adapter with use_dora = True, which is more than two matrices"),
        ({"init_lora_weights": "pissa"}, None, InputError, "with init_lora_weights = 'pissa'"),
        ({"alora_invocation_tokens": [1, 2]}, None, InputError, "with alora_invocation_tokens"),
        ({"lora_alpha": "much"}, None, InputError, "has lora_alpha = 'much'; a number was expected"),
        ({"alpha_pattern": {"q": 1, r"(\w+\.?)+x!": 3}}, None, InputError, r"has the alpha_pattern '\(.*; names were"),
        ({"alpha_pattern": ["wq0"]}, None, IntegrityError, "adapter_config.json cannot be read"),
        ({}, lambda file: file.write_bytes(file.read_bytes()[:-3]), IntegrityError, "is damaged: .* bytes"),
        ({}, lambda file: file.rename(file.with_suffix(".bin")), InputError, "a pickle, which is not read"),
        ({}, tensors("wq0.lora_magnitude_vector", ONES), InputError, "only lora_A and lora_B of linear projections"),
        ({}, tensors("word.lora_embedding_A", ONES), InputError, "only lora_A and lora_B of linear projections"),
        ({}, tensors("head.weight", ONES), InputError, "only lora_A and lora_B of linear projections"),
        ({}, tensors("wq0.lora_A.weight", ONES.astype(np.float64)), InputError, "in F32, F16 or BF16"),
        ({}, tensors("wq0.lora_A.weight", np.inf * ONES), InputError, "holds NaN or infinity"),
        ({}, tensors("wq0.lora_A.weight", ONES), InputError, r"has \{'lora_A': \[2, 24\]\} of model.wq0"),
        ({}, lambda file: write_safetensors(file, {}), InputError, "adapts nothing"),
        ({}, lambda file: file.with_name("adapter_config.json").unlink(), MissingFileError, "adapter_config.json"),
    ],
)
def test_other_adapters_are_refused(config, change, error, words, lm, tiny, tmp_path):
    folder = write_adapter(tmp_path / "a", lora(tiny, ["wq0"]), **config)
    if change is not None:
        change(folder / "adapter_model.safetensors")
    with pytest.raises(error, match=words):
        lm.load_adapter("bad", folder)
    assert not lm.parts.adapters


@pytest.mark.parametrize(
    ("module", "columns", "words"),
    [
        ("model.other", 24, "adapts 'model.other', and .* has no projections of that name"),
        ("model.wq0", 23, "as a matrix of 32 x 23; it has 32 x 24"),
    ],
)
def test_an_adapter_of_another_model_is_refused(module, columns, words, lm, tmp_path):
    matrices = {module: (np.ones((2, columns), np.float32), np.ones((32, 2), np.float32))}
    with pytest.raises(InputError, match=words):
        lm.load_adapter("bad", write_adapter(tmp_path / "a", matrices))


def test_a_wrapper_may_add_a_prefix_to_the_names(lm, tiny, tmp_path):
    matrices = lora(tiny, ["wq1"])
    folder = write_adapter(tmp_path / "a", {f"wrapped.{name}": pair for name, pair in matrices.items()}, r=2)
    require_merged(lm, folder, merged(tiny, matrices, scale=2))  # alpha 4, r 2


# --- channels that an export changed --------------------------------------------------------------------------------
N, K, R = 12, 8, 3


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["rotated", "scaled", "permuted"])
def test_an_update_follows_its_weight(kind, axis):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(R, K)).astype(np.float32), rng.normal(size=(N, R)).astype(np.float32)
    size = (N, K)[axis]
    numbers = {
        "rotated": np.array([4]),
        "scaled": rng.uniform(0.5, 2, size).astype(np.float32),
        "permuted": rng.permutation(size),
    }[kind]
    want = changed(b @ a, axis, kind, numbers)
    found = changed(b, 0, kind, numbers) @ a if axis == 0 else b @ changed(a, 1, kind, numbers)
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert not np.allclose(want, b @ a)


@pytest.mark.parametrize("size", [4, 6, 8])
def test_a_rotation_is_orthogonal(size):
    np.testing.assert_allclose(rotation(size) @ rotation(size).T, np.eye(size), atol=1e-12)
