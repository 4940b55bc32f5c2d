"""The language model: a bundle with its engine and its tokenizer."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack, overload

import numpy as np
import numpy.typing as npt

from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.errors import InputError
from pastkey.values import as_path, or_default

from ..constraints.lazy import LazyVocabulary
from ..decoding.asynchronous import AsyncStream, AsyncStreamMany
from ..decoding.batching.activity import Activity
from ..decoding.batching.cache_budget import CacheMemory
from ..decoding.batching.prefix_cache import PREFIX_BYTES, PrefixStore
from ..decoding.batching.scheduler import MAX_ROWS, Scheduler
from ..decoding.completion import Completion, completed
from ..decoding.many import StreamMany, several
from ..decoding.stream import Stream
from ..engine.engine import Engine
from ..engine.golden import require_golden
from ..options import PlacementOptions, Pooling, lists_options, options_of
from ..settings import GENERATE_OPTIONS, ChatOptions, GenerateOptions
from ..text.codec import TextCodec
from .adapters import AdapterCalls, Adapters
from .chat.calls import ChatCalls
from .chat.prompt import ChatPrompt
from .draft_model import DraftModel
from .embed import embed
from .generation_config import sampling_defaults
from .opening import open_prompt, open_text, read_prompt
from .parts import ModelParts, TextPrompt
from .scoring import Score, logits_by_chunk, score
from .session import Session
from .unpack import TemporaryFolder

if TYPE_CHECKING:
    from concurrent.futures import Executor, ThreadPoolExecutor

    from ..text.tools import Tool
    from .chat.chat import Chat


_log = logging.getLogger("pastkey")


@lists_options
class LanguageModel(ChatCalls, AdapterCalls):
    """A loaded bundle. Any number of threads, streams and sessions may use it at the same time.

    Each call has its own KV cache. Concurrent calls are decoded in one batch where the graph allows it; elsewhere they
    run in turn, step by step. The output of a call does not depend on other calls. (In int8 the last bits of the logits
    do, so of two tokens with almost the same score the other one may be chosen.) An unread stream does not delay other
    calls.

    Attributes:
        bundle: The bundle, with its absolute path.
        manifest: The bundle's manifest.
        tokenizer: Its tokenizer, or None for a bundle without one.
        max_batch: The largest number of requests that are decoded in one step.
        adapters: Its LoRA adapters.
        scheduler: Runs the steps.
        memory: The memory of the caches, and its limit.
        parts: The parts above, which sessions, chat and scores share.
        vocabulary: The tokenizer's vocabulary, as constraints read it.
        draft: Its draft model, or None.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_memory: int | None = None,
        prefix_bytes: int = PREFIX_BYTES,
        max_batch: int = MAX_ROWS,
        max_queue: int | None = None,
        draft: DraftModel | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        temporary: TemporaryFolder | None = None,
        **placement: Unpack[PlacementOptions],
    ) -> None:
        """See `load`. `temporary`: the folder that the bundle was unpacked to for this model only."""
        # An absolute path stays valid if the working directory changes.
        self.bundle = dataclasses.replace(bundle, path=bundle.path.absolute())
        self.manifest = bundle.manifest
        self.tokenizer = None if bundle.tokenizer is None else TextCodec.from_file(bundle.tokenizer)
        self.vocabulary = LazyVocabulary(self.tokenizer, self.manifest.vocab_size, self.manifest.eos_token_ids)
        limits = {"max_memory": max_memory, "prefix_bytes": prefix_bytes, "max_batch": max_batch}
        self._settings = {**limits, "max_queue": max_queue, "draft": draft, **placement}
        self._temporary = temporary
        engine = Engine(bundle, **placement)
        require_golden(engine, bundle)
        graph, most = engine.graph, prefix_bytes if max_memory is None else min(prefix_bytes, max_memory)
        stores = [PrefixStore(graph, most)] if draft is None else draft.attach(graph, most)
        self.draft, self.max_batch = draft, max_batch
        self.scheduler = Scheduler(stores[-1], max_batch, max_queue)
        self.memory = CacheMemory(graph, stores, max_memory)
        self.parts = ModelParts(
            self.bundle, self.tokenizer, self.vocabulary, engine, self.scheduler, self.memory, self.draft
        )
        if draft is not None:
            draft.require_fit(self.parts)
        self.adapters = Adapters(self.parts, placement, adapters or {})
        self._executors: dict[int, ThreadPoolExecutor] = {}  # process id -> its threads
        _log.debug("loaded %s on %s with %d threads", self.bundle.path, graph.providers, graph.threads)

    def __repr__(self) -> str:
        closed = ", closed" if self.closed else ""
        return f"<LanguageModel {self.bundle.path} ({self.manifest.precision}{closed})>"

    @property
    def sampling_defaults(self) -> ChatOptions:
        """The sampling options of the model's authors, from the source's generation_config.json.

        Pass them on: `lm.generate(prompt, **lm.sampling_defaults)`. Only `pastkey chat` and `pastkey serve` use them by
        default. Empty if the authors named none. Raises IntegrityError if one is out of range.
        """
        return sampling_defaults(self.bundle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.parts.scheduler.closed

    def close(self) -> None:
        """Releases the weights and all caches. Running generations end within one step; later calls raise."""
        try:
            self.scheduler.close()
        finally:
            self.adapters.close()
            if self.draft is not None:
                self.draft.close()
            self._executors = {}  # the threads end with the last stream that holds them
            if self._temporary is not None:
                self._temporary.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process loads the bundle by its path."""
        if self._temporary is not None:
            raise InputError("a model that was unpacked cannot be given to another process: load it there")
        return _load_again, (self.bundle.path, {**self._settings, "adapters": self.adapters.folders()})

    def require_open(self) -> Engine:
        """An engine over the graph, for its properties. Raises InputError if the model is closed."""
        return self.parts.require_open()

    @property
    def activity(self) -> Activity:
        """How busy the model is: running and waiting requests, caches, and totals since it was loaded."""
        return self.scheduler.activity()

    @property
    def kernels(self) -> str:
        """The kernels that run the model: "native 0.1.0, avx512" with the level in use, or "onnxruntime 1.32.0"."""
        return self.parts.engine.graph.kernels

    def session(self, adapter: str | None = None) -> Session:
        """Begins a session: a sequence with its own KV cache. Each appended or generated token is computed once.

        `adapter`: the name of a LoRA adapter for it. Raises InputError if the model is closed or has no such adapter.
        """
        return Session(self.parts.adapted(adapter))

    def load_session(self, path: str | Path, adapter: str | None = None) -> Session:
        """Reads a session that `Session.save` wrote. `adapter`: the name of the adapter that it was saved with.

        Raises:
            MissingFileError: There is no such file.
            IntegrityError: It was truncated or altered, or saved by another bundle or with another adapter.
            InputError: The model is closed, or has no such adapter.
        """
        from .session_file import read_session

        engine = (parts := self.parts.adapted(adapter)).new_engine()
        ids = read_session(as_path(path), self.bundle, engine)
        self.memory.promise(engine, len(ids))
        return Session(parts, ids, engine)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str
        self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[int]],
        progress: Callable[[int, int], object] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]: ...
    @overload
    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        progress: Callable[[int, int], object] | None = None,
        *,
        n: int,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        progress: Callable[[int, int], object] | None = None,
        *,
        n: int | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion | list[Completion]:
        """Continues a prompt, or each of several.

        Args:
            prompt: A text, or token ids (T,); or a list of prompts, which are decoded in one batch. Prompts with the
                same first 32 tokens share the prefill of their common prefix.
            progress: For a batch, called after each completion with the number of finished completions and their total.
            n: The number of continuations of each prompt, up to 10,000. They share its prefill. Each has its own seed;
                the first has `seed`. The result is a list, also for one prompt.
            **options: docs/output.md explains them.

        Returns:
            The completion; for a batch, a list of completions in the same order, each equal to that of a separate call.
            With `n`, the completions of a prompt are consecutive.

        Raises:
            InputError: The prompt is empty, too long, or has no tokens; an option is out of range; the model is closed.
            OptionError: There is no option of that name.
            NumericsError: The model yields NaN or infinity.
            ResourceError: The cache would need more than `max_memory` bytes.
        """
        given = options_of("generate", options, GENERATE_OPTIONS)
        if several(prompt) or n is not None:
            return completed(self._many(prompt if several(prompt) else [prompt], given, n, progress))
        return completed(open_prompt(self.parts, prompt, given))  # type: ignore[arg-type]

    def stream_many(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]] | Sequence[TextPrompt] | Sequence[ChatPrompt],
        n: int | None = None,
        **options: Unpack[GenerateOptions],
    ) -> StreamMany:
        """Continues a batch of prompts, token by token.

        Args:
            prompts: Texts, sequences of token ids (T,), or conversations that `chat_prompt` made.
            n: The number of continuations of each prompt, as in `generate`. Those of a prompt have consecutive places.
            **options: As in `generate`.

        Returns:
            An iterator of pairs: the place of a prompt and the next Chunk of its continuation. `completions` is the
            list of finished completions, by place. It is also the value of StopIteration.

        Raises:
            InputError: There is no prompt, or as in `generate`.
            OptionError: There is no option of that name.
        """
        given = options_of("stream_many", options, GENERATE_OPTIONS)
        return self._many(prompts, given, n)

    def _many(
        self,
        prompts: Any,
        given: Mapping[str, Any],
        n: int | None,
        progress: Callable[[int, int], object] | None = None,
    ) -> StreamMany:
        read, begin = partial(read_prompt, self.parts, given), partial(open_prompt, self.parts)
        return StreamMany(read, begin, prompts, given, self.max_batch, n, progress)

    def astream_many(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]] | Sequence[TextPrompt] | Sequence[ChatPrompt],
        n: int | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStreamMany:
        """As `stream_many`, for `async for`. Cancelling the task ends it within one step."""
        return AsyncStreamMany(self.stream_many(prompts, n, **options), self.executor)

    def astream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> AsyncStream:
        """As `stream`, for `async for`. Cancelling the task ends it within one step."""
        stream = open_prompt(self.parts, prompt, options_of("astream", options, GENERATE_OPTIONS))
        return AsyncStream(stream, self.executor)

    async def agenerate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Completion:
        """As `generate` of one prompt, for `await`. Cancelling the task ends it within one step."""
        stream = open_prompt(self.parts, prompt, options_of("agenerate", options, GENERATE_OPTIONS))
        return await AsyncStream(stream, self.executor).completed()

    @property
    def executor(self) -> Executor:
        """The threads that wait for tokens on behalf of an event loop. They start at the first asynchronous call."""
        self.require_open()
        from concurrent.futures import ThreadPoolExecutor

        process = os.getpid()  # a fork copies the object but not its threads
        if process not in self._executors:
            self._executors = {process: ThreadPoolExecutor(self.max_batch, thread_name_prefix="pastkey")}
        return self._executors[process]

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Stream:
        """Continues one prompt token by token.

        This call raises errors of the prompt and the options. The first `next` starts the computation.

        Args:
            prompt: As in `generate`.
            **options: As in `generate`.

        Returns:
            An iterator with a Chunk for each new token. Their joined texts are the completion's text. `completion` has
            the Completion at the end; it is also the value of StopIteration, or of `yield from`.

        Raises:
            InputError: As in `generate`.
            OptionError: There is no option of that name.
            NumericsError: The model yields NaN or infinity.
        """
        return open_text(self.parts, prompt, options_of("stream", options, GENERATE_OPTIONS))

    def chat(
        self,
        system: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        template: str | Path | None = None,
        tools: Sequence[Tool] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        special_tokens_as_text: bool | None = False,
        **template_variables: Any,
    ) -> Chat:
        """Begins a conversation.

        A TemplateWarning names the arguments that the template ignores.

        Args:
            system: The system text.
            messages: The conversation so far, in OpenAI's form, the system text first. `ask()` without a text answers a
                question at its end.
            template: The path of a chat template (Jinja, UTF-8) instead of the bundle's.
            tools: The functions that the model may call: JSON schemas {"type": "function", "function": {"name",
                "description", "parameters"}}, or Python functions with type hints and a docstring in Google's style.
            documents: Documents for the answers, in the template's form: mostly {"title", "text"}.
            special_tokens_as_text: Encodes contents, tools and documents as ordinary characters, so that a user's
                <|im_end|> does not end a message.
            **template_variables: Further variables of the template, such as `enable_thinking=False`.

        Raises:
            InputError: The bundle has no tokenizer or chat template; the template is invalid or rejects a system text.
            OptionError: The conversation sets this variable itself.
            MissingFileError: There is no file at `template`.
            MissingExtraError: jinja2 is not installed.
        """
        from .chat.chat import Chat  # imported here: generation without chat does not need it

        return Chat(
            self,
            system,
            messages=messages,
            template=template,
            tools=tools,
            documents=documents,
            special_tokens_as_text=special_tokens_as_text,
            template_variables=template_variables,
        )

    def logits(
        self, ids: Sequence[int] | npt.NDArray[np.integer], adapter: str | None = None
    ) -> npt.NDArray[np.float32]:
        """The logits of every position of a sequence, computed from an empty cache.

        Args:
            ids: Token ids (T,), at least one.
            adapter: The name of a loaded LoRA adapter.

        Returns:
            Logits (T, V) float32. Row t predicts the token after `ids[t]`.

        Raises:
            InputError: `ids` are empty, out of range or longer than the context; or the model is closed.
            NumericsError: The model yields NaN or infinity.
            ResourceError: The cache would need more than `max_memory` bytes.
        """
        return np.concatenate(list(logits_by_chunk(self.parts.adapted(adapter), ids)))

    def score(self, text: str | Sequence[int], adapter: str | None = None) -> Score:
        """The log-probability of each token of a text, and their sum.

        The text is computed like a prompt. In int8 and int4 `generate(logprobs=)` differs by hundredths of a nat: see
        `Score`.

        Args:
            text: A text, which the tokenizer encodes with its BOS token; or token ids (T,), at least one.
            adapter: The name of a loaded LoRA adapter.

        Raises as `logits`.
        """
        return score(self.parts.adapted(adapter), self.parts.prompt_ids(text, "text"))

    def embed(
        self,
        text: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        pooling: Pooling | None = "mean",
        normalize: bool | None = True,
    ) -> npt.NDArray[np.float32]:
        """The embeddings of one text or several: their pooled last hidden states, the input of the output head.

        Args:
            text: As `prompt` in `generate`.
            pooling: "mean" over the tokens, "last" token, or "none": one vector per token, for one text.
            normalize: Scales each vector to length 1.

        Returns:
            Float32 (H,); (N, H) for several texts, in their order; (T, H) with "none".

        Raises:
            InputError: The bundle was exported without `--hidden-states`; or as in `score`.
            NumericsError: The model yields NaN or infinity.
            ResourceError: The cache would need more than `max_memory` bytes.
        """
        return embed(self.parts, text, or_default(pooling, "mean"), normalize=or_default(normalize, True))

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt.

        Args:
            prompt: A text, which the tokenizer encodes with its BOS token; or token ids, which stay unchanged.

        Raises:
            InputError: It is neither; it is a batch; the text has no tokens; or the bundle has no tokenizer.
        """
        return self.parts.prompt_ids(prompt)


def _load_again(path: Path, settings: dict[str, Any]) -> LanguageModel:
    return LanguageModel(open_bundle(path), **settings)
