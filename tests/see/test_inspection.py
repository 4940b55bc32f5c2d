"""Of every form of decoder the weights of attention and the stream after each layer are found, and are torch's."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F

from pastkey.errors import ContractError, InputError
from pastkey.export.graph.edit import replace_uses
from pastkey.see import inspection
from pastkey.see.inspectable import inspectable
from pastkey.see.inspection import inspect, likeliest

from ..shared import divided
from .conftest import module_of

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
FORMS = (
    "plain", "llama", "gpt2", "own:relative_keys", "own:soft_cap", "own:differential", "own:one_layer_three_times",
    "own:short_conv", "own:smeared_embedding", "own:latent", "own:two_latents", "hf:gpt2", "hf:gemma2", "hf:qwen3",
    "hf:olmo2", "hf:cohere", "hf:phi3", "hf:deepseek_v3", "hf:gpt_oss",
)  # fmt: skip
CI = ("own:differential", "hf:gemma2")  # weights below zero; norms behind, windows and soft caps


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", divided(FORMS, quick=("plain", "llama"), ci=CI))
def test_every_form_of_decoder_is_seen_whole(bundle_of, name):
    bundle = bundle_of(name)
    ids = [(5 + 7 * place) % bundle.manifest.vocab_size for place in range(24)]
    seen = inspect(bundle, ids, 1, shown=24)
    assert len(seen.attention) == seen.layers == len(bundle.manifest.layers)
    for weights in seen.attention.values():
        assert weights.shape == (seen.heads, 24, 24)
        assert not np.triu(weights, 1).any()
        assert np.abs(weights[:, 0, 0] - weights[:, 0].sum(-1)).max() < 1e-6
    assert all(lens is not None for lens in seen.lens)
    assert seen.lens_error < 1e-5
    assert seen.entering is not None


ROUNDED = [pytest.param({"precision": precision}, marks=pytest.mark.matrix) for precision in ("int8", "fp16")]


@pytest.mark.parametrize("options", [{"graph": "standard"}, *ROUNDED])
@pytest.mark.slow
def test_both_graphs_and_precisions_show_the_same(bundle_of, options):
    one, other = (inspect(bundle_of("llama", **which), IDS, 1, shown=99) for which in (dict[str, str](), options))
    limit = 1e-5 if "graph" in options else 0.05
    for number in range(2):
        assert np.abs(one.attention[number] - other.attention[number]).max() < limit
    for left, right in zip(one.lens_next, other.lens_next, strict=True):
        assert np.abs(left - right).max() < limit


def test_a_graph_without_a_product_of_weights_and_values_is_refused(bundle_of):
    bundle = bundle_of("llama", graph="standard")
    model = ir.load(bundle.all_logits_graph)
    outputs = {value.name: value for value in model.graph.outputs}
    replace_uses(outputs["present.1.value"], outputs["present.0.value"])
    with pytest.raises(ContractError, match="no attention weights were found in attention call 1"):
        inspectable(model, 2, 9)


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("family", divided(("gpt2", "gemma2"), ci=("gemma2",)))
def test_attention_and_streams_are_those_that_transformers_returns(bundle_of, family):
    seen, module = inspect(bundle_of(f"hf:{family}"), IDS, 1, shown=99), module_of(f"hf:{family}")[0]
    norm = module.transformer.ln_f if family == "gpt2" else module.model.norm
    cap = getattr(module.config, "final_logit_softcapping", None)
    with torch.no_grad():
        found = module(torch.tensor([IDS]), output_attentions=True, output_hidden_states=True)
        for number, weights in enumerate(found.attentions):
            assert np.abs(weights[0].numpy() - seen.attention[number]).max() < 1e-5
        for number, stream in enumerate(found.hidden_states[:-1]):  # the last one is behind the norm
            logits = module.get_output_embeddings()(norm(stream))
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            expected = likeliest(logits[0].numpy(), 3)
            assert np.abs(expected.probabilities - seen.lens[number].probabilities).max() < 1e-5


def test_embedding_and_positions_are_those_of_the_module(bundle_of):
    """Rotary positions are no part of them."""
    seen, module, ids = inspect(bundle_of("plain"), IDS, 1, shown=99), module_of("plain")[0], torch.tensor(IDS)
    np.testing.assert_array_equal(seen.embedding, module.token(ids).detach().numpy())
    np.testing.assert_array_equal(seen.positions, module.position(torch.arange(len(IDS))).detach().numpy())
    np.testing.assert_array_equal(seen.entering, seen.embedding + seen.positions)
    seen, module = inspect(bundle_of("llama"), IDS, 1, shown=99), module_of("llama")[0]
    assert seen.positions is None
    np.testing.assert_array_equal(seen.entering, module.model.embed_tokens(ids).detach().numpy())


@pytest.mark.parametrize("graph", ["fused", "standard"])  # which stacks the heads of a group
def test_the_last_tokens_are_those_of_the_whole_text(bundle_of, graph):
    bundle = bundle_of("llama", **({} if graph == "fused" else {"graph": graph}))
    whole, end = (inspect(bundle, IDS, 7, shown=shown) for shown in (99, 4))
    assert (whole.first, end.first) == (0, 8)
    np.testing.assert_array_equal(end.attention[1], whole.attention[1][:, 8:])
    np.testing.assert_array_equal(end.logits, whole.logits[8:])
    last = np.asarray(end.lens_next[2])
    np.testing.assert_array_equal(last, whole.lens_next[2][8:])
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


def test_weights_that_are_not_those_of_the_call_have_a_large_error(bundle_of, monkeypatch):
    def mistaken(model, calls, shown):
        found = inspectable(model, calls, shown)
        one, other = found.calls
        return dataclasses.replace(found, calls=(dataclasses.replace(one, weights=other.weights), other))

    monkeypatch.setattr(inspection, "inspectable", mistaken)
    errors = inspect(bundle_of("llama"), IDS, 1, shown=99).errors
    assert errors[1] < 1e-5 < 0.01 < errors[0]
