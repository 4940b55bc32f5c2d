"""Text in, text out: a bundle, its engine and its tokenizer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Self, Unpack

import numpy as np
import numpy.typing as npt

from pastkey.bundle import Bundle, open_bundle
from pastkey.errors import InputError
from pastkey.values import is_int, is_number

from .batching.memory import CacheMemory
from .batching.prefix_store import PREFIX_BYTES, PrefixStore
from .batching.scheduler import MAX_ROWS, Scheduler
from .chat import Chat
from .completion import Completion, completed
from .engine.engine import Engine
from .engine.golden import require_golden
from .generate import Generation
from .session import Session
from .settings import (
    GENERATE_OPTIONS,
    MAX_NEW_TOKENS,
    Choice,
    GenerateOptions,
    PlacementOptions,
    SamplingConfig,
    SessionOptions,
    require_known,
)
from .stream import Stream
from .text.codec import StopStrings, TextCodec, TextStream


def load(
    path: str | Path,
    providers: Choice | Sequence[Choice] | None = None,
    threads: int | None = None,
    verify: bool | None = None,
    *,
    allow_fallback: bool = False,
    session_entries: Mapping[str, str] | None = None,
) -> LanguageModel:
    """Opens a bundle.

    Args:
        path: The folder that `pastkey export` wrote.
        providers: Execution providers in order of preference, by short names ("cuda") or onnxruntime's, each alone or
            as a pair with its options. None takes the one that the bundle was made for. One that is not on this
            machine is an error.
        threads: Number of threads within an operator. None takes the physical cores.
        verify: True hashes every file again, False no file, None those that changed since they were hashed last.
        allow_fallback: Whether the processor may run what a provider that was asked for leaves. Without it a provider
            that was seen to run a whole graph runs all of this one, or is an error that names the operators; of any
            other one a FallbackWarning names them.
        session_entries: Settings of onnxruntime's sessions: {"session.use_env_allocators": "1"}, say.

    Raises:
        MissingFileError: There is no bundle at `path`.
        IntegrityError: A file is missing, truncated or altered, or onnxruntime cannot load it.
        ProviderError: A provider is unknown, not on this machine, does not start, or leaves a part of the graph.
        MissingExtraError: onnxruntime is not installed, or older than the bundle needs.
        InputError: An argument has another type, or `threads` is out of range.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path is {path!r}; the path of a bundle folder was expected, as a str or a Path")
    if threads is not None and not is_int(threads):
        raise InputError(f"threads is {threads!r}; a whole number was expected, or None for the physical cores")
    if not (providers is None or _is_choice(providers)) and not (
        isinstance(providers, Collection) and all(map(_is_choice, providers))
    ):
        raise InputError(
            f'providers is {providers!r}; a name such as "cuda", a pair of a name and its options, or a list of these '
            "was expected"
        )
    if session_entries is not None and not (
        isinstance(session_entries, Mapping)
        and all(isinstance(part, str) for item in session_entries.items() for part in item)
    ):
        raise InputError(
            f'session_entries is {session_entries!r}; a mapping of texts such as {{"session.use_env_allocators": "1"}} '
            "was expected"
        )
    return LanguageModel(
        open_bundle(path, verify=verify),
        providers=providers,
        threads=threads,
        allow_fallback=allow_fallback,
        session_entries=session_entries,
    )


