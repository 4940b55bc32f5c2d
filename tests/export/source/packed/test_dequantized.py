"""Weights in tables of numbers or in float8 are read as float32, and a sentence says so."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.contract import names
from pastkey.errors import PastkeyError
from pastkey.export.graph.stored import read, stored_weights
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Opening, Source

from ..opening import change

Parts = tuple[dict[str, Tensor], Tensor]  # what replaces a matrix, by the end of its name, and its weights
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
_SIZE = 32  # weights of a block


def float8(*sizes: int | None, name: str = "weight_scale") -> Any:
    """A scale for so many rows and channels; None: for all."""

    def made(weight: Tensor) -> Parts:
        codes = (weight * 100).to(torch.float8_e4m3fn)
        spans = [size or whole for size, whole in zip(sizes, weight.shape, strict=True)]
        scale = torch.rand(*(-(-whole // span) for span, whole in zip(spans, weight.shape, strict=True)))
        found = codes.float()
        for row, column in np.ndindex(*weight.shape):
            found[row, column] *= scale[row // spans[0], column // spans[1]]
        return {"weight": codes, name: scale if sizes != (None, None) else scale.reshape(1)}, found

    return made


def table_of_four_bits(*, nested: bool) -> Any:
    """As bitsandbytes writes NF4."""

    def made(weight: Tensor) -> Parts:
        rng = np.random.default_rng(0)
        codes, table = rng.integers(0, 16, weight.numel()), rng.standard_normal(16).astype(np.float32)
        scales = rng.random(weight.numel() // _SIZE).astype(np.float32)
        state = {"quant_type": "nf4", "blocksize": _SIZE, "dtype": "bfloat16", "shape": list(weight.shape)}
        parts: dict[str, Any] = {"absmax": scales}
        if nested:
            of_bytes, map_ = rng.integers(0, 256, len(scales), np.uint8), rng.random(256).astype(np.float32)
            factors = rng.random(-(-len(scales) // 16)).astype(np.float32)
            scales = np.array([map_[b] * factors[i // 16] for i, b in enumerate(of_bytes)]) + np.float32(0.25)
            parts = {"absmax": of_bytes, "nested_absmax": factors, "nested_quant_map": map_}
            state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.25}
        text = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
        parts |= {"quant_map": table, "quant_state.bitsandbytes__nf4": text}
        both = np.array([[16 * high + low] for high, low in codes.reshape(-1, 2)], np.uint8)
        found = np.array([table[code] * scales[i // _SIZE] for i, code in enumerate(codes)], np.float32)
        tensors = {f"weight.{name}": torch.from_numpy(part) for name, part in parts.items()}
        return {"weight": torch.from_numpy(both), **tensors}, torch.from_numpy(found).view(weight.shape)

    return made


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FORMS = {
    "blocks": (float8(48, 40, name="weight_scale_inv"), {"quant_method": "fp8", "weight_block_size": [48, 40]}),
    "a matrix": (float8(None, None), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "compressed, a matrix": (float8(None, None), compressed("tensor")),
    "compressed, rows": (float8(1, None), compressed("channel")),
    "compressed, blocks": (float8(48, 40), compressed("block", block_structure=[48, 40])),
    "rows": (float8(1, None), {"quant_method": "fbgemm_fp8"}),
    "NF4": (table_of_four_bits(nested=False), BITSANDBYTES),
    "NF4 of nested scales": (table_of_four_bits(nested=True), BITSANDBYTES),
}


def replace_matrices(folder, made, settings) -> dict[str, Tensor]:
    """Returns all weights by name."""
    weights, content = load_file(folder / names.WEIGHTS), dict[str, Tensor]()
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            content[name] = weight
            continue
        parts, weights[name] = made(weight)
        content |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    save_file(content, folder / names.WEIGHTS, metadata={"format": "pt"})
    change(folder / names.CONFIG, quantization_config=settings)
    return weights


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_read_as_float32(form, llama_folder):
    weights, said = replace_matrices(llama_folder, *FORMS[form]), list[str]()
    source = open_source(llama_folder, Opening(say=said.append))
    assert source.packed == ()
    assert f"are {'NF4' if 'NF4' in form else 'float8'}: they are read as float32" in said[0]
    assert_are(source, weights)


def assert_are(source: Source, weights: dict[str, Tensor]) -> None:
    """All of them are the module's; those in the file also by elements."""
    module: Any = source.module
    parameters, stored = dict(module.model.named_parameters()), stored_weights(module)
    assert stored is not None
    for name, weight in weights.items():
        found = stored.of(parameters[name])
        assert torch.equal(parameters[name] if found is None else read(found), weight)
        if found is not None:
            assert torch.equal(found.elements(torch.tensor([7, 2047])), weight.flatten()[[7, 2047]])


