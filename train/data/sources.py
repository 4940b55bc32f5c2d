"""From files to documents: text, JSON lines and Parquet, read one after another so that any amount fits into memory."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from pastkey.errors import InputError, MissingFileError, missing_extra
from pastkey.files.folder import decode_text
from pastkey.files.reading import MOST_JSON, reading, require_regular

from ..stories import stories
from ..tokenizer import END_OF_TEXT
from .documents import FIELDS, Document, document_of, parse_line

# Fewer that are read again teach the repeated parts of stories sooner than 20,000 read once.
STORY_COUNT: Final = 7_000
_TEXT = (".txt", ".md")
_LINES = (".jsonl", ".ndjson", ".json")
_PARQUET = (".parquet",)
_COMPRESSED = (".gz", ".zst")
_BLOCK_BYTES = 1 << 20
_LONGEST_BYTES = 16 << 20  # of a text between two END_OF_TEXT; a longer one is cut at a line into several documents
_SHORTEST_LINE_BYTES = 10_000  # minimum size of a corpus of a single line


@dataclass(frozen=True)
class TextSource:
    """One path of --data: its files in order, and its share of the batches."""

    name: str
    files: tuple[Path, ...]
    weight: float | None = None  # None: as much as it has tokens

    def documents(self) -> Iterator[Document]:
        return itertools.chain.from_iterable(map(_documents_of, self.files))


@dataclass(frozen=True)
class Corpus:
    """Sources of documents that can be read repeatedly."""

    name: str
    documents: Callable[[], Iterator[Document]]
    sources: tuple[TextSource, ...] = ()  # empty for the built-in stories
    states: dict[Path, tuple[int, int]] = field(default_factory=dict)  # size and modification time at the beginning

    @property
    def weighted(self) -> list[TextSource]:
        """The sources, if they have weights."""
        return [source for source in self.sources if source.weight is not None]

    def require_unchanged(self) -> None:
        """Raises InputError if a file was written since the corpus was opened: its passes would read different text."""
        for file, state in self.states.items():
            if _state(file) != state:
                raise InputError(f"{file} changed while it was read: start again when nothing writes it")


def story_corpus(seed: int, count: int = STORY_COUNT) -> Corpus:
    """Returns the built-in stories."""
    told = [Document("a story", text) for text in itertools.islice(stories(seed), count)]
    return Corpus("built-in stories", lambda: iter(told))


def open_corpus(data: Sequence[str | Path]) -> Corpus:
    """The corpus of paths: files and folders, each as PATH or PATH=WEIGHT.

    Weights are the shares of the batches; give one to every path or to none. Raises MissingFileError for a path that
    does not exist, InputError for a folder without data and for an invalid weight.
    """
    sources = tuple(map(_source, map(str, data)))
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        other = next(source for source in sources if source.weight is None)
        raise InputError(f"--data {other.name} has no weight and {weighted[0].name} has: give one to each, or to none")
    return Corpus(
        ", ".join(Path(source.name).name or source.name for source in sources),
        lambda: itertools.chain.from_iterable(source.documents() for source in sources),
        sources,
        {file: _state(file) for source in sources for file in source.files},
    )


def _source(text: str) -> TextSource:
    path, equals, weight = text.rpartition("=")
    if Path(text).exists() or not equals:
        return TextSource(text, tuple(_files_of(Path(text))))
    try:
        share = float(weight)
    except ValueError:
        raise MissingFileError(f"no such file or folder: {text}") from None
    if not (share > 0 and math.isfinite(share)):
        raise InputError(f"the weight of --data {text} is {weight}; it must be a positive number")
    return TextSource(path, tuple(_files_of(Path(path))), share)


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        below = sorted(file for file in path.rglob("*") if file.is_file())
        data = [file for file in below if _kind(file) in (*_LINES, *_PARQUET)]  # a README next to it is not data
        found = data or [file for file in below if _kind(file) in _TEXT]
        if not found:
            raise InputError(
                f"the folder {path} has no {' or '.join(_TEXT)} file in it, and no {', '.join((*_LINES, *_PARQUET))}"
            )
        return found
    if not path.exists():
        raise MissingFileError(f"no such file or folder: {path}")
    require_regular(path)  # the corpus is read three times
    return [path]


def _kind(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


# --- formats ------------------------------------------------------------------------------------------------------
def _documents_of(file: Path) -> Iterator[Document]:
    kind = _kind(file)
    if kind in (*_LINES, *_PARQUET):
        place, rows = ("row", _parquet_rows(file)) if kind in _PARQUET else ("line", _json_rows(file))
        documents = (document_of(row, f"{file}, {place} {number}") for number, row in rows)
    else:
        documents = (Document(str(file), text) for text in _texts(file))
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise InputError(f"{file} is empty: remove it, or write it again")


def _texts(file: Path) -> Iterator[str]:
    """Yields the texts between END_OF_TEXT."""
    end, buffer, offset = END_OF_TEXT.encode(), b"", 0
    with _opened(file) as stream:
        while block := stream.read(_BLOCK_BYTES):
            *whole, buffer = (buffer + block).split(end)
            for content in whole:
                yield from _text(content, file, offset)
                offset += len(content) + len(end)
            while len(buffer) > _LONGEST_BYTES:
                cut = _last_line(buffer)
                yield from _text(buffer[:cut], file, offset)
                buffer, offset = buffer[cut:], offset + cut
    yield from _text(buffer, file, offset)


def _last_line(buffer: bytes) -> int:
    """Where to cut: behind the last line, else behind the last space, else before the last character."""
    for mark in (b"\n", b" "):
        if cut := buffer.rfind(mark) + 1:
            return cut
    cut = len(buffer) - 1
    while cut > len(buffer) - 4 and buffer[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _text(content: bytes, file: Path, offset: int) -> Iterator[str]:
    if text := decode_text(content, file, offset).strip():
        yield text


def _json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    with _opened(file) as stream:
        for number in itertools.count(1):
            line = stream.readline(MOST_JSON + 1)
            if not line:
                return
            place = f"{file}, line {number}"
            if len(line) > MOST_JSON:
                raise InputError(f"{place} has more than {MOST_JSON:,} bytes: expected one JSON object a line")
            text = decode_text(line, place).strip()
            if text:
                yield number, parse_line(text, place)


def _parquet_rows(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None
    with reading(file, "a Parquet file"), pyarrow.parquet.ParquetFile(file) as table:
        known = [name for name in table.schema_arrow.names if name in FIELDS] or None  # None: all, for the sentence
        rows = (row for batch in table.iter_batches(1000, columns=known) for row in batch.to_pylist())
        yield from enumerate(rows, 1)


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """Opens a file, decompressed."""
    require_regular(file)
    suffix = file.suffix.lower()
    with reading(file, f"a {suffix} file" if suffix in _COMPRESSED else "text"):
        if suffix == ".gz":
            with gzip.open(file) as stream:
                yield stream
        elif suffix == ".zst":
            try:
                import pyarrow
            except ModuleNotFoundError as error:
                raise missing_extra(error) from None
            with pyarrow.input_stream(os.fspath(file), compression="zstd") as native:
                yield io.BufferedReader(native)
        else:
            with file.open("rb") as stream:
                yield stream


# --- survey -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Survey:
    """The facts of one pass over a corpus."""

    documents: int
    fingerprint: str
    size: int  # UTF-8 bytes of all documents
    masked: bool  # whether a document has parts that are not trained


def survey(corpus: Corpus) -> Survey:
    """Counts the documents and hashes them. Raises InputError for an empty or one-line corpus."""
    digest = hashlib.sha256()
    count = lines = size = 0
    masked = False
    for document in corpus.documents():
        content = document.canonical()
        digest.update(len(content).to_bytes(8, "little") + content)
        count += 1
        size += len(content)
        masked |= document.masked
        if lines < 2 and not document.masked:
            lines += sum(1 for line in content.splitlines() if line.strip())
    if count == 0:
        raise InputError(f"{corpus.name} is empty: a decoder needs text to learn from")
    if lines < 2 and not masked and size < _SHORTEST_LINE_BYTES:
        raise InputError(f"{corpus.name} holds a single line of {size} bytes: a decoder needs more text to learn from")
    return Survey(count, digest.hexdigest(), size, masked)
