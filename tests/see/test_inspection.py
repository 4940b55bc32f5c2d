"""The numbers are torch's."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F

from pastkey.errors import ContractError, InputError
from pastkey.see import inspection
from pastkey.see.inspectable import Inspectable, inspectable
from pastkey.see.inspection import inspect, likeliest

from ..shared import divided
from .conftest import module_of

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("family", divided(("gpt2", "gemma2"), ci=("gemma2",)))
def test_attention_and_streams_are_those_that_transformers_returns(bundle_of, family):
    seen = inspect(bundle_of(f"hf:{family}"), IDS, 1, shown=99)
    module: Any = module_of(f"hf:{family}")[0]
    with torch.no_grad():
        found = module(torch.tensor([IDS]), output_attentions=True, output_hidden_states=True)
        head = module.get_output_embeddings()
        norm = module.transformer.ln_f if family == "gpt2" else module.model.norm
        for number, weights in enumerate(found.attentions):
            assert np.abs(weights[0].numpy() - seen.attention[number]).max() < 1e-5
        for number, stream in enumerate(found.hidden_states[:-1]):  # the last one is behind the norm
            logits = head(norm(stream))
            cap = getattr(module.config, "final_logit_softcapping", None)
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            expected = likeliest(logits[0].numpy(), 3)
            assert np.abs(expected.probabilities - seen.lens[number].probabilities).max() < 1e-5


def test_embedding_and_positions_are_those_of_the_module(bundle_of):
    seen = inspect(bundle_of("plain"), IDS, 1, shown=99)
    module: Any = module_of("plain")[0]
    ids = torch.tensor(IDS)
    assert seen.embedding is not None
    np.testing.assert_array_equal(seen.embedding, module.token(ids).detach().numpy())
    np.testing.assert_array_equal(seen.positions, module.position(torch.arange(len(IDS))).detach().numpy())
    np.testing.assert_array_equal(seen.entering, seen.embedding + seen.positions)


def test_rotary_positions_are_no_part_of_the_embedding(bundle_of):
    seen = inspect(bundle_of("llama"), IDS, 1, shown=99)
    module: Any = module_of("llama")[0]
    assert seen.positions is None
    np.testing.assert_array_equal(seen.entering, module.model.embed_tokens(torch.tensor(IDS)).detach().numpy())


@pytest.mark.parametrize("graph", ["fused", "standard"])  # which stacks the heads of a group
def test_the_last_tokens_are_those_of_the_whole_text(bundle_of, graph):
    bundle = bundle_of("llama", **({} if graph == "fused" else {"graph": graph}))
    whole, end = (inspect(bundle, IDS, 7, shown=shown) for shown in (99, 4))
    assert (whole.first, end.first) == (0, 8)
    np.testing.assert_array_equal(end.attention[1], whole.attention[1][:, 8:])
    np.testing.assert_array_equal(end.logits, whole.logits[8:])
    last, of_whole = end.lens_next[2], whole.lens_next[2]
    assert last is not None
    assert of_whole is not None
    np.testing.assert_array_equal(last, of_whole[8:])
    probabilities = F.softmax(torch.from_numpy(end.logits), -1).numpy()
    np.testing.assert_allclose(last, probabilities[range(4), [*IDS[9:], 7]], rtol=1e-4)


def test_layers_and_heads_fit_on_a_page_or_are_named(bundle_of):
    bundle = bundle_of("llama")
    few = inspect(bundle, IDS, 1, shown=99, most_weights=200)  # of a head 12 * 15 / 2
    assert (list(few.attention), few.attention_heads) == ([0], [0, 1])
    named = inspect(bundle, IDS, 1, shown=99, layers=[1], heads=[3, 2], most_weights=1)
    assert (list(named.attention), named.attention_heads) == ([1], [2, 3])
    with pytest.raises(InputError, match="no layer 3: this decoder has 2, from 1 on"):
        inspect(bundle, IDS, 1, shown=99, layers=[2])
    with pytest.raises(InputError, match="no head 5: this decoder has 4"):
        inspect(bundle, IDS, 1, shown=99, heads=[4])


def test_weights_that_are_not_those_of_the_call_are_refused(bundle_of, monkeypatch):
    def mistaken(model: ir.Model, calls: int, shown: int) -> Inspectable:
        found = inspectable(model, calls, shown)
        one, other = found.calls
        return dataclasses.replace(found, calls=(dataclasses.replace(one, weights=other.weights), other))

    monkeypatch.setattr(inspection, "inspectable", mistaken)
    with pytest.raises(ContractError, match="the weights found in attention call 0 are not the ones that it used"):
        inspect(bundle_of("llama"), IDS, 1, shown=99)
