"""int8 of whole decoders with matrices of odd widths or odd numbers: exported and proved, or refused in a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pastkey.contract.bundle import open_bundle
from pastkey.errors import ContractError, NumericsError
from pastkey.export import export

from ...shared import divided
from ..decoders import Plain, Tied
from ..plain_loop import run_chunks

# --- widths -------------------------------------------------------------------------------------------------------
SIZES = [
    (kind, *sizes) for sizes in ((1, 16), (15, 16), (16, 16), (17, 32), (33, 16), (128, 32)) for kind in (Plain, Tied)
]


@pytest.mark.parametrize(
    ("kind", "width", "block"),  # less than a block, exactly one, and more
    divided(SIZES, quick=[(Tied, 33, 16)], ci=[(Plain, 1, 16), (Tied, 16, 16), (Plain, 17, 32), (Tied, 128, 32)]),
)
def test_widths_that_are_no_multiple_of_a_block_are_padded(kind, width, block, tmp_path):
    """K of q, k, v, of the embedding and of the head is `width`; that of o is heads times size, 10."""
    module = kind(width=width, heads=1, size=10)
    export(module, tmp_path / "bundle", context_length=40)
    bundle = open_bundle(tmp_path / "bundle", verify=True)
    model = onnx.load(bundle.all_logits_graph)
    matmuls = [
        {attribute.name: attribute.i for attribute in node.attribute}
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    ]
    assert [matmul["K"] for matmul in matmuls] == [width, 10, width]
    assert [matmul["block_size"] for matmul in matmuls] == [block, 16, block]
    ids = np.random.default_rng(0).integers(0, 37, 40).tolist()
    with torch.no_grad():
        expected = module(torch.tensor([ids]), torch.arange(40)[None])[0].numpy()
    found = run_chunks(bundle.all_logits_graph, [ids])
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.03 * np.abs(expected).max())


# --- numbers ------------------------------------------------------------------------------------------------------
# The matrix, its elements that are set (all or one), and the number.
NUMBERS = {
    "a head of zeros": ("head", ..., 0.0),
    "a table of zeros": ("token", ..., 0.0),
    "values of zeros": ("blocks.0.v", ..., 0.0),
    "queries below the normal numbers": ("blocks.0.q", ..., 1e-40),
    "equal numbers": ("blocks.0.o", ..., 0.25),
    "one tiny number": ("blocks.0.v", (1, 2), 1e-45),
    "one large number": ("blocks.0.v", (1, 2), 1e4),
    "one huge number": ("blocks.0.o", (1, 2), 1e20),
}
QUICK = ["a head of zeros", "one huge number"]


def holding(place: str, where: Any, number: float) -> Plain:
    module = Plain()
    with torch.no_grad():
        module.get_submodule(place).weight[where] = number
    return module


@pytest.mark.parametrize("name", divided(NUMBERS, quick=QUICK, ci=[*NUMBERS][1:-1:2]))
def test_numbers_that_round_badly_are_exported(name, tmp_path, recwarn):
    report = export(holding(*NUMBERS[name]), tmp_path / "bundle", context_length=40)
    assert report.verification.ok
    assert np.isfinite(report.manifest.quality["kl_divergence"])
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]


REFUSED = {
    "NaN": (
        "blocks.0.q",
        float("nan"),
        NumericsError,
        r"the weight blocks\.0\.q\.weight of Plain holds NaN or infinity",
    ),
    "infinity": ("token", -float("inf"), NumericsError, r"the weight token\.weight of Plain holds NaN or infinity"),
    "overflow": ("blocks.0.o", 3e38, NumericsError, "overflow at this precision"),
    "overflow in the logits": ("head", 3e38, ContractError, "NaN or infinity in its logits"),
}


@pytest.mark.parametrize(("place", "number", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_numbers_that_are_none_or_overflow_are_refused_and_leave_nothing(place, number, kind, words, tmp_path):
    with pytest.raises(kind, match=words):
        export(holding(place, (1, 2), number), tmp_path / "bundle", context_length=40)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_decoder_of_zeros_is_exported(tmp_path):
    module = Plain()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    report = export(module, tmp_path / "bundle", context_length=40, max_kl=0.1)
    assert report.verification.ok
    assert report.manifest.quality["kl_divergence"] == 0
