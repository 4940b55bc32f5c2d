"""The command batch with --untrusted: a Generator in the process of the bundle answers the rows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pastkey.command import print_json
from pastkey.errors import InputError, IntegrityError
from pastkey.files.reading import parse_json
from pastkey.typed import Natural, parse

from ..bulk.generator import WINDOW, Generator
from ..bulk.rows import FIELDS, Answer, Row, RowId, is_id, json_text
from ..decoding.batching.scheduler import MAX_ROWS
from ..model.session_file import bundle_digest
from ..sandbox.frames import END, ERROR, LINE, OUT
from ..sandbox.limits import Limits
from ..sandbox.parent import LimitedProcess
from ..sandbox.relay import Printer, limited_arguments
from .flags import generation_of, opening_of

T = TypeVar("T")
_LONGEST: Final = 16_000_000  # bytes of an answer


@dataclass(frozen=True)
class _Bundle:
    """The first line that the process writes."""

    digest: str


@dataclass(frozen=True)
class _Answer:
    """Each further line."""

    id: Any
    text: str | None
    finish_reason: str | None
    prompt_tokens: Natural | None
    new_tokens: Natural | None
    error: str | None
    logprobs: Any = None
    tool_calls: Any = None


class LimitedGenerator:
    """Answers rows as Generator does, by one in a process with limits.

    A row has the time of the limits; rows that are decoded together have the sum of theirs.

    Attributes:
        digest: Tells the bundle from another, as `bundle_digest` does.
    """

    def __init__(self, arguments: argparse.Namespace, limits: Limits) -> None:
        """Starts the process, and waits until the bundle is open. `arguments`: those of the command.

        Raises UntrustedBundleError, and SystemExit with the status of a process that has told why it ends.
        """
        given, readable = limited_arguments(arguments)
        self._seconds = limits.seconds * (1 if arguments.exact else MAX_ROWS)
        self._process = LimitedProcess(
            answer_rows, given, arguments.bundle, limits, prog="pastkey batch", readable=readable
        )
        self._printer, self._written = Printer(self._process), bytearray()
        self._rows: Iterator[Row] = iter(())
        self._open: dict[RowId, Row] = {}
        self._ended = False  # whether all rows were sent
        try:
            bundle = self._next(_Bundle)
            assert bundle is not None
            self.digest = bundle.digest
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process."""
        self._process.close()

    def answers(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Answer]]:
        """See Generator."""
        self._rows = iter(rows)
        self._process.allow(self._seconds)
        while (found := self._next(_Answer)) is not None:
            row = self._open.pop(found.id, None) if is_id(found.id) else None
            if row is None:
                self._process.fail("answered a row that was not asked for, and was ended")
            self._process.allow(self._seconds)
            answer = {name: part for name, part in vars(found).items() if name != "id"}
            yield row, {name: part for name, part in answer.items() if name in FIELDS or part is not None}

    def _next(self, kind: type[T]) -> T | None:
        """The next line that the process writes, which asks for rows meanwhile; None when every row has its answer."""
        whole = b"\n" in self._written
        while True:
            if self._ended and not self._open:
                return None
            if whole:
                break
            frame, content = self._process.next()
            if frame == OUT:
                whole = b"\n" in content
                self._written += content
            elif frame == ERROR:
                self._printer.print(frame, content)
            elif frame == LINE:
                self._send()
            elif frame == END:
                self._printer.finish()
                if status := self._process.status():
                    raise SystemExit(status)
                self._process.fail("left rows without an answer")
            if len(self._written) > _LONGEST:
                self._process.fail(f"gave an answer of more than {_LONGEST:,} bytes, and was ended")
        line, _, self._written = self._written.partition(b"\n")
        try:
            return parse(kind, parse_json(bytes(line), "an answer"), "an answer")
        except (InputError, IntegrityError) as error:
            self._process.fail(f"gave an invalid answer ({error}), and was ended")

    def _send(self) -> None:
        if len(self._open) > WINDOW + MAX_ROWS:
            self._process.fail("asked for more rows than it may hold, and was ended")
        row = next(self._rows, None)
        if row is None:
            self._ended = True
            self._process.send(b"")
        else:
            self._open[row.id] = row
            self._process.send(json.dumps([row.id, row.content]).encode() + b"\n")


def answer_rows(arguments: argparse.Namespace) -> int:
    """In the process: writes the bundle's digest, then an answer to each row that it reads."""
    generator = generator_of(arguments)
    print_json({"digest": bundle_digest(generator.model.bundle)})
    rows = (Row(number, *json.loads(line)) for number, line in enumerate(sys.stdin.buffer))
    for row, answer in generator.answers(rows):
        print(json_text({"id": row.id, **answer}), flush=True)
    return 0


def generator_of(arguments: argparse.Namespace) -> Generator:
    """The generator that answers the rows of the command."""
    settings: dict[str, Any] = {**opening_of(arguments), **generation_of(arguments)}
    return Generator(arguments.bundle, exact=arguments.exact, template=arguments.template, **settings)
