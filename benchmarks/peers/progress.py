"""What a person sees: a bar on a terminal, plain lines elsewhere, and a sentence where it failed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from pastkey.command import say
from pastkey.errors import PastkeyError

from .engines import EngineError

Item = TypeVar("Item")


def steps(items: Sequence[Item], description: str) -> Iterator[Item]:
    """The items, one after another, with a sign of life for each."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=description, dynamic_ncols=True)
        return
    for number, item in enumerate(items, 1):
        say(f"{description}: {number} of {len(items)}")
        yield item


def exit_status(program: str, work: Callable[[], object]) -> int:
    """Does the work of a benchmark: 0, or 2 for a mistake, 1 for an engine that failed, 130 for an interrupt."""
    try:
        work()
    except PastkeyError as error:
        say(f"{program}: {error}")
        return 2
    except EngineError as error:
        say(f"{program}: {error}")
        return 1
    except KeyboardInterrupt:
        say(f"{program}: interrupted; the same command goes on from here")
        return 130
    return 0
