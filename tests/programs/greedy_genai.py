"""Greedy continuations by onnxruntime-genai: BUNDLE NEW_TOKENS PROMPT... -> a line of JSON for each prompt."""

import json
import sys

import onnxruntime_genai

bundle, new_tokens, *prompts = sys.argv[1:]
model = onnxruntime_genai.Model(bundle)
tokenizer = onnxruntime_genai.Tokenizer(model)
tokenizer.update_options(add_special_tokens="true")  # or the BOS token is left out
for prompt in prompts:
    prompt_ids = tokenizer.encode(prompt)
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt_ids) + int(new_tokens))
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt_ids)
    while not generator.is_done():
        generator.generate_next_token()
    ids = generator.get_sequence(0)[len(prompt_ids) :]
    print(json.dumps({"prompt_ids": prompt_ids.tolist(), "ids": ids.tolist(), "text": tokenizer.decode(ids)}))
