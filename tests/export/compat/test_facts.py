"""The cache that other programs build from config.json, and the config.json that makes them build the graph's."""

from __future__ import annotations

import json

import pytest

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry
from pastkey.export import export
from pastkey.export.compat.facts import NOTE_KEY, REPLACED_KEY, declare_cache

from ..conftest import saved_untrained

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 16}
LAYERS = (KVGeometry(2, 16, 16),) * 3
SIZES = HEADS | {"architectures": ["Mine"], "num_hidden_layers": 3, "hidden_size": 128, "vocab_size": 5}


def test_a_llama_keeps_its_keys_and_only_a_width_that_misleads_is_replaced():
    own = SIZES | {"model_type": "llama", "rope_theta": 1e6, "architectures": ["LlamaForCausalLM"]}
    assert declare_cache(own, SIZES, LAYERS) == own
    declared = declare_cache(own | {"hidden_size": 96}, SIZES, LAYERS)
    assert (declared["model_type"], declared["hidden_size"], declared["rope_theta"]) == ("llama", 128, 1e6)
    assert declared[REPLACED_KEY] == {"hidden_size": 96}
    assert "the graph is the model" in declared[NOTE_KEY]


@pytest.mark.parametrize("kind", ["mixtral", "qwen2", "a_type_of_next_year"])
def test_any_other_type_becomes_llama(kind):
    own = SIZES | {"model_type": kind, "rope_scaling": {"type": "of its own"}, "architectures": ["Other"]}
    declared = declare_cache(own, SIZES, LAYERS)
    assert declared.items() >= (SIZES | {"model_type": "llama", "architectures": ["Other"]}).items()
    assert "rope_scaling" not in declared  # llama would read it
    assert declared[REPLACED_KEY] == {"model_type": kind, "rope_scaling": {"type": "of its own"}}


@pytest.mark.parametrize("layers", [(KVGeometry(2, 16, 12),), (KVGeometry(2, 16, 16), KVGeometry(1, 16, 16))])
def test_a_cache_without_a_counterpart_is_declared_as_nobodys(layers):
    declared = declare_cache({}, SIZES | {"num_hidden_layers": len(layers)}, layers)
    assert declared["model_type"] == "pastkey"
    assert NOTE_KEY not in declared
    own = SIZES | {"model_type": "deepseek_v2"}
    assert declare_cache(own, SIZES, layers) == own


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "positions"), [("pastkey", "learned"), ("llama", "rope")])
def test_a_checkpoint_of_ours_is_declared(kind, positions, word_tokenizer, tmp_path):
    """Of a width that is not heads times size; with learned positions it has no type."""
    source = saved_untrained(tmp_path / "checkpoint", word_tokenizer, position_encoding=positions)
    bundle = export(source, tmp_path / "bundle", precision="fp32")
    own = json.loads((source / names.CONFIG).read_text(encoding="utf-8"))
    declared = json.loads((bundle.path / names.CONFIG).read_text(encoding="utf-8"))
    assert (own["model_type"], own["hidden_size"], declared["hidden_size"]) == (kind, 48, 64)
    assert declared["model_type"] == "llama"
    assert declared.get(REPLACED_KEY) == ({"hidden_size": 48} if kind == "llama" else None)
    assert declared.get("rms_norm_eps") == own.get("rms_norm_eps")


@pytest.mark.parametrize("name", ["multi_query_repeated_by_hand", "three_axes"])
def test_a_module_of_any_heads_and_sizes_is_declared_and_transformers_parses_it(name, exported):
    bundle = exported(name).bundle
    own = json.loads((bundle.path / names.CONFIG).read_text(encoding="utf-8"))
    assert own["architectures"] == [bundle.manifest.source]
    assert own[NOTE_KEY]
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.AutoConfig.from_pretrained(bundle.path)
    first = bundle.manifest.layers[0]
    assert type(config).__name__ == "LlamaConfig"
    assert (config.num_hidden_layers, config.vocab_size) == (len(bundle.manifest.layers), bundle.manifest.vocab_size)
    assert (config.num_key_value_heads, config.head_dim) == (first.kv_heads, first.key_head_size)
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
