"""The likeliest next token of each position but the last, one decoding step each: BUNDLE, and texts of ids as JSON."""

import json
import sys

from pastkey.contract.bundle import open_bundle
from pastkey.runtime.engine.engine import Engine

engine = Engine(open_bundle(sys.argv[1]))
found = []
for text in json.loads(sys.argv[2]):
    engine.reset()
    found.append([int(engine.decode(token).argmax()) for token in text[:-1]])
print(json.dumps(found))
