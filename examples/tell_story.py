"""Streams a story from a bundle: the whole of what an application needs, and no torch.

python examples/tell_story.py demo/int8
"""

import sys

import pastkey

lm = pastkey.load(sys.argv[1])
for chunk in lm.stream("", max_new_tokens=200, temperature=0.7, seed=1):
    print(chunk.text, end="", flush=True)
heavy = [name for name in ("torch", "onnx", "transformers") if name in sys.modules]
print(f"\n\n(told by a process that imported {', '.join(heavy) or 'neither torch nor onnx nor transformers'})")
