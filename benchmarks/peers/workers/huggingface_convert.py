"""A Hugging Face folder of float32 weights that transformers 4.57 and 5 read alike: GGUF_OR_FOLDER OUT."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source, out = map(Path, sys.argv[1:])
where: dict[str, Path | str] = {"pretrained_model_name_or_path": source}
if source.is_file():
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
config = loaded.config
if hasattr(config, "quantization_config"):  # of the GGUF file, not of what is written
    del config.quantization_config
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
model.load_state_dict(loaded.state_dict())
model.generation_config = loaded.generation_config
model.save_pretrained(out)
AutoTokenizer.from_pretrained(**where).save_pretrained(out)

# transformers 5 writes the base of rotary positions where 4.57 does not look, and a class that it does not know.
content = json.loads((out / "config.json").read_text(encoding="utf-8"))
theta = (content.get("rope_parameters") or {}).get("rope_theta")
if theta is not None:
    (out / "config.json").write_text(json.dumps({"rope_theta": theta} | content, indent=2), encoding="utf-8")
file = out / "tokenizer_config.json"
content = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
file.write_text(json.dumps(content, indent=2), encoding="utf-8")
