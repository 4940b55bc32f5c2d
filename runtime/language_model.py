"""Text in, text out: a bundle, its session and its tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pastkey.bundle import Bundle, open_bundle
from pastkey.errors import InputError

from .generate import Generation
from .providers import Choice
from .session import Session
from .settings import MAX_NEW_TOKENS, SamplingConfig
from .text import StopStrings, TextCodec, TextStream

if TYPE_CHECKING:
    from .chat import Chat


@dataclass(frozen=True)
class Chunk:
    """A piece of a stream: one token, or the text that was held back at the end."""

    text: str  # whole characters only; "" while a character or a stop string is incomplete
    ids: list[int]


@dataclass(frozen=True)
class Completion:
    """One continuation."""

    text: str  # "" without a tokenizer; without the stop string that ended it
    ids: list[int]  # the new tokens, end token excluded; with those of the stop string
    finish_reason: Literal["stop", "length", "stop_string"]  # end token; max_new_tokens or context; stop string
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    reused_tokens: int = 0  # of the prompt's, those whose keys and values were in the cache already


def load(
    path: str | Path,
    providers: Choice | Sequence[Choice] | None = None,
    threads: int | None = None,
    verify: bool | None = None,
) -> LanguageModel:
    """Opens a bundle.

    `providers` are execution providers in order of preference, as short names ("cuda") or onnxruntime's; None takes
    the one the bundle was made for. `threads` is the number of threads within an operator, None for the physical
    cores. `verify=True` hashes the files again, False leaves hashes alone, None trusts what it saw unchanged.
    Raises MissingFileError, IntegrityError, ProviderError or InputError.
    """
    bundle = open_bundle(path, verify=verify)
    return LanguageModel(bundle, providers=providers, threads=threads)


def completed(stream: Generator[Chunk, None, Completion]) -> Completion:
    """What a stream returns at its end."""
    while True:
        try:
            next(stream)
        except StopIteration as end:
            completion: Completion = end.value
            return completion


class LanguageModel:
    """A loaded bundle. Generates one continuation at a time.

    `generate` and `logits` may be called by several threads, which take turns; threads that shall not wait load the
    bundle once for each. A stream that is not at its end when another generation begins ends with an InputError.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        providers: Choice | Sequence[Choice] | None = None,
        threads: int | None = None,
    ) -> None:
        """See `load`."""
        # Read again later, wherever the process has gone by then.
        self.bundle = dataclasses.replace(bundle, path=bundle.path.absolute())
        self.manifest = bundle.manifest
        self.tokenizer = None if bundle.tokenizer is None else TextCodec.from_file(bundle.tokenizer)
        self._options: dict[str, Any] = {"providers": providers, "threads": threads}
        self.session = Session(bundle, **self._options)
        self._common: Session | None = None

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = SamplingConfig.temperature,
        top_k: int = SamplingConfig.top_k,
        top_p: float = SamplingConfig.top_p,
        min_p: float = SamplingConfig.min_p,
        repetition_penalty: float = SamplingConfig.repetition_penalty,
        stop: str | Sequence[str] = (),
        seed: int | None = SamplingConfig.seed,
        reuse_prefix: bool = False,
        lookahead: bool = True,
    ) -> Completion:
        """Continues `prompt`, a text or token ids. See SamplingConfig for how tokens are chosen.

        With `reuse_prefix`, what the prompt shares with the beginning of the last one and its continuation is not
        computed again. With `lookahead`, where the text repeats itself, several tokens are tried in one step, and those
        stay that the sampler chooses from the logits of each. Both may differ in the last bits from a token a step: in
        int8 that can be another text, as likely, and lookahead=False gives the same one every time.
        Raises InputError for a prompt that is empty, too long or has no tokens, and for settings out of range;
        NumericsError when the model yields NaN or infinity.
        """
        with self.session.lock:
            return completed(
                self.stream(
                    prompt,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    min_p=min_p,
                    repetition_penalty=repetition_penalty,
                    stop=stop,
                    seed=seed,
                    reuse_prefix=reuse_prefix,
                    lookahead=lookahead,
                )
            )

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: str | Sequence[str] = (),
        reuse_prefix: bool = False,
        lookahead: bool = True,
        **sampling: Any,
    ) -> Generator[Chunk, None, Completion]:
        """Yields a Chunk for each new token as it comes; takes what `generate` takes, and returns its Completion.

        The texts of the chunks together are the completion's.
        """
        stops = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
        if any(not isinstance(text, str) or not text for text in stops):
            raise InputError(f"stop is {stop!r}; texts of at least one character were expected")
        if stops and self.tokenizer is None:
            raise InputError("this bundle has no tokenizer, so that no stop string can be found in what it generates")
        generation = Generation(
            self.session,
            self.prompt_ids(prompt),
            max_new_tokens=max_new_tokens,
            end_ids=self.manifest.eos_token_ids,
            sampling=SamplingConfig(**sampling),
            reuse_prefix=reuse_prefix,
            lookahead=lookahead,
        )
        after_text = isinstance(prompt, str) and bool(prompt.strip())
        return self._stream(generation, StopStrings(stops), after_text)

    def chat(self, system: str | None = None) -> Chat:
        """A new conversation by the bundle's chat template, told `system` first. See Chat for what it raises."""
        from .chat import Chat

        return Chat(self, system)

    def logits(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Logits (T, V) of every position of `ids` (T,), by one uncached pass."""
        with self.session.lock:
            if self._common is None:
                self._common = Session(self.bundle, graph="common", **self._options)
            self._common.reset()
            logits: npt.NDArray[np.float32] = self._common.forward(self._common.checked(ids, 1)[None])[0]
            return logits

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids that a prompt is fed as. Raises InputError for a text without tokens, or without a tokenizer."""
        if not isinstance(prompt, str):
            if not isinstance(prompt, Iterable):
                raise InputError(f"the prompt is {prompt!r}; a text or a sequence of token ids was expected")
            return list(prompt)
        if self.tokenizer is None:
            raise InputError("this bundle has no tokenizer: give the prompt as token ids (--prompt-ids 1,2,3)")
        return self.tokenizer.encode(prompt)

    def _stream(
        self, generation: Generation, stops: StopStrings, after_text: bool
    ) -> Generator[Chunk, None, Completion]:
        text = None if self.tokenizer is None else TextStream(self.tokenizer, after_text=after_text)
        texts: list[str] = []
        ids: list[int] = []
        for token in generation:
            ids.append(token)
            texts.append("" if text is None else stops.push(text.push(token)))
            yield Chunk(texts[-1], [token])
            if stops.found:
                break
        if text is not None:
            texts.append(stops.push(text.flush()) + stops.flush())
            if texts[-1]:
                yield Chunk(texts[-1], [])
        reason = "stop_string" if stops.found else generation.finish_reason
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
        )
