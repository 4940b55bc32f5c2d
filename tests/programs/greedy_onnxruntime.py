"""Greedy continuations by plain onnxruntime: BUNDLE NEW_TOKENS PROMPT... -> a line of JSON for each prompt."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

bundle, new_tokens, *prompts = sys.argv[1:]
graph = next(Path(bundle, "onnx").glob("model*.onnx"))  # model_quantized.onnx for int8, model.onnx for float32
session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
tokenizer = Tokenizer.from_file(f"{bundle}/tokenizer.json")
end = json.loads(Path(bundle, "generation_config.json").read_text())["eos_token_id"]  # an id, a list, or null
ends = end if isinstance(end, list) else [end]
inputs = {value.name: value for value in session.get_inputs()}
outputs = [value.name for value in session.get_outputs()]
for prompt in prompts:
    prompt_ids = tokenizer.encode(prompt).ids
    ids = list(prompt_ids)
    cache = {}  # empty at first, (1, heads, 0, size)
    for name, value in inputs.items():
        if name.startswith("past"):
            shape = [1, *(size if isinstance(size, int) else 0 for size in value.shape[1:])]
            cache[name] = np.zeros(shape, np.float16 if value.type == "tensor(float16)" else np.float32)
    past = 0
    for _ in range(int(new_tokens)):
        feeds = {
            "input_ids": np.array([ids[past:]]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(past, len(ids))[None],
            **cache,
        }
        results = session.run(outputs, {name: feeds[name] for name in inputs})
        found = dict(zip(outputs, results, strict=True))
        cache = {name: found[name.replace("past_key_values", "present").replace("past_", "present_")] for name in cache}
        past = len(ids)
        ids.append(int(found["logits"][0, -1].argmax()))
        if ids[-1] in ends:
            break
    new = ids[len(prompt_ids) :]
    print(json.dumps({"prompt_ids": prompt_ids, "ids": new, "text": tokenizer.decode(new)}))
