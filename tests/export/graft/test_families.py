"""Hugging Face decoders, family by family: what the graft gives equals transformers' own uncached eager run.

Steps with a cache are compared in torch; an export's `verify` compares prefill, decode token by token, chunks, a batch
of rows of different lengths and a greedy continuation. Windows are smaller than the prompt. The exports' figures are
listed at the end of the test run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.contract.bundle import KVGeometry
from pastkey.errors import ContractError, InputError
from pastkey.export import Report, export
from pastkey.export.compare import logits_difference
from pastkey.export.graft.probe.contract import in_contract
from pastkey.export.graft.probe.observe import run_on, run_uncached
from pastkey.export.graft.trace import choose_graph
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Opening
from pastkey.precisions import PRECISIONS
from pastkey.runtime import load

from ...shared import divided
from ..families import CONTEXT, FAMILIES, FEW, FROM_TRANSFORMERS_5, IN_CI, QUICK, REFUSED, WINDOW, build, greedy

BY_HAND = ("bloom", "falcon", "gpt_neo", "mpt", "openai-gpt", "xglm")  # followed along the time axis
# Whose graph CI compares as well: ALiBi by hand, sinks and experts, latents of two head sizes, convolutions with a
# window, keys and values that layers share.
EXPORTED = ("bloom", "gpt_oss", "lfm3")
# How a token's rows are cached where that is not as keys and values: the rotated key and the latent.
LATENT = dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"), KVGeometry(1, 8, 16))

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of each version others


def skip_unless_known(family: str) -> None:
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    if family in FROM_TRANSFORMERS_5 and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip(f"transformers {transformers.__version__}: {FROM_TRANSFORMERS_5[family]}")


@pytest.mark.parametrize("family", divided(FAMILIES, quick=("gpt2", "llama"), ci=(*QUICK, *IN_CI)))
def test_steps_with_a_cache_give_transformers_own_logits(family):
    skip_unless_known(family)
    source = open_source(build(family), Opening(context_length=CONTEXT))
    taken = in_contract(source.module, CONTEXT, None, lambda _: None)
    assert taken.observation.geometry[0] == LATENT.get(family, taken.observation.geometry[0])
    ids = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = build(family).eval()(ids).logits
    past = run_uncached(taken.module, ids[:, :5])
    logits = [past.logits]
    for start, end in ((5, 6), (6, 13), *((i, i + 1) for i in range(13, 30))):
        past = run_on(taken.module, past, ids[:, start:end])
        logits.append(past.logits)
    assert logits_difference(expected, torch.cat(logits, 1)) < 1e-4


@pytest.mark.parametrize("family", divided(FAMILIES, quick=QUICK, ci=EXPORTED))
def test_a_family_computes_what_transformers_computes(family, tmp_path, record_family):
    skip_unless_known(family)
    model = build(family)
    report = export(model, tmp_path / "bundle", precision="fp32", context_length=CONTEXT)
    parity = report.manifest.parity["fp32"]
    assert parity["ok"]
    assert parity["reference"] == "source"
    assert len({*greedy(model)}) > FEW
    assert parity["tokens"] == CONTEXT > 2 * WINDOW
    figures = [c["value"] for c in parity["checks"].values() if c["measure"] == "max_relative_difference"]
    assert len(figures) == 5
    assert max(figures) <= PRECISIONS["fp32"].max_difference
    assert parity["checks"]["greedy"]["value"] is None
    if family in BY_HAND:
        assert_greedy_ids_are_those_of_transformers(model, report)
        assert report.manifest.graph == ("standard" if family in ("bloom", "mpt") else "fused")  # ALiBi or not
    record_family(family, max(figures))


def assert_greedy_ids_are_those_of_transformers(model: Any, report: Report) -> None:
    """By its own `generate`, and with padding allowed."""
    prompt, new = [5, 17, 3, 60, 41], 40
    expected = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()
    ends = report.manifest.eos_token_ids
    until = next((i for i, token in enumerate(expected) if token in ends), new)
    assert load(report.path).generate(prompt, max_new_tokens=new).ids == expected[:until]
    assert report.manifest.padding


@pytest.mark.parametrize("family", divided(["gemma2", "gpt_oss", "qwen3_moe", "phi3"]))
def test_the_standard_graph_takes_windows_softcap_sinks_and_experts_too(family, tmp_path):
    report = export(build(family), tmp_path / "bundle", precision="fp32", context_length=CONTEXT, graph="standard")
    assert report.manifest.graph == "standard"
    assert report.manifest.parity["fp32"]["ok"]


@pytest.mark.parametrize("family", divided(["gemma2", "gpt_oss", "mixtral"]))
def test_a_family_in_int8_is_still_the_same_model(family, tmp_path):
    report = export(build(family), tmp_path / "bundle", context_length=CONTEXT)
    assert report.manifest.parity["int8"]["ok"]
    assert report.manifest.quality["kl_divergence"] < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(("queries", "heads"), [("grouped", 2), ("multi", 1), ("own", 4)])
def test_falcon_keeps_its_smallest_keys_with_rotary_positions_and_with_alibi(queries, heads, alibi):
    config = transformers.FalconConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=heads, alibi=alibi,
        new_decoder_architecture=queries == "grouped", multi_query=queries == "multi", parallel_attn=queries != "own",
        bos_token_id=1, eos_token_id=2, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    torch.manual_seed(0)
    source = open_source(transformers.FalconForCausalLM(config), Opening(context_length=CONTEXT))
    observation = in_contract(source.module, CONTEXT, None, lambda _: None).observation
    assert {layer.geometry.kv_heads for layer in observation.layers} == {heads}
    assert choose_graph("auto", "cpu", observation).graph == ("standard" if alibi else "fused")


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_grafted_is_refused_with_the_reason(family, tmp_path):
    skip_unless_known(family)
    with pytest.raises(ContractError) as caught:
        export(build(family), tmp_path / "bundle", precision="fp32", context_length=CONTEXT)
    assert REFUSED[family][1] in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_model_whose_own_positions_do_not_begin_at_0_is_asked_about(tmp_path):
    """RoBERTa's begin behind its padding token. No family that is exported has such."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.RobertaConfig(vocab_size=50, max_position_embeddings=24, is_decoder=True, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(InputError, match=r"runs as model\(ids\) and as model\(ids, position_ids=positions\)"):
        export(model, tmp_path / "bundle", precision="fp32", context_length=20)
