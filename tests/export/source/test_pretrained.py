"""Hugging Face folders and models as users bring them: the bundle writes what transformers writes."""

from __future__ import annotations

import json
import socket
from typing import NoReturn

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.contract import names
from pastkey.errors import ContextLengthError
from pastkey.export import export
from pastkey.export.graft.probe.observe import run_uncached
from pastkey.export.source.open import open_source
from pastkey.export.source.pretrained import open_model
from pastkey.export.source.source import Opening
from pastkey.runtime import load
from pastkey.runtime.text.chat_template import ChatTemplate

from ..tiny_llama import CONTEXT, PROMPT, TEMPLATE, TRANSFORMERS_4, bpe, greedy, llama, sizes

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
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert open_source(saved_llama).context_length == CONTEXT


def test_a_context_length_is_found_under_every_name(tmp_path, word_tokenizer):
    """ALiBi needs no table of positions: BLOOM's class has none of the names, and its folders have seq_length."""
    config = transformers.BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    file = tmp_path / names.CONFIG
    plain = json.loads(file.read_text())

    def found(context_length: int | None = None, **settings: int) -> tuple[int, tuple[str, ...]]:
        file.write_text(json.dumps(plain | settings))
        source = open_source(tmp_path, Opening(context_length=context_length))
        return source.context_length, source.warnings

    told = f"the configuration of {tmp_path.name} names no context length: it gets 2,048 tokens; --context N changes it"
    assert found() == (2048, (told,))
    assert found(300) == (300, ())
    for name in ("seq_length", "max_seq_len", "n_ctx"):
        assert found(**{name: 24}) == (24, ())
    with pytest.raises(ContextLengthError, match="--context 25 is more than the 24 tokens"):
        found(25, seq_length=24)
    for longest, expected in ((int(1e30), 2048), (20, 20)):
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=word_tokenizer, model_max_length=longest, eos_token="<end>"
        ).save_pretrained(tmp_path)
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
    file = llama_folder / names.GENERATION_CONFIG
    file.write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [7, 5], **stated}))
    source = open_source(llama_folder)
    assert source.generation == carried
    assert (source.bos_token_id, source.eos_token_ids) == (0, (7, 5))


# --- tokenizer and configuration ----------------------------------------------------------------------------------
def test_the_tokenizer_comes_along(saved_llama, bundle):
    config = json.loads((bundle / names.TOKENIZER_CONFIG).read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["add_bos_token"] is True
    assert config["chat_template"] == TEMPLATE
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
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


def test_every_special_token_that_a_template_may_write_comes_along(llama_folder):
    tokenizer = bpe(bos=True)
    tokenizer.add_special_tokens({"cls_token": tokenizer.bos_token, "sep_token": tokenizer.eos_token})
    tokenizer.chat_template = "{{ cls_token }}{% for m in messages %}{{ m['content'] }}{{ sep_token }}{% endfor %}"
    tokenizer.save_pretrained(llama_folder)
    config = open_source(llama_folder).tokenizer_config
    messages = [{"role": "user", "content": "ab"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert expected == f"{tokenizer.bos_token}ab{tokenizer.eos_token}"
    tokens = {name: token for name, token in config.items() if name.endswith("_token")}
    assert ChatTemplate(config["chat_template"], tokens).render(messages) == expected


def test_templates_with_names_are_written_as_a_list(llama_folder):
    tokenizer = bpe(bos=True)
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "tools: " + TEMPLATE}
    tokenizer.save_pretrained(llama_folder)
    config = open_source(llama_folder).tokenizer_config
    assert config["chat_template"] == [
        {"name": "default", "template": TEMPLATE},
        {"name": "tool_use", "template": "tools: " + TEMPLATE},
    ]
    message = {"role": "user", "content": "Hi"}
    assert ChatTemplate(config["chat_template"][0]["template"]).render([message]) == "<|im_start|>user\nHi"


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


FACTORY = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(**{sizes})

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm = LlamaForCausalLM._from_config(CONFIG, attn_implementation="sdpa")

    def forward(self, input_ids, position_ids):
        return self.lm(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

def bare():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)
"""


def test_a_factory_may_return_a_model_of_transformers(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FACTORY.format(sizes=sizes()))
    source = open_source(f"{file}:bare")
    assert (source.name, source.context_length) == ("LlamaForCausalLM", CONTEXT)


@pytest.mark.skipif(TRANSFORMERS_4, reason="works with transformers 4")
def test_a_module_around_a_model_of_transformers_works_or_is_told_what_to_pass(tmp_path, refusal):
    (tmp_path / "mine.py").write_text(FACTORY.format(sizes=sizes()))
    sentence = refusal(f"{tmp_path / 'mine.py'}:Wrapped", "--context", CONTEXT, "--precision", "fp32")
    assert sentence.endswith("export that model itself, or its folder")