class LanguageModel:
    """A loaded bundle. Any number of threads, streams and sessions may use it at the same time.

    Each call has a cache of its own. Calls that run at the same time are decoded together where the graph allows that,
    and take turns step by step where it does not; no text depends on who else is there. (In int8 the last bits of the
    logits do, so that a near tie may fall otherwise.) A stream that nobody reads holds nobody up.

    Attributes:
        bundle: The bundle, with its absolute path.
        manifest: What the bundle says of itself.
        tokenizer: Its tokenizer, or None for a bundle that has none.
        scheduler: Who runs the steps.
        memory: What the caches may take.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_memory: int | None = None,
        prefix_bytes: int = PREFIX_BYTES,
        max_batch: int = MAX_ROWS,
        **placement: Unpack[PlacementOptions],
    ) -> None:
        """See `load`."""
        # Read again later, wherever the process has gone by then.
        self.bundle = dataclasses.replace(bundle, path=bundle.path.absolute())
        self.manifest = bundle.manifest
        self.tokenizer = None if bundle.tokenizer is None else TextCodec.from_file(bundle.tokenizer)
        self._placement = placement
        self._engine: Engine | None = Engine(bundle, **placement)
        require_golden(self._engine, bundle)
        store = PrefixStore(self._engine.graph, prefix_bytes if max_memory is None else min(prefix_bytes, max_memory))
        self.scheduler = Scheduler(self._engine.graph, store, max_batch)
        self.memory = CacheMemory(self._engine.graph, store, max_memory)

    def __repr__(self) -> str:
        closed = "" if self._engine is not None else ", closed"
        return f"<LanguageModel {self.bundle.path} ({self.manifest.precision}{closed})>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the weights and of all caches. Generations that run end within one step; later calls raise."""
        self._engine = None
        self.scheduler.close()

    def require_open(self) -> Engine:
        """An engine over the graph, for what it says of itself. Raises InputError where the model is closed."""
        if self._engine is None:
            raise InputError("this model is closed: load it again with pastkey.load()")
        return self._engine

    def new_engine(self) -> Engine:
        """One with an empty cache over the model's graph."""
        return Engine.over(self.require_open().graph)

    def session(self) -> Session:
        """Begins a text that stays: what is appended and generated is computed once.

        Raises InputError where the model is closed.
        """
        return Session(self)

    def load_session(self, path: str | Path) -> Session:
        """A session that `Session.save` wrote.

        Raises:
            MissingFileError: There is no such file.
            IntegrityError: It was cut or altered, or saved by another bundle.
            InputError: The model is closed.
        """
        from .session_file import read_session

        engine = self.new_engine()
        ids = read_session(Path(path), self.bundle, engine)
        self.memory.promise(engine, len(ids))
        return Session(self, ids, engine)

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Completion:
        """Continues one prompt.

        Args:
            prompt: A text, or a sequence of token ids (T,).
            **options: How the continuation is made.

                - `max_new_tokens` (int, 64): At most so many new tokens. The end of the context may come first.
                - `temperature` (float, 0): 0 takes the likeliest token. Above 0 tokens are drawn: 1 from the model's
                  own distribution, less from a sharper one.
                - `top_k` (int, 0): Draws from the k likeliest tokens; 0 from all.
                - `top_p` (float, 1): Draws from the fewest likeliest tokens that have this probability together.
                - `min_p` (float, 0): Drops tokens of less than this share of the likeliest one's probability.
                - `repetition_penalty` (float, 1): Above 1, tokens of the prompt and of the text so far become less
                  likely.
                - `seed` (int or None, None): The same seed draws the same tokens; None draws afresh.
                - `stop` (str or a sequence of str, none): Texts that end the continuation, which ends before them.
                - `reuse_prefix` (bool, False): What the prompt shares with the beginning of an earlier one and its
                  continuation is not computed again; this text is kept for later calls. In int8 the text may be another
                  one, as likely, where the shared part was generated.
                - `exact` (bool, False): With `reuse_prefix`, computes anew what was not computed by a prefill: the tokens
                  that were generated. Then an int8 text does not depend on what the cache held.
                - `timeout` (float or None, None): Seconds from the first step on. Then it ends within one step, with
                  the finish_reason "deadline" and what was generated.
                - `prompt_lookup` (bool, True): Where the text repeats itself, several draft tokens are run in one step,
                  and those that the sampler chooses are accepted. In int8 a near tie may fall otherwise.

        Returns:
            The continuation, with its ids and figures.

        Raises:
            InputError: The prompt is empty, too long, or has no tokens; an option is out of range; the model is closed.
            OptionError: There is no option of that name.
            NumericsError: The model yields NaN or infinity.
            ResourceError: The cache would take more than `max_memory`.
        """
        require_known("generate", options, GENERATE_OPTIONS)
        return completed(self._stream(prompt, options))

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Stream:
        """Continues one prompt token by token.

        What is wrong with the prompt or an option is raised by this call. Nothing is computed before the first `next`.

        Args:
            prompt: As in `generate`.
            **options: As in `generate`.

        Returns:
            An iterator of a Chunk for each new token, whose texts together are the completion's. The Completion is its
            `completion` at the end, and the value of StopIteration, or of `yield from`.

        Raises:
            InputError: As in `generate`.
            OptionError: There is no option of that name.
            NumericsError: The model yields NaN or infinity.
        """
        require_known("stream", options, GENERATE_OPTIONS)
        return self._stream(prompt, options)

    def chat(self, system: str | None = None, *, template: str | Path | None = None) -> Chat:
        """Begins a conversation.

        Args:
            system: What the model is told before all else.
            template: The path of a chat template (Jinja, UTF-8) to take in place of the bundle's own.

        Raises:
            InputError: The bundle has no tokenizer or no chat template, or the template cannot be used.
            MissingFileError: There is no file at `template`.
            MissingExtraError: jinja2 is not installed.
        """
        return Chat(self, system, template=template)

    def logits(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """The logits of every position of a text, from an empty cache of its own.

        Args:
            ids: Token ids (T,), at least one.

        Returns:
            Logits (T, V). Row t predicts the token after `ids[t]`.

        Raises:
            InputError: `ids` are empty, out of range or longer than the context; or the model is closed.
            NumericsError: The model yields NaN or infinity.
        """
        engine = self.new_engine()
        tokens = engine.checked(self._token_ids(ids, "ids", "a sequence of token ids"), 1)
        found: list[npt.NDArray[np.float32]] = []
        for chunk in np.split(tokens, np.cumsum(engine.chunk_sizes(tokens.size))[:-1]):
            self.scheduler.exclusively(lambda chunk=chunk: found.append(engine.all_logits(chunk)))  # type: ignore[misc]
        return np.concatenate(found)

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids that a prompt is fed as.

        Args:
            prompt: A text, which the tokenizer encodes with its own BOS token, or token ids, which stay as they are.

        Raises:
            InputError: It is neither, several of them, a text without tokens, or a text for a bundle without tokenizer.
        """
        if not isinstance(prompt, str):
            return self._token_ids(prompt, "the prompt", "a text or a sequence of token ids")
        if self.tokenizer is None:
            raise InputError("this bundle has no tokenizer: give the prompt as token ids (--prompt-ids 1,2,3)")
        return self.tokenizer.encode(prompt)

    def _token_ids(self, given: object, name: str, expected: str) -> list[int]:
        if isinstance(given, np.ndarray):
            given = given.tolist()
        no_list = isinstance(given, str | bytes | bytearray | memoryview | Mapping | Set)
        if no_list or not isinstance(given, Iterable):
            advice = ": decode it first" if isinstance(given, bytes | bytearray | memoryview) else ""
            raise InputError(f"{name} is {given!r:.60}; {expected} was expected{advice}")
        tokens = list(given)
        odd = [token for token in tokens if not is_int(token)]
        if odd and all(isinstance(token, str | Sequence | np.ndarray) for token in tokens):
            raise InputError(f"several prompts were given; one at a time is taken, {expected}: call this once for each")
        if odd:
            raise InputError(
                f"{name} holds {odd[0]!r:.60}; token ids are whole numbers from 0 to {self.manifest.vocab_size - 1}"
            )
        return [int(token) for token in tokens]

    def _stream(self, prompt: str | Sequence[int], options: GenerateOptions) -> Stream:
        """Checks everything, and gives the stream."""
        self.require_open()
        reuse, exact = options.get("reuse_prefix", False), options.get("exact", False)

        def provide(generation: Generation) -> tuple[Engine, int]:
            engine, shared = self.scheduler.store.take(generation.ids, reuse=reuse, exact=exact)
            self.memory.promise(engine, generation.most_tokens)
            return engine, shared

        def retired(generation: Generation) -> None:
            engine = generation.engine
            self.memory.release(engine)
            if not generation.begun:
                return
            # Moving out of the memory that it shares with others is worth it where a later call may ask for it.
            keep = generation.error is None and (reuse or not self.scheduler.shares_memory(engine))
            self.scheduler.move_out(engine, keep=keep)
            if keep and self._engine is not None:
                self.scheduler.store.put(engine, reuse=reuse)

        after_text = isinstance(prompt, str) and bool(prompt.strip())
        return self.begin(self.prompt_ids(prompt), options, after_text, provide, retired)

    def begin(
        self,
        ids: Sequence[int],
        options: GenerateOptions | SessionOptions,
        after_text: bool,
        provide: Callable[[Generation], tuple[Engine, int]],
        retired: Callable[[Generation], None],
        starting: Callable[[Generation], None] | None = None,
    ) -> Stream:
        """A stream behind `ids`, whose first step comes with its first `next`.

        Args:
            ids: The whole text so far, (T,).
            options: Checked names, and values to check.
            after_text: Whether the new text goes on from a text.
            provide: See Generation.
            retired: See Generation.
            starting: See Generation.
        """
        stop = options.get("stop", ())
        stops = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
        if any(not isinstance(text, str) or not text for text in stops):
            raise InputError(f"stop is {stop!r}; texts of at least one character were expected")
        if stops and self.tokenizer is None:
            raise InputError("this bundle has no tokenizer, so that no stop string can be found in what it generates")
        timeout = options.get("timeout")
        if timeout is not None and not (is_number(timeout) and timeout > 0):
            raise InputError(f"timeout is {timeout!r}; a number of seconds above 0 was expected, or None")
        generation = Generation(
            self.require_open(),
            ids,
            max_new_tokens=options.get("max_new_tokens", MAX_NEW_TOKENS),
            end_ids=self.manifest.eos_token_ids,
            sampling=SamplingConfig.of(options),
            prompt_lookup=options.get("prompt_lookup", True),
            timeout=timeout,
            driver=self.scheduler,
            provide=provide,
            retired=retired,
            starting=starting,
        )
        text = None if self.tokenizer is None else TextStream(self.tokenizer, after_text=after_text)
        return Stream(generation, text, StopStrings(stops), self.scheduler.wake)


def _is_choice(value: object) -> bool:
    """Whether it names one execution provider, with options or without."""
    if isinstance(value, tuple) and len(value) == 2:
        return isinstance(value[0], str) and isinstance(value[1], dict)
    return isinstance(value, str)
