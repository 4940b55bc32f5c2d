"""Weights that are quantized already: each form gives the numbers of its own library, and keeps its integers.

GPTQ and AWQ are written by `quantizing.py`, a second program; compressed-tensors and torchao by their libraries.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.contract import names
from pastkey.errors import InputError, PastkeyError
from pastkey.export.graft.probe.observe import natively, run_uncached
from pastkey.export.graph.stored import read, stored_weights
from pastkey.export.source.open import open_source
from pastkey.export.source.packed.matrix import PackedMatrix
from pastkey.export.source.source import Opening, Source

from ...tiny_llama import llama
from ..opening import change, write
from ..test_pretrained_refused import FIRST, SECOND, in_shards, tensors
from .quantizing import Matrix, awq, dequantized, gptq, quantize_folder, quantized

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own and the libraries', of each version others

MATRICES = 14  # projections of the tiny Llama
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


def rounded(weight: np.ndarray, bits: int = 4, size: int = 32, *, sym: bool = False, shuffled: bool = False) -> Matrix:
    channels = weight.shape[1]
    order = np.random.default_rng(0).permutation(channels) if shuffled else None
    return quantized(weight, bits, channels if size < 0 else size, sym=sym, order=order)


def in_gptq(folder: Path, **settings: Any) -> dict[str, Tensor]:
    return quantize_folder(folder, GPTQ, partial(rounded, **settings), partial(gptq, bits=4))


def assert_are(source: Source, expected: dict[str, Tensor]) -> None:
    """The stored weights and those in memory, bit by bit."""
    module: Any = source.module
    stored = stored_weights(module)
    hollow = {} if stored is None else {id(parameter): tensor for parameter, tensor in stored.parameters(module)}
    for name, parameter in module.model.named_parameters():
        found = read(hollow[id(parameter)]) if id(parameter) in hollow else parameter
        assert torch.equal(found, expected[name].detach().float()), name
    assert len(source.packed) == MATRICES


def assert_is(matrix: PackedMatrix, weight: Tensor) -> None:
    """The parts of a matrix give its content, by rows and by elements."""
    rows = np.arange(matrix.shape[0])
    blocks, some = matrix.blocks(rows), matrix.blocks(rows[[3, 21, 4]])
    assert blocks is not None
    assert some is not None
    assert blocks.shape[:2] == (len(rows), matrix.shape[1] // blocks.block_size)
    assert np.array_equal(some.data, blocks.data[[3, 21, 4]])
    assert np.array_equal(matrix.weights(rows[[3, 21, 4]]), weight.numpy()[[3, 21, 4]])

    def halves(both: np.ndarray) -> np.ndarray:
        return both if matrix.bits == 8 else np.stack([both & 15, both >> 4], -1).reshape(len(rows), -1)

    def each(of_blocks: Any) -> Any:
        return np.repeat(of_blocks.astype(np.float32), blocks.block_size, 1)

    numbers, scales = halves(blocks.data.reshape(len(rows), -1)), blocks.scales.factors
    if blocks.offsets is not None:
        found = numbers * each(scales) - each(blocks.offsets.factors)
    else:
        middle = np.full(scales.shape, 1 << matrix.bits - 1) if blocks.zeros is None else halves(blocks.zeros)
        found = (numbers - each(middle[:, : scales.shape[1]])) * each(scales)
    order = slice(None) if matrix.order is None else matrix.order
    assert np.array_equal(found, weight.numpy()[:, order])
    assert torch.equal(read(matrix, torch.float64), weight.double())
    places = torch.tensor([0, 5, weight.numel() - 1, weight.shape[1], 5])
    assert torch.equal(matrix.elements(places), weight.flatten()[places])


# --- GPTQ and AWQ -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("bits", "size", "sym", "shuffled"),
    [(4, 32, True, False), (4, 32, False, True), (4, -1, False, False), (8, 16, False, True), (8, -1, True, False)],
)
def test_gptq(bits, size, sym, shuffled, version, llama_folder):
    settings = {**GPTQ, "bits": bits, "group_size": size, "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version]}
    made = partial(rounded, bits=bits, size=size, sym=sym, shuffled=shuffled)
    expected = quantize_folder(llama_folder, settings, made, partial(gptq, bits=bits, version=version))
    source = open_source(llama_folder)
    assert_are(source, expected)
    assert_are(open_source(llama_folder, Opening(in_memory=True)), expected)
    matrix = next(m for m in source.packed if torch.equal(read(m), expected[f"{DOWN}.weight"]))
    assert matrix.form == f"GPTQ, {bits} bits, {'a scale per row' if size < 0 else f'groups of {size}'}"
    blocks = matrix.blocks(np.arange(4))
    assert blocks is not None
    assert (blocks.zeros is None, blocks.order is not None) == (sym, shuffled)
    assert_is(matrix, expected[f"{DOWN}.weight"])


def test_awq_and_logits_of_streamed_weights(llama_folder):
    expected = quantize_folder(llama_folder, AWQ, rounded, awq)
    told: list[int] = []
    source = open_source(llama_folder, Opening(before_loading=lambda weights, *_: told.append(weights)))
    assert_are(source, expected)
    assert told == [sum(tensor.numel() for tensor in expected.values())]
    assert_is(source.packed[0], read(source.packed[0]))
    model, ids = llama(attn_implementation="eager"), torch.arange(20)[None]
    model.load_state_dict(expected)
    with torch.no_grad(), natively(source.module):
        assert torch.equal(run_uncached(source.module, ids).logits, model(ids, use_cache=False).logits)


def test_shards(llama_folder):
    expected = in_gptq(llama_folder)
    content = load_file(llama_folder / names.WEIGHTS)
    in_shards(llama_folder)  # the parts of each matrix are in both
    assert_are(open_source(llama_folder), expected)
    shard = {name: FIRST if ".0." in name else SECOND for name in content}
    for file in (FIRST, SECOND):
        save_file({n: t for n, t in content.items() if shard[n] == file}, llama_folder / file, {"format": "pt"})
    write(llama_folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": shard})
    assert_are(open_source(llama_folder), expected)


FAULTS = {
    "a swapped nibble": ("qweight", lambda words: words[:1, :1].bitwise_left_shift_(4)),
    "a zero point off by one": ("qzeros", lambda words: words[0].add_(1)),
    "a shifted group": ("g_idx", lambda groups: groups.copy_(groups.roll(1))),
    "two scales exchanged": ("scales", lambda scales: scales[:, :2].copy_(scales[:, :2].flip(1))),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_a_planted_fault_is_found(fault, form, llama_folder):
    part, plant = FAULTS[fault]
    if form == "awq" and part == "g_idx":
        pytest.skip("AWQ has no such part")
    expected = in_gptq(llama_folder) if form == "gptq" else quantize_folder(llama_folder, AWQ, rounded, awq)
    assert_are(open_source(llama_folder), expected)
    tensor = load_file(llama_folder / names.WEIGHTS)[f"{Q}.{part}"]
    plant(tensor)
    tensors(llama_folder, {f"{Q}.{part}": tensor})
    with pytest.raises(AssertionError, match=Q):
        assert_are(open_source(llama_folder), expected)


# --- by the libraries ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("bits", "symmetric", "size", "activations"),
    [(4, True, 32, False), (4, False, 16, False), (4, False, None, False), (8, False, 32, False), (8, True, None, True),
     (8, False, None, True)],
)  # fmt: skip
def test_compressed_tensors(bits, symmetric, size, activations, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    import compressed_tensors.quantization as ct
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    strategy = "group" if size else "channel"
    args = ct.QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=size)
    tokens = ct.QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True)
    scheme = ct.QuantizationScheme(targets=["Linear"], weights=args, input_activations=tokens if activations else None)
    model = llama().half()
    ct.apply_quantization_config(model, ct.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for module in (module for module in model.modules() if hasattr(module, "weight_scale")):
        parts = module.weight.reshape(len(module.weight), -1, size or module.weight.shape[1])
        module.weight_scale.data, zeros = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
        if not symmetric:
            module.weight_zero_point.data = zeros.to(module.weight_zero_point.dtype)
        module.quantization_status = ct.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    for module in (module for module in model.modules() if hasattr(module, "weight_scale")):
        module.weight_scale.data = module.weight_scale.data.float()  # it multiplies in the type of its scales
    compressor.decompress_model(model)
    source = open_source(tmp_path)
    assert_are(source, dict(model.named_parameters()))
    assert source.packed[0].form.startswith(f"compressed-tensors, {bits} bits, ")
    assert_is(source.packed[0], read(source.packed[0]))


@pytest.mark.parametrize("kind", ["int8", "int8 per tensor", "intx 4", "intx 4 asymmetric", "intx 8"])
def test_torchao(kind, llama_folder, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    import torchao.quantization as ao

    library: Any = torch
    int4 = library.int4
    config = {
        "int8": lambda: ao.Int8WeightOnlyConfig(version=2),
        "int8 per tensor": lambda: ao.Int8WeightOnlyConfig(version=2, granularity=ao.PerTensor()),
        "intx 4": lambda: ao.IntxWeightOnlyConfig(int4, ao.PerGroup(32)),
        "intx 4 asymmetric": lambda: ao.IntxWeightOnlyConfig(
            int4, ao.PerGroup(32), mapping_type=ao.MappingType.ASYMMETRIC
        ),
        "intx 8": lambda: ao.IntxWeightOnlyConfig(torch.int8, ao.PerAxis(0)),
    }[kind]()
    settings = transformers.TorchAoConfig(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=settings, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "quantized")
    source = open_source(tmp_path / "quantized")
    plain = (nn.Parameter, Tensor)
    assert_are(source, {n: p if type(p) in plain else p.dequantize() for n, p in model.named_parameters()})
    assert source.packed[0].form.startswith(f"torchao, {4 if '4' in kind else 8} bits, ")
    assert_is(source.packed[0], read(source.packed[0]))


# --- torchao for GPUs: its libraries write these only there ---------------------------------------------------------
def in_torchao(matrix: Matrix) -> tuple[dict[str, Tensor], Tensor]:
    """The parts, and weights with zero points that are no integers."""
    codes, scales, _, group = matrix
    scale = torch.from_numpy(scales).bfloat16()
    zero = torch.randn(scale.shape, generator=torch.manual_seed(0)).bfloat16()
    weight = (torch.from_numpy(codes) - 8) * scale.float()[:, group] + zero.float()[:, group]
    signed = codes - 8
    nibbles = torch.from_numpy(((signed[:, ::2] & 15) | (signed[:, 1::2] << 4)).astype(np.int8))
    return {"qdata": nibbles, "scale": scale.t().contiguous(), "zero_point": zero.t().contiguous()}, weight.float()


def test_torchao_with_zero_points_that_are_no_integers(llama_folder):
    weights, content, metadata = load_file(llama_folder / names.WEIGHTS), dict[str, Tensor](), {"format": "pt"}
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            content[name] = weight
            continue
        parts, weights[name] = in_torchao(rounded(weight.numpy()))
        content |= {f"{name.removesuffix('weight')}_weight_{part}": tensor for part, tensor in parts.items()}
        data = {"block_size": [1, 32], "shape": list(weight.shape)}
        metadata[name] = json.dumps({"_type": "Int4Tensor", "_data": data, "_tensor_data_names": list(parts)})
    save_file(content, llama_folder / names.WEIGHTS, metadata=metadata)
    change(llama_folder / names.CONFIG, quantization_config={"quant_method": "torchao"})
    source = open_source(llama_folder)
    assert_are(source, weights)
    blocks = source.packed[0].blocks(np.arange(4))
    assert blocks is not None
    assert blocks.zeros is None
    assert_is(source.packed[0], read(source.packed[0]))


# --- weights of one's own module ----------------------------------------------------------------------------------
class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(64, 48, bias=False), nn.LayerNorm(48)


@pytest.mark.parametrize("kind", ["awq", "gptq", "gptq_v2"])
def test_weights_of_a_module(kind, tmp_path):
    net = Net()
    matrix = rounded(net.up.weight.detach().numpy(), sym=kind == "gptq_v2")
    parts = awq(matrix) if kind == "awq" else gptq(matrix, 4, version=2 if kind == "gptq_v2" else 1)
    state = {f"up.{part}": tensor for part, tensor in parts.items()}
    save_file(state | {f"norm.{name}": t for name, t in net.norm.state_dict().items()}, tmp_path / "w.safetensors")
    opening = Opening(weights=tmp_path / "w.safetensors", context_length=8)
    with pytest.raises(
        InputError, match=r"no file next to it describes them: put the config\.json or quantize_config\.json"
    ):
        open_source(net, opening)
    settings = AWQ if kind == "awq" else {"bits": 4, "group_size": 32, "checkpoint_format": kind}
    write(tmp_path / "quantize_config.json", settings)
    source = open_source(net, opening)
    assert torch.equal(source.module.up.weight, torch.from_numpy(dequantized(matrix)))
    assert_is(source.packed[0], torch.from_numpy(dequantized(matrix)))


# --- refused ------------------------------------------------------------------------------------------------------
def spoilt(part: str, value: Any) -> Any:
    """Overwrites a part: None removes it, a function gets it."""

    def spoil(folder: Path) -> None:
        name = f"{Q}.{part}"
        old = load_file(folder / names.WEIGHTS).get(name)
        tensors(folder, {name: value(old) if callable(value) else value})

    return spoil


def settings(**entries: Any) -> Any:
    return lambda folder: change(folder / names.CONFIG, quantization_config={**GPTQ, **entries})


REFUSED = {
    "a method": (settings(quant_method="bitsandbytes"), "'bitsandbytes'.*; it reads GPTQ .*: export the unquant"),
    "no method": (settings(quant_method=None), "no quant_method|bits 4"),
    "three bits": (settings(bits=3), "quant_method 'gptq', bits 3"),
    "a version": (settings(checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
    "AWQ's version": (settings(quant_method="awq", version="gemv"), "version 'gemv'"),
    "other groups": (settings(group_size=16), "in groups of 32, and not of 16 as its quantization_config says"),
    "another method": (settings(quant_method="awq", version="gemm"), "not F16 or BF16 or F32 of .any, 512."),
    "no scales": (spoilt("scales", None), f"has no {Q}.scales, which its quantized matrix needs"),
    "no zero points": (spoilt("qzeros", None), f"has no {Q}.qzeros"),
    "no codes": (spoilt("qweight", None), f"has no {Q}.qweight"),
    "two forms": (spoilt("weight", torch.zeros(64, 64)), f"{Q}.weight of .* is there with the same matrix"),
    "NaN": (spoilt("scales", lambda old: old * torch.nan), "scales of .* has numbers that are not finite"),
    "integer scales": (spoilt("scales", lambda old: old.int()), "is I32 of shape"),
    "odd groups": (spoilt("scales", lambda old: old[[0, 1, 1]]), r"qzeros of .* not I32 of \(3, any\)"),
    "three groups": (
        lambda f: [spoilt(p, lambda old: old[[0, 1, 1]])(f) for p in ("scales", "qzeros")], "3 groups, which do not",
    ),
    "few zero points": (spoilt("qzeros", lambda old: old[:, :3].contiguous()), "has 3 words for 64 rows"),
    "a group beyond": (spoilt("g_idx", lambda old: old + 1), "names the group 2 of 2"),
    "uneven groups": (spoilt("g_idx", lambda old: (old * 0).index_fill(0, torch.tensor([1]), 1)), "puts 63 channels"),
    "a byte matrix": (spoilt("weight_scale.weight", torch.zeros(4, 4, dtype=torch.int8)), "is I8, and config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, llama_folder):
    in_gptq(llama_folder)
    spoil, word = REFUSED[case]
    spoil(llama_folder)
    with pytest.raises(PastkeyError, match=word) as caught:
        open_source(llama_folder)
    assert str(llama_folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)
