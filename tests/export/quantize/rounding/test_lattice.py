"""Float matrices that lie on a lattice are found, and only these."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pastkey.export.quantize.rounding.lattice import is_on_lattice, lattice_of

PLAIN = np.random.default_rng(0).normal(0, 0.02, (96, 256)).astype(np.float32)


def on_lattice(bits: int, group: int, scales: torch.dtype, stored_in: torch.dtype, top: float) -> np.ndarray:
    """Of quantization-aware training: integers times a scale for each group, in the type of the checkpoint."""
    groups = torch.from_numpy(PLAIN).view(96, -1, group)
    scale = (groups.abs().amax(-1, keepdim=True) / top).to(scales).float()
    most = 1 << (bits - 1)
    numbers = (groups / scale).round().clamp(-most, most - 1)
    return np.asarray((numbers * scale).view(96, 256).to(stored_in).float().numpy())


@pytest.mark.parametrize("stored_in", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scales", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("group", "top"), [(32, -8), (32, 7), (128, 7.5)])
def test_four_bits_are_found_in_every_type(group, top, scales, stored_in):
    weights = on_lattice(4, group, scales, stored_in, top)
    found = lattice_of(weights)
    assert found is not None
    assert found.blocks is not None
    assert (found.form, found.blocks.bits) == ("a lattice of 4 bits", 4)
    exact = stored_in == torch.float32
    rounded = torch.from_numpy(found.blocks.matrix).to(stored_in).float().numpy()
    np.testing.assert_array_equal(found.blocks.matrix if exact else rounded, weights)


@pytest.mark.filterwarnings("error")
def test_no_lattice_holds_what_is_not_finite_or_far_too_large():
    for wrong in (np.nan, np.inf, 1e38):
        weights = PLAIN.copy()
        weights[0, 3] = wrong
        assert lattice_of(weights) is None


@pytest.mark.parametrize(("group", "top"), [(32, 127), (256, 127.5)])
def test_eight_bits_are_found(group, top):
    weights = on_lattice(8, group, torch.float16, torch.float32, top)
    found = lattice_of(weights)
    assert found is not None
    assert found.blocks is not None
    assert found.blocks.bits == 8
    np.testing.assert_array_equal(found.blocks.matrix, weights)


@pytest.mark.parametrize("stored_in", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_floats_and_one_plain_block_are_not(stored_in):
    assert lattice_of(torch.from_numpy(PLAIN).to(stored_in).float().numpy()) is None
    weights = on_lattice(4, 32, torch.float32, stored_in, 7)
    weights[-1, -32:] = PLAIN[-1, -32:]
    assert lattice_of(torch.from_numpy(weights).to(stored_in).float().numpy()) is None


def test_a_module_counts_if_most_of_its_matrices_do():
    module = nn.Sequential(nn.Embedding(96, 256), nn.Linear(256, 96), nn.Linear(256, 96))
    assert not is_on_lattice(module)
    with torch.no_grad():
        for linear in (module[1], module[2]):
            linear.weight.copy_(torch.from_numpy(on_lattice(4, 32, torch.float16, torch.bfloat16, 7)))
        assert is_on_lattice(module)
        assert is_on_lattice(module.to(torch.bfloat16))
        assert not is_on_lattice(nn.Linear(256, 96, device="meta"))
        module[1].weight.fill_(1)  # as a module that was never trained
        assert not is_on_lattice(module)
