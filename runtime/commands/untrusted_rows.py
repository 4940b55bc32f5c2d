"""The command batch with --untrusted: rows are answered by a Generator in the process of the bundle."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pastkey.errors import InputError
from pastkey.typed import Natural, parse

from ..batching.scheduler import MAX_ROWS
from ..bulk.answers import Answer, json_text
from ..bulk.generator import Generator, Row
from ..sandbox.limits import Limits
from ..sandbox.model import connect
from ..session_file import bundle_digest
from .rerun import tell_missing

_WINDOW: Final = 256  # rows that the process has at once


# What the process says, by its types.
@dataclass(frozen=True)
class _Digest:
    digest: str


@dataclass(frozen=True)
class _Answered:
    place: Natural  # of the row, in its window
    answer: Mapping[str, Any]


@dataclass(frozen=True)
class _Plain:
    text: str | None
    finish_reason: str | None
    prompt_tokens: Natural | None
    new_tokens: Natural | None
    error: str | None
    logprobs: Any = None
    tool_calls: Any = None


@dataclass(frozen=True)
class _Usage:
    prompt_tokens: Natural
    completion_tokens: Natural
    total_tokens: Natural


@dataclass(frozen=True)
class _Body:
    usage: _Usage | None = None


@dataclass(frozen=True)
class _Response:
    body: _Body


@dataclass(frozen=True)
class _OpenAI:
    response: _Response
    error: Mapping[str, Any] | None


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
        self.digest = self._connection.run("to load", digest_here, _Digest, {"settings": settings}).digest

    def answers(self, rows: Iterable[Row], *, created: int = 0) -> Iterator[tuple[Any, Answer]]:
        """See Generator."""
        waiting = iter(rows)
        together = 1 if self._settings.get("exact") else MAX_ROWS
        while window := list(itertools.islice(waiting, _WINDOW)):
            left = dict(enumerate(window))
            asked = [[row.identity, row.content] for row in window]
            given = {"settings": self._settings, "rows": asked, "created": created}
            seconds = self._connection.seconds * together
            for found in self._connection.results("to answer rows", answer_here, _Answered, given, seconds=seconds):
                if found.place not in left:
                    self._connection.fail("answered a row that was not asked for, and was ended")
                try:
                    answer = _checked(found.answer)
                except InputError as error:
                    self._connection.fail(f"gave an answer that is none ({error}), and was ended")
                yield left.pop(found.place).key, answer
            if left:
                self._connection.fail("left rows without an answer, and was ended")


def _checked(answer: Mapping[str, Any]) -> Answer:
    """An answer whose fields have their types. Raises InputError for anything else."""
    if answer.keys() == {"response", "error"}:
        parse(_OpenAI, answer, further=True)
    else:
        parse(_Plain, answer)
    return dict(answer)


def digest_here(path: Path, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """In the process: loads the bundle."""
    return {"digest": bundle_digest(Generator(path, providers="cpu", **settings).model.bundle)}


def answer_here(
    path: Path, settings: Mapping[str, Any], rows: Sequence[Any], created: int
) -> Iterator[Mapping[str, Any]]:
    """In the process: the answer of each row, with its place in `rows`."""
    generator = Generator(path, providers="cpu", **settings)  # its model is loaded once
    asked = (Row(place, identity, content) for place, (identity, content) in enumerate(rows))
    for place, answer in generator.answers(asked, created=created):
        yield {"place": place, "answer": json.loads(json_text(answer))}  # without NaN
