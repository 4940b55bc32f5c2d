"""Answers rows with one loaded model: the class of the batch command, and of Ray Data and datasets."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np

from pastkey.errors import InputError, MissingExtraError, PastkeyError, first_line
from pastkey.values import as_path, is_collection, or_default, require, shown

from ..decoding.batching.scheduler import MAX_ROWS
from ..decoding.batching.shared_prefill import SHARED_TOKENS, SharedPrefills
from ..decoding.completion import Chunk, Completion
from ..decoding.many import interleaved
from ..decoding.stream import ChunkStream
from ..loading import load
from ..model.chat.prompt import ChatPrompt
from ..model.language_model import LanguageModel
from ..model.opening import open_prompt
from ..model.parts import TextPrompt
from ..options import MAX_NEW_TOKENS, Choice, SessionSettings, lists_options, options_of, require_valid
from ..settings import CHAT_NEW_TOKENS, CHAT_OPTIONS, GENERATE_OPTIONS, ChatOptions, GenerateOptions
from .rows import (
    FIELDS,
    FURTHER,
    Answer,
    Row,
    RowRequest,
    answer_of,
    error_of,
    is_id,
    json_text,
    parse_request,
    seed_of,
)

WINDOW = 1024  # rows that are sorted at once
_HELD = ("json_schema", "regex", "choices", "grammar")  # of which a text follows one

_models: dict[str, LanguageModel] = {}  # those of this process, by their settings
_loading = threading.Lock()


@dataclass(frozen=True)
class _Task:
    row: Row
    request: RowRequest = field(default_factory=RowRequest)
    ids: list[int] = field(default_factory=list)
    options: GenerateOptions | None = None
    chat: ChatPrompt | None = None
    error: Exception | None = None

    @property
    def adapter(self) -> str:
        """The name of the row's adapter, "" for none."""
        return (self.options or {}).get("adapter") or ""


@lists_options
class Generator:
    """Answers batches of rows. It can be pickled, and loads its model once in each process, at the first batch.

        generator = pastkey.Generator("bundle/", max_new_tokens=32)
        generator({"prompt": ["Once upon", "The sky"]})["text"]
        dataset.map(generator, batched=True)  # Hugging Face's datasets
        dataset.map_batches(  # Ray Data
            pastkey.Generator, fn_constructor_kwargs={"bundle": "bundle/"}, batch_size=64, concurrency=2
        )

    The rows of a batch are decoded together, sorted by their beginnings, so that shared prefixes are computed once.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        exact: bool | None = False,
        template: str | Path | None = None,
        max_batch: int | None = MAX_ROWS,
        providers: Choice | Sequence[Choice] | None = None,
        threads: int | None = None,
        allow_fallback: bool | None = False,
        session_options: SessionSettings | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        **options: Unpack[ChatOptions],
    ) -> None:
        """Checks the options. The first batch loads the model.

        Args:
            bundle: The folder that `pastkey export` wrote, or a zip file of it, as a path of the process that loads it.
            exact: Decodes one row at a time. An int8 text then depends on its row only, as a float32 text always does.
                Otherwise the other rows of the step may decide between two tokens of almost the same score.
            template: The path of a chat template instead of the bundle's.
            max_batch: The largest number of rows that are decoded in one step.
            providers: As in `load`.
            threads: As in `load`.
            allow_fallback: As in `load`.
            session_options: As in `load`.
            adapters: As in `load`. A row's `adapter` names one of them.
            **options: As in `LanguageModel.generate`, for all rows. A column or field with an option's name overrides
                it. `max_new_tokens` is 64, and 512 for an answer to messages. Each row draws by a seed made of `seed`
                (0) and its id.

        Raises:
            InputError: An option is out of range.
            OptionError: There is no option of that name.
        """
        self.options = options_of("Generator", options, CHAT_OPTIONS)
        exact = or_default(exact, False)
        as_path(bundle, "bundle", "the path of a bundle")
        self.bundle, self.exact, self.template = bundle, exact, template
        self._load: dict[str, Any] = {
            "providers": providers,
            "threads": threads,
            "allow_fallback": allow_fallback,
            "session_options": session_options,
            "max_batch": 1 if exact else max_batch,
            "adapters": None if adapters is None else dict(adapters),
        }
        require_valid({**self._load, "exact": exact})

    def __repr__(self) -> str:
        return f"<Generator {self.bundle}>"

    @property
    def model(self) -> LanguageModel:
        """The model, which all generators of this process share that load it alike. Raises as `load` does."""
        with _loading:
            if self._key not in _models or _models[self._key].closed:
                _models[self._key] = load(self.bundle, **self._load)
            return _models[self._key]

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Answers the rows of a batch.

        Args:
            batch: Columns of one length, lists or arrays: `prompt` (texts, or token ids) or `messages`, and any other.
                A row draws by its `id`, or without one by its prompt, so that equal prompts draw equal texts.

        Returns:
            These columns, and lists `text`, `finish_reason`, `prompt_tokens`, `new_tokens` and `error`, of one type in
            each batch. A row that cannot be answered has a sentence in `error`, and "" and 0 in the others. An answered
            row has "" in `error`. `logprobs`, or a column of tools, adds a column of JSON texts.

        Raises:
            InputError: A column has the name of one of these.
            PastkeyError: The model cannot be loaded.
        """
        columns = {str(name): batch[name] for name in batch}
        for name in (*FIELDS, *FURTHER):
            if name in columns:
                raise InputError(f"the batch has the column {name!r}, which the output has for the answer: rename it")
        length = _length(columns)
        rows = [{name: as_python(column[place]) for name, column in columns.items()} for place in range(length)]
        batch_rows = (Row(place, _identity(row), row) for place, row in enumerate(rows))
        found = {row.number: answer for row, answer in self.answers(batch_rows)}
        further = ["logprobs"] * (self.options.get("logprobs") is not None) + ["tool_calls"] * ("tools" in columns)
        answers = [found[place] for place in range(length)]
        made = {name: [as_cell(name, answer.get(name)) for answer in answers] for name in (*FIELDS, *further)}
        return {**columns, **made}

    def answers(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Answer]]:
        """Answers rows, WINDOW of them read ahead. Yields each with its answer, in the order in which they end."""
        model = self.model
        with contextlib.closing(interleaved(self._begun(model, rows), model.max_batch)) as found:
            for task, one in found:
                if not isinstance(one, Chunk):
                    yield task.row, _answer(task, one) if isinstance(one, Completion) else error_of(told(one))

    def close(self) -> None:
        """Lets go of the model, for all generators of this process that share it. The next batch loads it again."""
        with _loading:
            if self._key in _models:
                _models.pop(self._key).close()

    @property
    def _key(self) -> str:
        return repr((Path(self.bundle).absolute(), self._load))

    # --- from rows to streams -----------------------------------------------------------------------------------------
    def _begun(self, model: LanguageModel, rows: Iterable[Row]) -> Iterator[tuple[_Task, ChunkStream | Exception]]:
        """Window by window: errors first, then the streams by the beginnings of their prompts."""
        waiting = iter(rows)
        while window := [self._task(model, row) for row in itertools.islice(waiting, WINDOW)]:
            good = sorted((task for task in window if task.error is None), key=lambda task: (task.adapter, task.ids))
            yield from ((task, task.error) for task in window if task.error is not None)
            for _, group in itertools.groupby(good, key=_beginning):
                tasks = list(group)
                shared = SharedPrefills(task.ids for task in tasks)
                yield from ((task, self._stream(model, task, shared)) for task in tasks)

    def _task(self, model: LanguageModel, row: Row) -> _Task:
        if isinstance(row.content, str):
            return _Task(row, error=InputError(row.content))
        try:
            request = parse_request(row.content)
            options = self._options(request, row.id)
            if request.messages is None:
                assert request.prompt is not None
                return _Task(row, request, model.prompt_ids(request.prompt), options)
            prompt = model.chat_prompt(request.messages, tools=request.tools, template=self.template)
            return _Task(row, request, prompt.ids, options, prompt)
        except Exception as error:
            return _Task(row, error=error)

    def _options(self, request: RowRequest, identity: Any) -> GenerateOptions:
        """The job's settings, the row's own in their place."""
        held = any(name in request.options for name in _HELD)
        usual: dict[str, Any] = {name: value for name, value in self.options.items() if not (held and name in _HELD)}
        options: dict[str, Any] = {
            "max_new_tokens": MAX_NEW_TOKENS if request.messages is None else CHAT_NEW_TOKENS,
            **usual,
            "keep_special_tokens": usual.get("keep_special_tokens", False) or request.tools is not None,
            "seed": seed_of(usual.get("seed") or 0, identity),
            **request.options,
        }
        return cast(GenerateOptions, options)

    def _stream(self, model: LanguageModel, task: _Task, shared: SharedPrefills) -> ChunkStream | Exception:
        """`shared`: the rows that begin alike."""
        text = task.request.prompt
        prompt = task.chat or TextPrompt(task.ids, text if isinstance(text, str) else None)
        try:
            # No generated token of others is reused, so that no text depends on the order.
            options = options_of("generate", {**(task.options or {}), "reuse_prefix": False}, GENERATE_OPTIONS)
            return open_prompt(model.parts, prompt, options, shared)
        except Exception as error:
            return error


