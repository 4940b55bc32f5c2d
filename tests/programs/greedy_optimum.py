"""Greedy continuations by optimum: BUNDLE NEW_TOKENS PROMPT... -> a line of JSON for each prompt."""

import json
import sys
from pathlib import Path

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

bundle, new_tokens, *prompts = sys.argv[1:]
graph = next(Path(bundle, "onnx").glob("model*.onnx")).name  # model_quantized.onnx for int8, model.onnx for float32
tokenizer = AutoTokenizer.from_pretrained(bundle)
model = ORTModelForCausalLM.from_pretrained(bundle, subfolder="onnx", file_name=graph)
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=int(new_tokens), do_sample=False)
    prompt_ids = inputs["input_ids"][0].tolist()
    ids = output[0, len(prompt_ids) :].tolist()
    print(json.dumps({"prompt_ids": prompt_ids, "ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True)}))
