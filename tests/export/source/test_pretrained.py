"""Hugging Face folders and models as users have them: the bundle writes the same as transformers."""

from __future__ import annotations

import json
import socket

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.contract import names
from pastkey.errors import ContextLengthError, PastkeyError
from pastkey.export import export
from pastkey.export.graft.probe.observe import run_uncached
from pastkey.export.source.open import open_source
from pastkey.export.source.pretrained import open_model
from pastkey.export.source.source import Opening
from pastkey.runtime import load
from pastkey.runtime.text.chat_template import ChatTemplate

from ..tiny_llama import CONTEXT, PROMPT, TEMPLATE, TRANSFORMERS_4, bpe, greedy, llama, sizes
from .opening import change, write

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of each version others

TEXTS = ("Once upon a time", " two  spaces", "äöü 🙂\n\ttab", "<|im_start|>user", "")


@pytest.fixture(scope="module")
def bundle(saved_llama, tmp_path_factory):
    """The fp32 bundle of `saved_llama`."""
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    export(saved_llama, out, "fp32")
    return out


# --- what comes out -----------------------------------------------------------------------------------------------
@pytest.mark.oldest
def test_the_bundle_of_a_folder_writes_what_transformers_writes(saved_llama, bundle):
    model = transformers.AutoModelForCausalLM.from_pretrained(saved_llama, dtype=torch.float32)
    expected = greedy(model, 48)
    assert len(set(expected)) > 10
    assert load(bundle).generate(PROMPT, max_new_tokens=48).ids == expected


def test_no_network_is_tried(saved_llama, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", pytest.fail)
    monkeypatch.setattr(socket, "getaddrinfo", pytest.fail)
    assert open_source(saved_llama).context_length == CONTEXT


def test_a_context_length_is_found_under_every_name(tmp_path, word_tokenizer):
    """ALiBi needs no table of positions: BLOOM's class has none of the names, and its folders have seq_length."""
    config = transformers.BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    plain = (tmp_path / names.CONFIG).read_bytes()

    def found(context_length: int | None = None, **settings: int) -> tuple[int, tuple[str, ...]]:
        change(write(tmp_path / names.CONFIG, plain), **settings)
        source = open_source(tmp_path, Opening(context_length=context_length))
        return source.context_length, source.warnings

    context, (told,) = found()
    assert (context, "names no context length: it gets 2,048 tokens" in told) == (2048, True)
    assert found(300) == (300, ())
    for name in ("seq_length", "max_seq_len", "n_ctx"):
        assert found(**{name: 24}) == (24, ())
    with pytest.raises(ContextLengthError, match="--context 25 is more than the 24 tokens"):
        found(25, seq_length=24)
    for longest, expected in ((int(1e30), 2048), (20, 20)):
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=word_tokenizer, model_max_length=longest)
        tokenizer.save_pretrained(tmp_path)
        assert found()[0] == expected


SAMPLING = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05}


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("stated", "carried"),
    [
        ({"do_sample": True, "num_beams": 2, **SAMPLING}, {"do_sample": True, **SAMPLING}),
        ({"do_sample": False, **SAMPLING}, {}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ],
)
def test_the_authors_sampling_and_ends_are_carried_along(llama_folder, stated, carried):
    write(llama_folder / names.GENERATION_CONFIG, {"bos_token_id": 0, "eos_token_id": [7, 5], **stated})
    source = open_source(llama_folder)
    assert source.generation == carried
    assert (source.bos_token_id, source.eos_token_ids) == (0, (7, 5))


# --- tokenizer and configuration ----------------------------------------------------------------------------------
def test_the_tokenizer_comes_along(saved_llama, bundle):
    config = json.loads((bundle / names.TOKENIZER_CONFIG).read_text())
    assert config.items() >= {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "chat_template": TEMPLATE,
        "bos_token": "<s>", "eos_token": "</s>",
    }.items()  # fmt: skip
    original = transformers.AutoTokenizer.from_pretrained(saved_llama)
    again = transformers.AutoTokenizer.from_pretrained(bundle)
    ours = load(bundle).tokenizer
    for text in TEXTS:
        expected = original(text)["input_ids"]
        assert expected[0] == 0
        assert again(text)["input_ids"] == expected
        assert ours.encode(text) == expected


@pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4 writes the old field alone")
def test_the_configuration_suits_old_and_new_programs(bundle):
    content = json.loads((bundle / names.CONFIG).read_text())
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 50000.0
    assert transformers.AutoConfig.from_pretrained(bundle).rope_parameters["rope_theta"] == 50000.0


def test_every_special_token_that_a_template_may_write_comes_along_and_several_templates_are_a_list(llama_folder):
    tokenizer = bpe(bos=True)
    tokenizer.add_special_tokens({"cls_token": tokenizer.bos_token, "sep_token": tokenizer.eos_token})
    template = "{{ cls_token }}{% for m in messages %}{{ m['content'] }}{{ sep_token }}{% endfor %}"
    tokenizer.chat_template = {"default": template, "tool_use": "tools: " + TEMPLATE}
    tokenizer.save_pretrained(llama_folder)
    config = open_source(llama_folder).tokenizer_config
    assert config["chat_template"] == [
        {"name": "default", "template": template}, {"name": "tool_use", "template": "tools: " + TEMPLATE},
    ]  # fmt: skip
    messages = [{"role": "user", "content": "ab"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert expected == f"{tokenizer.bos_token}ab{tokenizer.eos_token}"
    tokens = {name: token for name, token in config.items() if name.endswith("_token")}
    assert ChatTemplate(template, tokens).render(messages) == expected


# --- a model in hand ----------------------------------------------------------------------------------------------
def test_a_model_in_hand_stays_as_it_was():
    model = llama().to(torch.bfloat16)
    model.set_attn_implementation("sdpa")
    model.train()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        before = model(ids).logits
        module = open_model(model, Opening()).module
        assert torch.equal(model(ids).logits, before)
        assert torch.allclose(run_uncached(module, ids).logits, before.float(), atol=0.2)
    assert model.training
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "sdpa")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


class Wrapped(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm = llama()
        self.lm.set_attn_implementation("sdpa")

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return logits


@pytest.mark.skipif(TRANSFORMERS_4, reason="works with transformers 4")
def test_a_module_around_a_model_of_transformers_is_told_what_to_pass(tmp_path):
    with pytest.raises(PastkeyError, match="export that model itself, or its folder"):
        export(Wrapped(), tmp_path / "bundle", "fp32", context_length=CONTEXT)


def test_a_factory_may_return_a_model_of_transformers(tmp_path):
    file = write(tmp_path / "mine.py", "from transformers import LlamaConfig, LlamaForCausalLM\n")
    source = open_source(f"{file}:LlamaForCausalLM(LlamaConfig(**{sizes()}))")
    assert (source.name, source.context_length) == ("LlamaForCausalLM", CONTEXT)


@pytest.mark.skipif(not hasattr(transformers, "Qwen3_5Config"), reason="transformers has no Qwen3.5")
def test_a_folder_that_sees_and_reads_is_opened_for_its_text_alone(tmp_path):
    text = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": CONTEXT, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    model = transformers.Qwen3_5ForConditionalGeneration(
        transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    ).eval()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    found = run_uncached(open_source(tmp_path).module, ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