def _beginning(task: _Task) -> tuple[str, list[int]]:
    return task.adapter, task.ids[:SHARED_TOKENS]


def _answer(task: _Task, completion: Completion) -> Answer:
    assert task.options is not None
    logprobs = task.options.get("logprobs") is not None
    return answer_of(completion, logprobs=logprobs, tools=task.request.tools is not None)


def told(error: Exception) -> str:
    """An error as the row's own sentence. Raises it where it is everybody's: no memory, no package."""
    if isinstance(error, MissingExtraError | MemoryError):
        raise error
    return str(error) if isinstance(error, PastkeyError) else f"{type(error).__name__}: {first_line(error)}"


def _length(columns: Mapping[str, Any]) -> int:
    """The number of rows. Raises InputError for an invalid column, and for columns of different lengths."""
    for name, column in columns.items():
        require(is_collection(column), f"the column {shown(name)}", column, "a list or an array")
    lengths = {name: len(column) for name, column in columns.items()}
    if len({*lengths.values()}) > 1:
        raise InputError(f"the columns of the batch have the lengths {shown(lengths)}; one length was expected")
    return max(lengths.values(), default=0)


def as_python(value: Any) -> Any:
    """A cell of a table as JSON has it: lists instead of arrays, None instead of NaN."""
    if isinstance(value, np.ndarray | np.generic):
        return as_python(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): as_python(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_python(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def as_text(value: Any) -> str | None:
    """Values without a type in a table, as JSON."""
    return None if value is None else json_text(value)


def as_cell(name: str, value: Any) -> str | int:
    """A field of an answer, never None: libraries choose a column's type by its first batch."""
    if name in FURTHER:
        value = as_text(value)
    found: str | int = (0 if name.endswith("_tokens") else "") if value is None else value
    return found


def _identity(row: Mapping[str, Any]) -> Any:
    found = row.get("id")
    return found if is_id(found) else ["no id", row.get("prompt"), row.get("messages")]
