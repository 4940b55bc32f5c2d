"""Text in, text out: a bundle, its engine and its tokenizer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack, overload

import numpy as np
import numpy.typing as npt

from pastkey.bundle import Bundle, open_bundle
from pastkey.errors import InputError

from .batching.memory import CacheMemory
from .batching.prefix_store import PREFIX_BYTES, PrefixStore
from .batching.scheduler import MAX_ROWS, Scheduler
from .batching.shared_prefill import SharedPrefill
from .completion import Completion, completed
from .constraints.lazy import LazyVocabulary
from .draft_model import DraftModel
from .engine.engine import Engine
from .engine.golden import require_golden
from .generation_config import sampling_defaults
from .many import StreamMany, all_completed, several, token_ids
from .opening import open_prompt
from .scoring import Score, logits_by_chunk, score
from .session import Session
from .settings import (
    GENERATE_OPTIONS,
    ChatOptions,
    GenerateOptions,
    PlacementOptions,
    require_known,
)
from .stream import Stream
from .text.codec import TextCodec

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from .asynchronous import AsyncStream
    from .chat import Chat
    from .text.tools import Tool


_log = logging.getLogger("pastkey")


class LanguageModel:
    """A loaded bundle. Any number of threads, streams and sessions may use it at the same time.

    Each call has a cache of its own. Calls that run at the same time are decoded together where the graph allows that,
    and take turns step by step where it does not; no text depends on who else is there. (In int8 the last bits of the
    logits do, so that a near tie may fall otherwise.) A stream that nobody reads holds nobody up.

    Attributes:
        bundle: The bundle, with its absolute path.
        manifest: What the bundle says of itself.
        tokenizer: Its tokenizer, or None for a bundle that has none.
        max_batch: How many generations are decoded in one run, at most.
        scheduler: Who runs the steps.
        memory: What the caches may take.
        vocabulary: What constraints see of the tokenizer.
        draft: Its draft model, or None.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_memory: int | None = None,
        prefix_bytes: int = PREFIX_BYTES,
        max_batch: int = MAX_ROWS,
        draft: DraftModel | None = None,
        temporary: Callable[[], object] | None = None,
        **placement: Unpack[PlacementOptions],
    ) -> None:
        """See `load`. `temporary` removes the bundle's folder, which is unpacked for this model alone."""
        # Read again later, wherever the process has gone by then.
        self.bundle = dataclasses.replace(bundle, path=bundle.path.absolute())
        self.manifest = bundle.manifest
        self.tokenizer = None if bundle.tokenizer is None else TextCodec.from_file(bundle.tokenizer)
        self.vocabulary = LazyVocabulary(self.tokenizer, self.manifest.vocab_size, self.manifest.eos_token_ids)
        limits = {"max_memory": max_memory, "prefix_bytes": prefix_bytes, "max_batch": max_batch}
        self._settings = {**limits, "draft": draft, **placement}
        self._temporary = temporary
        self.holds: object = None  # what lives as long as the model
        self._engine: Engine | None = Engine(bundle, **placement)
        require_golden(self._engine, bundle)
        graph, most = self._engine.graph, prefix_bytes if max_memory is None else min(prefix_bytes, max_memory)
        self.draft = draft
        stores = [PrefixStore(graph, most)] if draft is None else draft.attach(self, most)
        self.scheduler = Scheduler(graph, stores[-1], max_batch)
        self.max_batch = max_batch
        self.memory = CacheMemory(graph, stores, max_memory)
        self._executor: ThreadPoolExecutor | None = None
        _log.debug("loaded %s on %s with %d threads", self.bundle.path, self._engine.providers, self._engine.threads)

    def __repr__(self) -> str:
        closed = "" if self._engine is not None else ", closed"
        return f"<LanguageModel {self.bundle.path} ({self.manifest.precision}{closed})>"

    @property
    def sampling_defaults(self) -> ChatOptions:
        """How its authors would have it sampled, by the generation_config.json of what was exported.

        Options to pass on: `lm.generate(prompt, **lm.sampling_defaults)`. Nothing but `pastkey chat` uses them unasked.
        Empty where the authors named none. Raises IntegrityError where one is out of range.
        """
        return sampling_defaults(self.bundle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._engine is None

    def close(self) -> None:
        """Lets go of the weights and of all caches. Generations that run end within one step; later calls raise."""
        self._engine = None
        self.scheduler.close()
        if self.draft is not None:
            self.draft.close()
        if self._executor is not None:
            self._executor.shutdown(wait=False)
        if self._temporary is not None:
            self._temporary()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process loads the bundle again, by its path."""
        if self._temporary is not None:
            raise InputError("a model that was unpacked cannot be given to another process: load it there")
        return _load_again, (self.bundle.path, self._settings)

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

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of them, too
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
            prompt: A text, or a sequence of token ids (T,); or a sequence of these, which are decoded together.
            progress: Of several continuations, is told how many are done, and how many there are, after each.
            n: So many continuations of each prompt, which share its prefill; each draws by a seed of its own, the first
                one by `seed`. They are a list, also of one prompt.
            **options: How the continuation is made. docs/sampling.md has the settings of the sampler in their order.

                - `max_new_tokens` (int, 64): At most so many new tokens. The end of the context may come first.
                - `temperature` (float, 0): 0 takes the likeliest token. Above 0 tokens are drawn: 1 from the model's
                  own distribution, less from a sharper one.
                - `top_k` (int, 0): Draws from the k likeliest tokens; 0 from all.
                - `top_p` (float, 1): Draws from the fewest likeliest tokens that have this probability together.
                - `min_p` (float, 0): Drops tokens of less than this share of the likeliest one's probability.
                - `typical_p` (float, 1): Draws from the tokens nearest to the entropy that have this probability.
                - `top_n_sigma` (float, -1): Draws from logits within so many standard deviations of the largest.
                - `xtc_probability` (float, 0): How often all but the least likely of the top choices are dropped.
                - `xtc_threshold` (float, 0.1): The probability from which on a token is a top choice.
                - `repetition_penalty` (float, 1): Above 1, tokens of the text, the prompt's too, become less likely.
                - `presence_penalty` (float, 0): Off the logits of tokens that the text has, the prompt's too.
                - `frequency_penalty` (float, 0): Off them for each time.
                - `penalty_last_n` (int, -1): How many tokens these three look back; -1 for all.
                - `no_repeat_ngram_size` (int, 0): No sequence of so many tokens comes twice.
                - `dry_multiplier` (float, 0): DRY, a penalty on prolonging a repetition; 0 for none.
                - `dry_base` (float, 1.75): By which it grows with each token of the repetition.
                - `dry_allowed_length` (int, 2): The length from which on a repetition has it.
                - `dry_penalty_last_n` (int, -1): How many tokens it looks back; -1 for all.
                - `dry_sequence_breakers` (list of texts, or of lists of ids): What no repetition reaches across.
                - `min_new_tokens` (int, 0): No EOS token before so many new tokens.
                - `logit_bias` (mapping of ids to numbers, None): Added to their logits.
                - `suppress_tokens` (list of ids, none): They never come.
                - `bad_words` (list of texts, none): They never come, as the tokenizer writes them.
                - `bad_words_ids` (list of lists of ids, none): They never come.
                - `forced_decoder_ids` (list of pairs, none): At that place among the new tokens comes that id.
                - `forced_eos_token_id` (int or None, None): Comes where `max_new_tokens` would end the text.
                - `logits_processor` (function or list of functions, none): Of (ids (T,), logits (V,)), arrays of numpy,
                  to new logits (V,). It runs within the step, which waits for it.
                - `seed` (int or None, None): The same seed draws the same tokens; None draws afresh.
                - `logprobs` (int or None, None): The log-probabilities of each new token and of so many likeliest ones.
                - `prompt_logprobs` (bool, False): Those of the prompt's tokens, too; then no prefix is reused.
                - `stop` (str or a sequence of str, none): Texts that end the continuation, which ends before them.
                - `reuse_prefix` (bool, False): What the prompt shares with the beginning of an earlier one and its
                  continuation is not computed again; this text is kept for later calls. In int8 the text may be another
                  one, as likely, where the shared part was generated.
                - `exact` (bool, False): With `reuse_prefix`, computes anew what a prefill did not compute: what was
                  generated. Then an int8 text does not depend on what the cache held.
                - `timeout` (float or None, None): Seconds from the first step on. Then it ends within one step, with
                  the finish_reason "deadline" and what was generated.
                - `prompt_lookup` (bool, True): Where the text repeats itself, several draft tokens are run in one step,
                  and those that the sampler chooses are accepted. In int8 a near tie may fall otherwise.
                - `draft` (bool, as loaded): Elsewhere the model's draft model drafts, where that pays.
                - `keep_special_tokens` (bool, False): The text shows special tokens, too, up to the EOS token.
                - `json_schema` (JSON schema, None): The text is JSON that it validates. At most one of these four.
                - `regex` (str, None): The text matches it.
                - `choices` (list of texts, None): The text is one of them.
                - `grammar` (str, None): The text follows it, in Lark's notation.

        Returns:
            The continuation, with its ids and figures; of several prompts a list of them in the same order, each as
            that of a call of its own; with `n`, those of a prompt one after another.

        Raises:
            InputError: The prompt is empty, too long, or has no tokens; an option is out of range; the model is closed.
            OptionError: There is no option of that name.
            NumericsError: The model yields NaN or infinity.
            ResourceError: The cache would take more than `max_memory`.
        """
        require_known("generate", options, GENERATE_OPTIONS)
        if several(prompt) or n is not None:
            prompts = prompt if several(prompt) else [prompt if isinstance(prompt, str) else self.prompt_ids(prompt)]  # type: ignore[arg-type]
            return all_completed(StreamMany(self._stream, prompts, options, self.max_batch, n), progress)
        return completed(self._stream(prompt, options))  # type: ignore[arg-type]

    def stream_many(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], n: int | None = None, **options: Unpack[GenerateOptions]
    ) -> StreamMany:
        """Continues several prompts at the same time, token by token.

        Args:
            prompts: Texts, or sequences of token ids (T,).
            n: So many continuations of each, as in `generate`: the places of a prompt's follow one another.
            **options: As in `generate`, for each.

        Returns:
            An iterator of pairs: the place of a prompt, and the next Chunk of its continuation. `completions` is the
            list of those that have ended, by place, and the value of StopIteration.

        Raises:
            InputError: There is no prompt, or as in `generate`.
            OptionError: There is no option of that name.
        """
        require_known("stream_many", options, GENERATE_OPTIONS)
        return StreamMany(self._stream, prompts, options, self.max_batch, n)

    def astream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> AsyncStream:
        """As `stream`, for `async for`. A task that is cancelled ends it within one step."""
        require_known("astream", options, GENERATE_OPTIONS)
        from .asynchronous import AsyncStream

        return AsyncStream(self._stream(prompt, options), self.executor)

    async def agenerate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Completion:
        """As `generate` of one prompt, for `await`. A task that is cancelled ends it within one step."""
        require_known("agenerate", options, GENERATE_OPTIONS)
        from .asynchronous import AsyncStream

        return await AsyncStream(self._stream(prompt, options), self.executor).completed()

    @property
    def executor(self) -> ThreadPoolExecutor:
        """The threads that wait for the tokens of an event loop. They begin with the first such call."""
        self.require_open()
        from concurrent.futures import ThreadPoolExecutor

        if self._executor is None:
            self._executor = ThreadPoolExecutor(self.max_batch, thread_name_prefix="pastkey")
        return self._executor

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

    def chat(
        self,
        system: str | None = None,
        *,
        template: str | Path | None = None,
        tools: Sequence[Tool] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        special_tokens_as_text: bool = False,
        **template_variables: Any,
    ) -> Chat:
        """Begins a conversation.

        A TemplateWarning says what the template leaves out of what is given here.

        Args:
            system: What the model is told before all else.
            template: The path of a chat template (Jinja, UTF-8) to take in place of the bundle's own.
            tools: What the model may call: JSON schemas {"type": "function", "function": {"name", "description",
                "parameters"}}, or Python functions with type hints and a docstring in Google's style.
            documents: What it may answer from, as the template reads them: mostly {"title", "text"}.
            special_tokens_as_text: What a content, a tool or a document writes is encoded as ordinary characters, so
                that a user who writes <|im_end|> ends no message.
            **template_variables: What else the template reads: `enable_thinking=False`, say.

        Raises:
            InputError: The bundle has no tokenizer or no chat template, or the template cannot be used, or takes no
                system text; or a tool cannot be described.
            OptionError: A variable that the conversation gives to the template itself.
            MissingFileError: There is no file at `template`.
            MissingExtraError: jinja2 is not installed.
        """
        from .chat import Chat  # which stands on much that a text alone does not need

        return Chat(
            self,
            system,
            template=template,
            tools=tools,
            documents=documents,
            special_tokens_as_text=special_tokens_as_text,
            template_variables=template_variables,
        )

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
        tokens = token_ids(ids, "ids", "a sequence of token ids", self.manifest.vocab_size)
        return np.concatenate(list(logits_by_chunk(self, tokens)))

    def score(self, text: str | Sequence[int]) -> Score:
        """The log-probability of each token of a text, and their sum.

        Args:
            text: A text, which the tokenizer encodes with its own BOS token, or token ids (T,), at least one.

        Raises:
            InputError: It is empty, or longer than the context; or the model is closed.
            NumericsError: The model yields NaN or infinity.
        """
        return score(self, self.prompt_ids(text))

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids that a prompt is fed as.

        Args:
            prompt: A text, which the tokenizer encodes with its own BOS token, or token ids, which stay as they are.

        Raises:
            InputError: It is neither, several of them, a text without tokens, or a text for a bundle without tokenizer.
        """
        if not isinstance(prompt, str):
            return token_ids(prompt, "the prompt", "a text or a sequence of token ids", self.manifest.vocab_size)
        if self.tokenizer is None:
            raise InputError("this bundle has no tokenizer: give the prompt as token ids (--prompt-ids 1,2,3)")
        return self.tokenizer.encode(prompt)

    def _stream(
        self, prompt: str | Sequence[int], options: GenerateOptions, shared: SharedPrefill | None = None
    ) -> Stream:
        """Checks everything, and gives the stream."""
        return open_prompt(self, prompt, options, shared)


def _load_again(path: Path, settings: dict[str, Any]) -> LanguageModel:
    return LanguageModel(open_bundle(path), **settings)
