"""Held to a JSON schema beside free: seconds per token, in interleaved rounds.

    python -m benchmarks.constrained BUNDLE

The ratio is the free generation's time per token over the constrained one's, prompt and all, with prompt lookup on and
off: above 1, the constrained one is faster. A pattern that allows every text shows what the mask alone costs.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import pastkey
from pastkey.runtime import Completion, LanguageModel

ROUNDS = 9
PROMPT = "Anna Smith from Berlin wrote by email, again: she wants twelve apples. The same as JSON:\n"
FIELDS: dict[str, Any] = {
    "name_of_the_customer": {"type": "string", "maxLength": 30},
    "shipping_address_city": {"type": "string", "maxLength": 20},
    "preferred_contact_method": {"enum": ["email", "telephone", "post"]},
    "number_of_items_ordered": {"type": "integer", "minimum": 0, "maximum": 99},
    "is_returning_customer": {"type": "boolean"},
}
SCHEMA = {"type": "object", "properties": FIELDS, "required": [*FIELDS], "additionalProperties": False}
ANYTHING = r"[\s\S]*"


def per_token(done: Completion) -> float:
    return (done.prefill_seconds + done.decode_seconds) / done.new_tokens


def ratios(lm: LanguageModel, kinds: list[dict[str, Any]], most: int, rounds: int) -> list[float]:
    """The first kind's seconds per token over the second's, in each round."""
    for kind in kinds:
        lm.generate(PROMPT, max_new_tokens=most, **kind)
    found = []
    for number in range(rounds):
        seconds = [0.0, 0.0]
        for place in (0, 1) if number % 2 else (1, 0):
            seconds[place] = per_token(lm.generate(PROMPT, max_new_tokens=most, **kinds[place]))
        found.append(seconds[0] / seconds[1])
    return found


def measure(lm: LanguageModel, rounds: int = ROUNDS) -> tuple[Completion, dict[str, list[float]]]:
    """A whole answer by the schema, and what is compared -> the ratio of each round."""
    whole = lm.generate(PROMPT, json_schema=SCHEMA, max_new_tokens=300)
    off: dict[str, Any] = {"prompt_lookup": False}
    pairs: dict[str, list[dict[str, Any]]] = {
        "free / JSON schema": [{}, {"json_schema": SCHEMA}],
        "free without prompt lookup / JSON schema": [off, {"json_schema": SCHEMA}],
        "free / any text by a mask, no prompt lookup": [off, off | {"regex": ANYTHING}],
    }
    return whole, {name: ratios(lm, kinds, whole.new_tokens, rounds) for name, kinds in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    whole, compared = measure(pastkey.load(parser.parse_args().bundle))
    print(f"{whole.text}\n{whole.forced_tokens} of {whole.new_tokens} tokens could be no others")
    for name, found in compared.items():
        print(f"{name}: {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
