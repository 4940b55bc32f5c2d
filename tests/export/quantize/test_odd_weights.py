"""int8 of whole decoders with matrices of odd widths or odd numbers: exported and proved, or refused in a sentence."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from pastkey.contract.bundle import open_bundle
from pastkey.errors import ContractError, NumericsError
from pastkey.export import export

from ...shared import divided
from ..decoders import Plain
from ..plain_loop import run_chunks


class Tied(Plain):
    """One table for the embedding and the output head."""

    def more(self) -> None:
        self.head.weight = self.token.weight


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
FAR = [("blocks.0.v", 1e-45), ("blocks.0.v", 1e4), ("blocks.0.o", 1e20)]


@pytest.mark.parametrize(("place", "number"), divided(FAR, quick=FAR[2:], ci=FAR))
def test_one_number_far_from_all_others_is_exported(place, number, tmp_path, recwarn):
    module = Plain()
    with torch.no_grad():
        module.get_submodule(place).weight[1, 2] = number
    report = export(module, tmp_path / "bundle", context_length=40)
    assert report.verification.ok
    assert np.isfinite(report.manifest.quality["kl_divergence"])
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]


@pytest.mark.parametrize(("place", "number"), [("blocks.0.q", float("nan")), ("token", -float("inf"))])
def test_a_number_that_is_none_names_the_weight_and_leaves_nothing(place, number, tmp_path):
    module = Plain()
    with torch.no_grad():
        module.get_submodule(place).weight[1, 2] = number
    with pytest.raises(NumericsError, match=rf"the weight {place}\.weight of Plain holds NaN or infinity"):
        export(module, tmp_path / "bundle", context_length=40)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("place", "kind", "words"),
    [
        ("blocks.0.o", NumericsError, "overflow at this precision: export with --precision fp32"),
        ("head", ContractError, "it gives NaN or infinity in its logits: check its weights"),
    ],
)
def test_a_number_that_overflows_is_one_sentence_and_leaves_nothing(place, kind, words, tmp_path):
    module = Plain()
    with torch.no_grad():
        module.get_submodule(place).weight[1, 2] = 3e38
    with pytest.raises(kind, match=words):
        export(module, tmp_path / "bundle", context_length=40)
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
