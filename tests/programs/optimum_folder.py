"""Writes an ONNX folder by optimum: KIND FOLDER. Run in optimum's environment."""

import sys
from pathlib import Path

import torch
import transformers
from optimum.exporters.onnx import main_export

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
OTHERS = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gemma2": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
}

kind, folder = sys.argv[1], Path(sys.argv[2])
torch.manual_seed(0)
config = transformers.AutoConfig.for_model(kind, **SIZES | OTHERS.get(kind, {}))
model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.2)
model.save_pretrained(folder / "model")
main_export(str(folder / "model"), folder / "onnx-folder", task="text-generation-with-past")
