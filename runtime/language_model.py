"""Text in, text out: a bundle, its engine and its tokenizer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt

from pastkey.bundle import Bundle, open_bundle
from pastkey.errors import InputError
from pastkey.values import is_int

from .completion import Chunk, Completion, completed
from .engine.engine import Engine
from .engine.golden import require_golden
from .generate import Generation
from .generation_config import sampling_defaults
from .settings import (
    GENERATE_OPTIONS,
    MAX_NEW_TOKENS,
    ChatOptions,
    Choice,
    GenerateOptions,
    PlacementOptions,
    SamplingConfig,
    require_known,
)
from .text.codec import StopStrings, TextCodec, TextStream
from .turns import Turns

if TYPE_CHECKING:
    from .chat import Chat
    from .text.tools import Tool


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
    """A loaded bundle. It generates one continuation at a time, and several threads may use it.

    They take turns, in order of arrival. `generate`, `stream`, `logits` and a Chat's answers each have the model from
    their first step to their end; who comes meanwhile waits. Threads that shall not wait load the bundle once for each.

    A stream takes nothing until its first `next`, and lets go at its end, when it is closed, and when it is collected.
    It belongs to no thread: each `next` may come from another thread of a pool, as in a web framework. (A pool needs a
    thread for each stream that is open, since those that wait occupy one.) The thread that was the last to advance a
    stream counts for two things only. When it has ended and others wait, the stream loses its turn, and going on with
    it raises InputError. When it asks for the model itself before the stream's end, it would wait for itself: unless
    another thread goes on with the stream within three seconds, it gets an InputError, and at once where there is no
    other thread. Finish or close the stream first.

    Attributes:
        bundle: The bundle, with its absolute path.
        manifest: What the bundle says of itself.
        tokenizer: Its tokenizer, or None for a bundle that has none.
    """

    def __init__(
        self,
        bundle: Bundle,
        **placement: Unpack[PlacementOptions],
    ) -> None:
        """See `load`."""
        # Read again later, wherever the process has gone by then.
        self.bundle = dataclasses.replace(bundle, path=bundle.path.absolute())
        self.manifest = bundle.manifest
        self.tokenizer = None if bundle.tokenizer is None else TextCodec.from_file(bundle.tokenizer)
        self._placement = placement
        self._engine = Engine(bundle, **placement)
        require_golden(self._engine, bundle)
        self._all_logits: Engine | None = None
        self._turns = Turns()

    def __repr__(self) -> str:
        return f"<LanguageModel {self.bundle.path} ({self.manifest.precision})>"

    @property
    def sampling_defaults(self) -> ChatOptions:
        """How its authors would have it sampled, by the generation_config.json of what was exported.

        Options to pass on: `lm.generate(prompt, **lm.sampling_defaults)`. Nothing but `pastkey chat` uses them unasked.
        Empty where the authors named none. Raises IntegrityError where one is out of range.
        """
        return sampling_defaults(self.bundle)

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
                - `reuse_prefix` (bool, False): What the prompt shares with the beginning of the last prompt and its
                  continuation is not computed again. In int8 the text may be another one, as likely.
                - `prompt_lookup` (bool, True): Where the text repeats itself, several draft tokens are run in one step,
                  and those that the sampler chooses are accepted. In int8 a near tie may fall otherwise.
                - `keep_special_tokens` (bool, False): The text shows special tokens, too, up to the EOS token.

        Returns:
            The continuation, with its ids and figures.

        Raises:
            InputError: The prompt is empty, too long, or has no tokens; an option is out of range; or this thread
                holds a stream that is not at its end.
            OptionError: There is no option of that name.
            NumericsError: The model yields NaN or infinity.
        """
        require_known("generate", options, GENERATE_OPTIONS)
        return completed(self._stream(prompt, options))

    def stream(
        self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]
    ) -> Generator[Chunk, None, Completion]:
        """Continues one prompt token by token.

        What is wrong with the prompt or an option is raised by this call. The model is taken at the first `next`.

        Args:
            prompt: As in `generate`.
            **options: As in `generate`.

        Yields:
            A Chunk for each new token. Their texts together are the completion's.

        Returns:
            The Completion, as the value of StopIteration, or of `yield from`.

        Raises:
            InputError: As in `generate`, or the stream has lost its turn.
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
        """The logits of every position of a text, by one uncached pass.

        The first call opens the bundle's graph for this, which holds the weights once more.

        Args:
            ids: Token ids (T,), at least one.

        Returns:
            Logits (T, V). Row t predicts the token after `ids[t]`.

        Raises:
            InputError: `ids` are empty, out of range or longer than the context; or this thread holds a stream that is
                not at its end.
            NumericsError: The model yields NaN or infinity.
        """
        tokens = self._token_ids(ids, "ids", "a sequence of token ids")
        with self._turns.take():
            if self._all_logits is None:
                self._all_logits = Engine(self.bundle, graph="all_logits", **self._placement)
                self._all_logits.one_by_one = self._engine.one_by_one
            self._all_logits.reset()
            logits: npt.NDArray[np.float32] = self._all_logits.forward(self._all_logits.checked(tokens, 1)[None])[0]
            return logits

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

    def _stream(self, prompt: str | Sequence[int], options: GenerateOptions) -> Generator[Chunk, None, Completion]:
        """Checks everything, and gives the generator."""
        stop = options.get("stop", ())
        stops = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
        if any(not isinstance(text, str) or not text for text in stops):
            raise InputError(f"stop is {stop!r}; texts of at least one character were expected")
        if stops and self.tokenizer is None:
            raise InputError("this bundle has no tokenizer, so that no stop string can be found in what it generates")
        generation = Generation(
            self._engine,
            self.prompt_ids(prompt),
            max_new_tokens=options.get("max_new_tokens", MAX_NEW_TOKENS),
            end_ids=self.manifest.eos_token_ids,
            sampling=SamplingConfig.of(options),
            reuse_prefix=options.get("reuse_prefix", False),
            prompt_lookup=options.get("prompt_lookup", True),
        )
        after_text = isinstance(prompt, str) and bool(prompt.strip())
        keep = options.get("keep_special_tokens", False)
        codec = self.tokenizer
        text = None if codec is None else TextStream(codec, after_text=after_text, keep_special_tokens=keep)
        return self._chunks(generation, text, StopStrings(stops))

    def _chunks(
        self, generation: Generation, text: TextStream | None, stops: StopStrings
    ) -> Generator[Chunk, None, Completion]:
        texts: list[str] = []
        ids: list[int] = []
        with self._turns.take() as turn:
            for token in generation:
                ids.append(token)
                texts.append("" if text is None else stops.push(text.push(token)))
                yield Chunk(texts[-1], [token])
                if stops.found is not None:
                    break
                turn.resume()
        if text is not None:
            texts.append(stops.push(text.flush()) + stops.flush())
            if texts[-1]:
                yield Chunk(texts[-1], [])
        reason = generation.finish_reason if stops.found is None else "stop_string"
        assert reason is not None, "the generation ended without a reason"
        return Completion(
            "".join(texts),
            ids,
            reason,
            generation.prompt_tokens,
            generation.new_tokens,
            generation.prefill_seconds,
            generation.decode_seconds,
            generation.reused_tokens,
            stops.found,
        )


def _is_choice(value: object) -> bool:
    """Whether it names one execution provider, with options or without."""
    if isinstance(value, tuple) and len(value) == 2:
        return isinstance(value[0], str) and isinstance(value[1], dict)
    return isinstance(value, str)
