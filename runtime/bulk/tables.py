"""Files of rows: JSON lines, and Parquet. Each is read row by row, and written again with the answers beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from pastkey.errors import InputError, PastkeyError, first_line, missing_extra
from pastkey.reading import MOST_JSON, parse_json, reading, require_regular

from .answers import Answer, json_text, openai_error, openai_row
from .generator import as_text
from .requests import FIELDS, FURTHER, RowId, form_of, row_id

SUFFIX = ".parquet"
_MAGIC = b"PAR1"
_BATCH = 1024  # rows of a Parquet file in memory


@dataclass(frozen=True)
class Entry:
    """One row of a file.

    Attributes:
        number: Of its line, or of its row in Parquet, from 1.
        id: By which it is known.
        content: The row, or what is wrong with its line.
    """

    number: int
    id: RowId
    content: dict[str, Any] | str


class Table(Protocol):
    """A file of rows."""

    def entries(self) -> Iterator[Entry]:
        """Its rows in order. Raises IntegrityError for a file that is damaged as a whole."""

    def write(self, file: IO[bytes], rows: Callable[[Entry], Answer | None], further: Sequence[str]) -> None:
        """Writes those rows for which there is an answer, in order.

        Args:
            file: Open for writing.
            rows: The answer of a row.
            further: Which of FURTHER some answer has.
        """


def open_table(path: Path) -> Table:
    """A file of rows, by its first bytes.

    Raises:
        MissingFileError: There is no such file.
        InputError: It is no regular file, or a Parquet file with columns that cannot be.
        MissingExtraError: It is a Parquet file, and pyarrow is not installed.
    """
    require_regular(path)
    with path.open("rb") as file:
        begin = file.read(len(_MAGIC))
    return ParquetTable(path) if begin == _MAGIC or path.suffix == SUFFIX else JsonLines(path)


class JsonLines:
    """A JSON object in each line. Empty lines are none."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def entries(self) -> Iterator[Entry]:
        with self._path.open("rb") as file:
            for number, line in enumerate(_lines(file), 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                content = self._parsed(line, number)
                yield Entry(number, row_id(content if isinstance(content, dict) else None, number), content)

    def _parsed(self, line: bytes, number: int) -> dict[str, Any] | str:
        where = f"line {number} of {self._path}"
        if len(line) > MOST_JSON:
            return f"{where} has more than {MOST_JSON:,} bytes: no row does"
        try:
            content = parse_json(line, where)
        except PastkeyError as error:
            return str(error)
        return content if isinstance(content, dict) else f"{where} holds no object: a row was expected"

    def write(
        self,
        file: IO[bytes],
        rows: Callable[[Entry], Answer | None],
        further: Sequence[str],  # noqa: ARG002 - each line has its own
    ) -> None:
        openai = False  # as the row before a line that is none
        for entry in self.entries():
            if isinstance(entry.content, dict):
                openai = form_of(entry.content) != "plain"
            answer = rows(entry)
            if answer is None:
                continue
            if openai:
                answer = answer if isinstance(entry.content, dict) else openai_error(entry.id, entry.content)
                row = openai_row(entry.id, answer)
            else:
                row = {"id": entry.id} if _lacks_id(entry) else {}
                row |= {**(entry.content if isinstance(entry.content, dict) else {}), **answer}
            file.write(json_line(row))


def _lacks_id(entry: Entry) -> bool:
    return not isinstance(entry.content, dict) or entry.id not in (
        entry.content.get("id"),
        entry.content.get("custom_id"),
    )


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line."""
    return json_text(row, separators=(",", ":")).encode() + b"\n"


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines, of which none takes much more memory than the longest that is read."""
    while line := file.readline(MOST_JSON + 2):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(1 << 20)):
            pass
        yield line


class ParquetTable:
    """A Parquet file with a column `prompt` or `messages`, and columns of ids and settings where there are any."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _reading(path):
            self._schema = _parquet().read_schema(path)
        names = self._schema.names
        if not {"prompt", "messages"} & set(names):
            raise InputError(f'{path} has the columns {", ".join(names)[:200]}; "prompt" or "messages" was expected')
        for name in (*FIELDS, *FURTHER):
            if name in names:
                raise InputError(f"{path} has the column {name!r}, which the output has for the answer: rename it")

    def entries(self) -> Iterator[Entry]:
        for _, entries in self._batches():
            yield from entries

    def _batches(self) -> Iterator[tuple[Any, list[Entry]]]:
        number = 0
        with _reading(self._path), _parquet().ParquetFile(self._path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                rows = batch.to_pylist()
                places = range(number + 1, number + 1 + len(rows))
                yield batch, [Entry(n, row_id(row, n, "row"), row) for n, row in zip(places, rows, strict=True)]
                number += len(rows)

    def write(self, file: IO[bytes], rows: Callable[[Entry], Answer | None], further: Sequence[str]) -> None:
        import pyarrow

        types = dict.fromkeys((*FIELDS, *further), pyarrow.string())
        types |= dict.fromkeys(("prompt_tokens", "new_tokens"), pyarrow.int64())
        schema = self._schema
        lacks_id = not {"id", "custom_id"} & set(schema.names)
        if lacks_id:
            types = {"id": pyarrow.string(), **types}
        for name, kind in types.items():
            schema = schema.append(pyarrow.field(name, kind))
        with _parquet().ParquetWriter(file, schema) as writer:
            for batch, entries in self._batches():
                answers = [rows(entry) for entry in entries]
                kept = [place for place, answer in enumerate(answers) if answer is not None]
                chosen = batch.take(pyarrow.array(kept, pyarrow.int64()))
                found = [{"id": entries[place].id, **(answers[place] or {})} for place in kept]
                added = [pyarrow.array([_cell(row, name) for row in found], kind) for name, kind in types.items()]
                writer.write_batch(pyarrow.RecordBatch.from_arrays([*chosen.columns, *added], schema=schema))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """As `reading`; pyarrow says of damaged bytes that they are an OSError, too, which has no number."""
    with reading(path, "a Parquet file"):
        try:
            yield
        except OSError as error:
            if error.errno is not None:
                raise
            raise ValueError(first_line(error)) from error


def _cell(row: Mapping[str, Any], name: str) -> Any:
    return as_text(row.get(name)) if name in FURTHER else row.get(name)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None
    return pyarrow.parquet
