"""A tiny Llama of transformers with a tokenizer, and the text that transformers writes with it. Needs transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
VOCABULARY, CONTEXT = 300, 80
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
# transformers 4 does not read the field of 5.
ROPE: dict[str, Any] = (
    {"rope_theta": 50000.0} if TRANSFORMERS_4 else {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
)
PROMPT = [5, 17, 256, 80, 3, 41]


def sizes(**others: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None,
    } | ROPE | others  # fmt: skip


def llama(**others: Any) -> Any:
    """Weights large enough that its greedy text is no single repeated token."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes(**others))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.2)
    return model


def bpe(*, bos: bool) -> Any:
    """A byte-level tokenizer of VOCABULARY ids; `bos` puts <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["Once upon a time there was a little girl, and once again."] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def greedy(model: Any, count: int) -> list[int]:
    """The text that transformers itself writes, with its own cache."""
    settings = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
    ids = torch.tensor([PROMPT])
    found = model.float().generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return found[0, len(PROMPT) :].tolist()
