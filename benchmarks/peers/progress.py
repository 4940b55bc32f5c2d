"""What a person sees meanwhile: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from pastkey.command import say

Item = TypeVar("Item")


def steps(items: Sequence[Item], description: str) -> Iterator[Item]:
    """The items, one after another, with a sign of life for each."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=description, dynamic_ncols=True)
        return
    for number, item in enumerate(items, 1):
        say(f"{description}: {number} of {len(items)}")
        yield item
