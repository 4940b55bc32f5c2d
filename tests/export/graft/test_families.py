"""Hugging Face decoders, family by family: the graft equals transformers' own uncached eager run.

Steps with a cache are compared in torch; an export's `verify` compares prefill, decode token by token, chunks, a batch
of rows of different lengths and a greedy continuation. Windows are smaller than the prompt. The exports' figures are
in the JUnit file.
"""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.contract.bundle import KVGeometry
from pastkey.errors import ContractError
from pastkey.export import export
from pastkey.export.compare import logits_difference
from pastkey.export.graft.probe.contract import in_contract
from pastkey.export.graft.trace import choose_graph
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Opening
from pastkey.precisions import PRECISIONS

from ...shared import divided
from ..families import (
    CONTEXT,
    FAMILIES,
    FEW,
    FROM_TRANSFORMERS_5,
    HYBRIDS,
    IN_CI,
    QUICK,
    REFUSED,
    WINDOW,
    build,
    greedy,
)
from .plain import steps

BY_HAND = ("bloom", "falcon", "gpt_neo", "mpt", "openai-gpt", "xglm")  # followed along the time axis
# Whose graph CI also compares: ALiBi in its own code, sinks and experts, a recurrence.
EXPORTED = ("bloom", "gpt_oss", "qwen3_5_text")
# How a token's rows are cached where that is not as keys and values: the rotated key and the latent.
LATENT = dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"), KVGeometry(1, 8, 16))

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of each version others


def skip_unless_known(family):
    if family.partition("+")[0] not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    if family in FROM_TRANSFORMERS_5 and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip(f"transformers {transformers.__version__}: {FROM_TRANSFORMERS_5[family]}")


@pytest.mark.parametrize("family", divided(FAMILIES, quick=("gpt2", "llama"), ci=(*QUICK, *IN_CI)))
def test_steps_with_a_cache_give_transformers_own_logits(family):
    skip_unless_known(family)
    source = open_source(build(family), Opening(context_length=CONTEXT))
    taken = in_contract(source.module, CONTEXT, None, lambda _: None)
    assert LATENT.get(family) in (None, *taken.observation.geometry[:1])
    kept = (*taken.observation.rows, *taken.observation.states)
    assert bool(kept) == (family in HYBRIDS or family.startswith("lfm"))
    ids = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = build(family).float().eval()(ids).logits
    assert logits_difference(expected, steps(taken.module, ids, 5, 6, 13)) < 1e-4


@pytest.mark.parametrize("family", divided(FAMILIES, quick=QUICK, ci=EXPORTED))
def test_a_family_computes_what_transformers_computes(family, tmp_path, record_family):
    skip_unless_known(family)
    model = build(family)
    report = export(model, tmp_path / "bundle", precision="fp32", context_length=CONTEXT)
    parity = report.manifest.parity["fp32"]
    assert (parity["ok"], parity["reference"]) == (True, "source")
    assert len({*greedy(model)}) > FEW
    assert parity["tokens"] == CONTEXT > 2 * WINDOW
    figures = [c["value"] for c in parity["checks"].values() if c["measure"] == "max_relative_difference"]
    assert len(figures) == 5
    assert max(figures) <= PRECISIONS["fp32"].max_difference
    assert parity["checks"]["greedy"]["value"] is None
    if family in BY_HAND:
        assert report.manifest.padding
        assert report.manifest.graph == ("standard" if family in ("bloom", "mpt") else "fused")  # ALiBi or not
    record_family(family, max(figures))


STANDARD = [(family, "standard", "fp32") for family in ("gemma2", "gpt_oss", "qwen3_moe", "phi3")]


@pytest.mark.parametrize(
    ("family", "graph", "precision"), divided([*STANDARD, ("gemma2", "auto", "int8"), ("mixtral", "auto", "int8")])
)
def test_windows_softcap_sinks_and_experts_in_other_graphs_and_precisions(family, graph, precision, tmp_path):
    report = export(build(family), tmp_path / "bundle", precision=precision, context_length=CONTEXT, graph=graph)
    assert report.manifest.graph == ("standard" if graph == "standard" else "fused")
    assert report.manifest.parity[precision]["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(("queries", "heads"), [("grouped", 2), ("multi", 1), ("own", 4)])
def test_falcon_keeps_its_smallest_keys_with_rotary_positions_and_with_alibi(queries, heads, alibi):
    how = {"new_decoder_architecture": queries == "grouped", "multi_query": queries == "multi", "alibi": alibi}
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.FalconConfig(num_kv_heads=heads, parallel_attn=queries != "own", **sizes, **how)
    torch.manual_seed(0)
    source = open_source(transformers.FalconForCausalLM(config), Opening(context_length=CONTEXT))
    observation = in_contract(source.module, CONTEXT, None, lambda _: None).observation
    assert {layer.geometry.kv_heads for layer in observation.layers} == {heads}
    assert choose_graph("auto", "cpu", observation).graph == ("standard" if alibi else "fused")


@pytest.mark.slow
@pytest.mark.parametrize("family", divided(REFUSED, ci=("doge", "llama4_text")))
def test_what_cannot_be_grafted_is_refused_with_the_reason(family, tmp_path):
    skip_unless_known(family)
    with pytest.raises(ContractError) as caught:
        export(build(family), tmp_path / "bundle", precision="fp32", context_length=CONTEXT)
    assert REFUSED[family][1] in str(caught.value)
    assert list(tmp_path.iterdir()) == []