def test_experts_in_mxfp4(tmp_path):
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "vocab_size": 40, "num_hidden_layers": 1}
    experts = {"num_local_experts": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    model: nn.Module = GptOssForCausalLM(GptOssConfig(**sizes, **experts))
    model.save_pretrained(tmp_path)
    content, expected = load_file(tmp_path / names.WEIGHTS), dict[str, Tensor]()
    for name in [name for name in content if name.endswith(("gate_up_proj", "down_proj"))]:
        count, channels, rows = content.pop(name).shape
        both = torch.randint(0, 256, (count, rows, channels // 32, 16), dtype=torch.uint8)
        powers = torch.randint(120, 130, (count, rows, channels // 32), dtype=torch.uint8)
        content |= {f"{name}_blocks": both, f"{name}_scales": powers}
        expected[name] = weight = torch.empty(count, channels, rows)
        for expert, row, channel in np.ndindex(count, rows, channels):
            code = int(both[expert, row, channel // 32, channel % 32 // 2]) >> 4 * (channel % 2) & 15
            weight[expert, channel, row] = FP4[code] * 2.0 ** (int(powers[expert, row, channel // 32]) - 127)
    save_file(content, tmp_path / names.WEIGHTS, metadata={"format": "pt"})
    change(tmp_path / names.CONFIG, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    assert_are(open_source(tmp_path), expected)


def spoilt(part: str, change_: Any) -> Any:
    """A change of the first matrix."""

    def spoil(content: dict[str, Tensor]) -> None:
        name = next(name for name in content if name.endswith(part))
        content[name] = change_(content[name])

    return spoil


def state(**entries: Any) -> Any:
    def changed(old: Tensor) -> Tensor:
        text = json.dumps(json.loads(old.numpy().tobytes()) | entries)
        return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())

    return spoilt("__nf4", changed)


REFUSED = {
    "no table": ("NF4", lambda content: content.pop(next(n for n in content if n.endswith("quant_map"))), "has no "),
    "no state": ("NF4", lambda content: content.pop(next(n for n in content if "quant_state" in n)), "has no .*nf4"),
    "a state that is none": (
        "NF4",
        spoilt("__nf4", lambda old: old[:20]),
        "is not valid JSON",
    ),
    "blocks cut short": ("NF4", spoilt("proj.weight", lambda old: old[1:]), r"is U8 of shape .*, not U8 of \("),
    "an infinite scale": ("NF4", spoilt("absmax", lambda old: old / 0), "absmax of .* not finite"),
    "scales of some rows": ("rows", spoilt("_scale", lambda old: old[1:]), r"not F16 or BF16 or F32 of \(64, 1\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, llama_folder):
    form, spoil, word = REFUSED[case]
    replace_matrices(llama_folder, *FORMS[form])
    content = load_file(llama_folder / names.WEIGHTS)
    spoil(content)
    save_file(content, llama_folder / names.WEIGHTS, metadata={"format": "pt"})
    if case == "no settings":
        change(llama_folder / names.CONFIG, quantization_config=None)
    with pytest.raises(PastkeyError, match=word) as caught:
        open_source(llama_folder)
    assert "\n" not in str(caught.value)
