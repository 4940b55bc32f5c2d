"""Valid content, a little wrong: in its JSON values, in its protobuf and binary counts, in its bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

# Raw JSON, since json.dumps cannot write some of it.
_JSON_VALUES = (
    "null", "true", "false", "0", "-1", "1", "2", "1.5", "-0.0", "1e400", "-1e400", "Infinity", "-Infinity", "NaN",
    "2147483647", "2147483648", "4294967296", "9223372036854775808", "1" + "0" * 400, "1" * 4300, "1" * 5000,
    '""', '"a"', '"\\ud800"', '"\\u0000"', '"../x"', '"/etc/passwd"', '"' + "a" * 5000 + '"', '"{{ 1 }}"', "[]", "{}",
    "[[[[[[]]]]]]", "[" * 90 + "]" * 90, "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "[1, null, true]",
    '{"type": "Replace", "pattern": {"String": ""}, "content": "x"}', '"1.26.0"', '"<u4"', '"F64"', "1e-300",
)  # fmt: skip
_HOLE = "\x00hole\x00"
_NUMBERS = (
    0, 1, 2, 3, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1,
)  # fmt: skip
_TEXTS = (
    "{{", "}}", "{%", "%}", "{% for x in messages %}", "{% endfor %}", "{{ 'a' * 1000000000 }}", "{% macro m() %}",
    "{{ m() }}", "{{ messages[0]['content'] * 10000 }}", "{{ range(10**9) | list }}", "{{ namespace }}", "{# ", " #}",
    "{{ lipsum(n=1000000) }}", "{{ ''.__class__ }}", "{{ messages | tojson(indent=1000000000) }}", "\ud7ff", "\x00",
    "{{ '%1000000000d' % 1 }}", "{% set x = 'ab' %}", "{{ raise_exception('x') }}", "{% if", "((((", "a" * 3000, "\n",
)  # fmt: skip


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    """One to three values, keys or lists of a JSON text."""
    if rng.random() < 0.1:
        return mutate_bytes(rng, content)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, content)
    raw: list[str] = []
    for _ in range(rng.randint(1, 3)):
        value = _changed(rng, value, raw)
    text = json.dumps(value)
    for replacement in raw:
        text = text.replace(json.dumps(_HOLE), replacement, 1)
    return text.encode()


def _changed(rng: random.Random, value: Any, raw: list[str]) -> Any:
    """One place of it, at random, so that deep ones are as likely as those at the top."""
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        found = waiting.pop()
        pairs = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
        for key, inner in pairs:
            places.append((found, key))
            waiting.append(inner)
    if not places or rng.random() < 0.02:
        raw.append(rng.choice(_JSON_VALUES))
        return _HOLE
    where, key = places[rng.randrange(len(places))]
    kind = rng.random()
    if kind < 0.65:
        raw.append(rng.choice(_JSON_VALUES))
        where[key] = _HOLE
    elif kind < 0.75 and isinstance(where[key], int) and not isinstance(where[key], bool):
        where[key] = rng.choice((-1, 1)) * rng.choice(_NUMBERS)
    elif kind < 0.85:
        del where[key]
    elif isinstance(where, dict):
        where[rng.choice(("", "a", "x\ud800"[:1], f"{key}x", "type", "files"))] = where[key]
    else:
        where += where[: rng.choice((1, 5, 500))]
    return value


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flips, cuts, repeats, and counts of four or eight bytes, at one to four places."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(40)))
        place = rng.randrange(min(len(data), rng.choice((16, 64, 256, 1 << 30))))
        kind = rng.randrange(7)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del data[place : place + rng.choice((1, 4, 8, 64, len(data)))]
        elif kind == 3:
            data[place:place] = data[place : place + rng.choice((1, 8, 64, 1024))]
        else:
            size = rng.choice((4, 8))
            number = rng.choice(_NUMBERS) % 256**size
            data[place : place + size] = number.to_bytes(size, "little")
    return bytes(data)


def mutate_text(rng: random.Random, content: bytes) -> bytes:
    """Pieces of templates put in, words doubled or left out, and now and then bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, content)
    text = content.decode("utf-8", "replace")
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(text) + 1)
        kind = rng.randrange(3)
        if kind == 0:
            text = text[:place] + rng.choice(_TEXTS) + text[place:]
        elif kind == 1:
            text = text[:place] + text[place + rng.randrange(1, 30) :]
        else:
            text = text[:place] + text[place : place + rng.randrange(1, 60)] * rng.randrange(2, 20) + text[place:]
    return text.encode()


def mutate_headed(rng: random.Random, content: bytes) -> bytes:
    """safetensors: the JSON of its header with the length mended, or bytes."""
    if rng.random() < 0.3 or len(content) < 8:
        return mutate_bytes(rng, content)
    length = int.from_bytes(content[:8], "little")
    header = mutate_json(rng, content[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + content[8 + length :]
