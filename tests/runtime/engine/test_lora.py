"""Adapters as peft saves them, and what is refused of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.runtime import LanguageModel, load

from ..adapters import lora, merged, write_adapter, write_safetensors
from ..conftest import write_bundle

IDS = [3, 14, 15, 9, 2, 6]


@pytest.fixture(scope="module")
def lm(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted") / "bundle"
    write_bundle(folder, tiny, "fused", adapters=True)
    return load(folder)


def logits_with(lm: LanguageModel, folder: Path) -> np.ndarray:
    lm.load_adapter("under test", folder)
    try:
        return lm.logits(IDS, "under test")
    finally:
        lm.unload_adapter("under test")


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 6}, 3),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"wq0": 2, "w.1": 4, "model": 9}}, {"wq0": 1, "wo1": 2, "wv0": 3}),
        (
            {"lora_alpha": 6, "alpha_pattern": {r"^model\.wq\d$": 2, "^wv0": 9, "wo1": 4}},
            {"wq0": 1, "wo1": 2, "wv0": 3},
        ),
    ],
)
def test_the_scale_is_that_of_peft(config, scale, lm, tiny, tmp_path):
    matrices = lora(tiny, ["wq0", "wo1", "wv0"])
    scales = scale if isinstance(scale, dict) else dict.fromkeys(["wq0", "wo1", "wv0"], scale)
    scaled = {m: (a, scales[m.removeprefix("model.")] * b) for m, (a, b) in matrices.items()}
    found = logits_with(lm, write_adapter(tmp_path / "a", matrices, **config))
    np.testing.assert_allclose(found, merged(tiny, scaled)(IDS), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["half", "bfloat16", "of rank 0", "of zeros"])
def test_other_forms_of_matrices_are_read(kind, lm, tiny, tmp_path):
    matrices = lora(tiny, ["wk0"], rank=0 if kind == "of rank 0" else 2)
    a, b = matrices["model.wk0"]
    stored: tuple[Any, Any]
    if kind == "half":
        stored = a.astype(np.float16), b.astype(np.float16)
        a, b = stored[0].astype(np.float32), stored[1].astype(np.float32)
    elif kind == "bfloat16":
        first, second = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b))
        a, b = ((x.astype(np.uint32) << 16).view(np.float32) for x in (first, second))
        stored = first, second
    else:
        b = b * 0
        stored = a, b
    found = logits_with(lm, write_adapter(tmp_path / "a", {"model.wk0": stored}, lora_alpha=2))
    np.testing.assert_allclose(found, merged(tiny, {"model.wk0": (a, b)})(IDS), rtol=0, atol=1e-4)


def _cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def _add(name: str, array: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write_safetensors(folder / "adapter_model.safetensors", {f"base_model.model.model.{name}": array})

    return change


def _pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


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
        ({}, _cut, IntegrityError, "is damaged: .* bytes"),
        ({}, _pickled, InputError, "a pickle, which is not read"),
        ({}, _add("wq0.lora_magnitude_vector", ONES), InputError, "only lora_A and lora_B of linear projections"),
        ({}, _add("word.lora_embedding_A", ONES), InputError, "only lora_A and lora_B of linear projections"),
        ({}, _add("head.weight", ONES), InputError, "only lora_A and lora_B of linear projections"),
        ({}, _add("wq0.lora_A.weight", ONES.astype(np.float64)), InputError, "in F32, F16 or BF16"),
        ({}, _add("wq0.lora_A.weight", np.inf * ONES), InputError, "holds NaN or infinity"),
        ({}, _add("wq0.lora_A.weight", ONES), InputError, r"has \{'lora_A': \[2, 24\]\} of model.wq0"),
        ({}, lambda folder: write_safetensors(folder / "adapter_model.safetensors", {}), InputError, "adapts nothing"),
        ({}, lambda folder: (folder / "adapter_config.json").unlink(), MissingFileError, "adapter_config.json"),
    ],
)
def test_other_adapters_are_refused(config, change, error, words, lm, tiny, tmp_path):
    folder = write_adapter(tmp_path / "a", lora(tiny, ["wq0"]), **config)
    if change is not None:
        change(folder)
    with pytest.raises(error, match=words):
        lm.load_adapter("bad", folder)
    assert not lm.parts.adapters


@pytest.mark.parametrize(
    ("module", "shapes", "words"),
    [
        ("model.other", ((2, 24), (24, 2)), "adapts 'model.other', and .* has no projections of that name"),
        ("model.wq0", ((2, 23), (32, 2)), "as a matrix of 32 x 23; it has 32 x 24"),
    ],
)
def test_an_adapter_of_another_model_is_refused(module, shapes, words, lm, tmp_path):
    matrices = {module: tuple(np.ones(shape, np.float32) for shape in shapes)}
    with pytest.raises(InputError, match=words):
        lm.load_adapter("bad", write_adapter(tmp_path / "a", matrices))  # type: ignore[arg-type]


def test_a_wrapper_may_add_a_prefix_to_the_names(lm, tiny, tmp_path):
    matrices = lora(tiny, ["wq1"])
    found = logits_with(lm, write_adapter(tmp_path / "a", {f"wrapped.{m}": p for m, p in matrices.items()}, r=2))
    np.testing.assert_allclose(found, merged(tiny, matrices, scale=2)(IDS), rtol=0, atol=1e-3)  # alpha 4, r 2
