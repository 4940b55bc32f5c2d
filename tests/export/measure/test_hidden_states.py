"""The input of an output head is seen in torch, and the output of a bundle is compared with it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import ContractError
from pastkey.export import export
from pastkey.export.graft.streamed import product
from pastkey.export.measure.hidden_states import head_input
from pastkey.export.measure.metrics import cosine_distance
from pastkey.export.measure.verify import verify
from pastkey.precisions import PRECISIONS

from ..cases import CASES
from ..decoders import llama

IDS = np.array([3, 1, 4, 1, 5])


class Headed(nn.Module):
    """A decoder of the contract whose head multiplies in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.embedding, self.way = nn.Embedding(11, 8), way
        self.head = nn.Linear(8, 11)

    def forward(self, input_ids, position_ids):
        hidden, weight = torch.tanh(self.embedding(input_ids)), self.head.weight
        ways = {
            "linear": lambda: self.head(hidden),
            "tied": lambda: hidden @ self.embedding.weight.T,
            "einsum": lambda: torch.einsum("bth,vh->btv", hidden, weight),
            "batched": lambda: torch.bmm(hidden, weight.T[None]),
            "streamed": lambda: product(hidden[0], weight, self.head.bias)[None],
            "softcap": lambda: 5 * torch.tanh(self.head(hidden) / 5),
            "by_hand": lambda: (hidden[:, :, None] * weight).sum(-1),
        }
        return ways[self.way]()


@pytest.mark.parametrize("way", ["linear", "tied", "einsum", "batched", "streamed", "softcap"])
def test_the_heads_input_is_seen_where_it_is_multiplied(way):
    module = Headed(way)
    expected = torch.tanh(module.embedding(torch.tensor(IDS))).detach().numpy()
    np.testing.assert_allclose(head_input(module, IDS), expected, atol=1e-6)
    with pytest.raises(ContractError, match="the logits of Headed was not seen in torch"):
        head_input(Headed("by_hand"), IDS)


def test_cosine_distance():
    a = np.array([[1, 0], [0, 2], [0, 0]], np.float32)
    assert cosine_distance(a, 3 * a) == pytest.approx(0, abs=1e-12)
    assert cosine_distance(a, a[:, ::-1]) == pytest.approx(2 / 3)
    assert cosine_distance(a[:1], -a[:1]) == pytest.approx(2)


@pytest.fixture(scope="module")
def embedding(tmp_path_factory):
    out = tmp_path_factory.mktemp("llama") / "bundle"
    export(llama(), out, precision="fp32", context_length=40, hidden_states=True)
    return open_bundle(out)


def before_the_last_norm(model: ir.Model) -> None:
    """Gives those, of the same shape, as hidden states."""
    for place, hidden in enumerate(model.graph.outputs):
        if hidden.name == names.LAST_HIDDEN_STATE:
            before = hidden.producer().inputs[0]
            hidden.name = "normed"
            before.name, before.type, before.shape = names.LAST_HIDDEN_STATE, hidden.type, hidden.shape
            model.graph.outputs[place] = before


def test_verify_compares_them_with_the_source_and_alone(embedding, altered):
    module = llama()
    for given in (module, None):
        checks = {check.name: check for check in verify(embedding, given).checks}
        check = checks["hidden_states"]
        assert (check.ok, check.measure) == (True, "max_relative_difference")
        assert check.value <= PRECISIONS["fp32"].max_difference == check.limit
    wrong = verify(altered(embedding, before_the_last_norm), module)
    assert [check.name for check in wrong.checks if not check.ok] == ["hidden_states"]
    assert "the last hidden states differ by" in wrong.checks[-1].detail


@pytest.mark.slow
def test_int8_is_compared_with_itself_and_with_float32(tmp_path):
    module = CASES["softcap_bias_and_scale"].build()
    export(module, tmp_path / "bundle", context_length=40, hidden_states=True)
    bundle = open_bundle(tmp_path / "bundle")
    checks = {check.name: check for check in verify(bundle, module).checks}
    assert checks["hidden_states"].measure == checks["hidden_states_float32"].measure == "mean_cosine_distance"
    assert 0 < (checks["hidden_states_float32"].value or 0) < 0.01
    assert "hidden_states_float32" not in {check.name for check in verify(bundle).checks}
    assert bundle.manifest.parity["int8"]["checks"].keys() >= {"hidden_states", "hidden_states_float32"}
