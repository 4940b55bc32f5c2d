"""The command batch with --untrusted: a Generator in the process of the bundle answers the rows."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pastkey.typed import Natural

from ..bulk.generator import Generator
from ..bulk.rows import FIELDS, Answer, Row, json_text
from ..decoding.batching.scheduler import MAX_ROWS
from ..model.session_file import bundle_digest
from ..sandbox.limits import Limits
from ..sandbox.model import connect
from .rerun import tell_missing

_WINDOW: Final = 256  # rows that the process has at once


# What the process says, by its types.
@dataclass(frozen=True)
class _Answer:
    text: str | None
    finish_reason: str | None
    prompt_tokens: Natural | None
    new_tokens: Natural | None
    error: str | None
    logprobs: Any = None
    tool_calls: Any = None


@dataclass(frozen=True)
class _Answered:
    place: Natural  # of the row, in its window
    answer: _Answer


class SandboxedGenerator:
    """Answers rows as Generator does, by one in a process with limits.

    A row has the time of the limits; rows that are decoded together have the sum of theirs.

    Attributes:
        digest: Tells the bundle from another, as `bundle_digest` does.
    """

    def __init__(self, bundle: str, limits: Limits, **settings: Any) -> None:
        """`settings`: those of Generator, as JSON has them.

        Raises PastkeyError as `load(trust=False)` and Generator do.
        """
        template = settings.get("template")
        if template is not None:
            settings["template"] = template = str(Path(template).absolute())
        self._settings = settings
        opened = connect(bundle, limits, [] if template is None else [template])
        weakref.finalize(self, opened.close)
        self._connection = opened.connection
        tell_missing(self._connection.in_force.missing)
        self.digest = self._connection.run("to load", digest_here, str, {"settings": settings})

    def answers(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Answer]]:
        """See Generator."""
        waiting = iter(rows)
        seconds = self._connection.seconds * (1 if self._settings.get("exact") else MAX_ROWS)
        while window := list(itertools.islice(waiting, _WINDOW)):
            left = dict(enumerate(window))
            given = {"settings": self._settings, "rows": [[row.id, row.content] for row in window]}
            for found in self._connection.results("to answer rows", answer_here, _Answered, given, seconds=seconds):
                if found.place not in left:
                    self._connection.fail("answered a row that was not asked for, and was ended")
                answer = vars(found.answer).items()
                yield left.pop(found.place), {name: part for name, part in answer if name in FIELDS or part is not None}
            if left:
                self._connection.fail("left rows without an answer, and was ended")


def digest_here(path: Path, settings: Mapping[str, Any]) -> str:
    """In the process: loads the bundle."""
    return bundle_digest(Generator(path, providers="cpu", **settings).model.bundle)


def answer_here(path: Path, settings: Mapping[str, Any], rows: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    """In the process: the answer of each row, with its place in `rows`."""
    generator = Generator(path, providers="cpu", **settings)  # its model is loaded once
    for row, answer in generator.answers(Row(place, *row) for place, row in enumerate(rows)):
        yield {"place": row.number, "answer": json.loads(json_text(answer))}  # without NaN
