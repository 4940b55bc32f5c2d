"""Opens a stream from token ids and the options of a call. Its first `next` runs the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pastkey.errors import InputError
from pastkey.values import is_int, or_default, require

from ..decoding.batching.shared_prefill import SharedPrefill, SharedPrefills
from ..decoding.generation import Generation, Lifecycle
from ..decoding.kept_tokens import KeptTokens
from ..decoding.request import Request
from ..decoding.stream import ChunkStream, Stream
from ..engine.engine import Engine
from ..options import DEFAULTS
from ..sampling.dry import Breakers, sequence_breakers
from ..settings import SamplingConfig
from ..speculation.drafter import Drafter
from ..text.codec import TextCodec, TextStream
from ..text.stop_strings import StopStrings
from .chat.chat_stream import ChatStream
from .chat.prompt import ChatPrompt
from .parts import ModelParts, TextPrompt


class Scheduled:
    """Base of the lifecycles: the model's scheduler runs the steps."""

    def __init__(self, parts: ModelParts) -> None:
        self.parts = parts
        self.advance, self.leave = parts.scheduler.advance, parts.scheduler.leave


class Prompted(Scheduled):
    """The lifecycle of a call. Its cache comes from the prefix store or from another request of the call."""

    def __init__(self, parts: ModelParts, options: Mapping[str, Any], shared: SharedPrefill | None) -> None:
        super().__init__(parts)
        self._reuse, self._exact = options.get("reuse_prefix", False), options.get("exact", False)
        self._anew = options.get("prompt_logprobs") is True  # cached tokens have no logits
        self._shared = shared
        self._waits = shared is not None  # for its turn in the group

    def starting(self, generation: Generation) -> None:
        """Raises InputError if the model was closed after the call."""
        del generation
        self.parts.require_open()

    def provide(self, generation: Generation) -> tuple[Engine, int]:
        """Gets a cache with the same beginning from another prompt of the call or from the store."""
        scheduler, memory, found = self.parts.scheduler, self.parts.memory, None
        graph, ids = self.parts.engine.graph, generation.kept_ids
        reuse = self._reuse and not self._anew
        if self._shared is not None and not self._anew:
            self._waits = False
            found = self._shared.take(generation, scheduler.move_out, memory)
        if found is None or (reuse and scheduler.store.nearest(ids, graph, exact=self._exact)[1] > found[1]):
            found = scheduler.store.take(ids, graph, reuse=reuse, exact=self._exact)
        memory.reserve(generation, graph, generation.most_tokens)
        if self._shared is not None:
            found[0].branch = max(found[0].branch, self._shared.common)
        found[0].marks = self._reuse or (self._shared is not None and self._shared.left > 0)
        return found

    def retired(self, generation: Generation) -> None:
        """Passes the cache on: to the other prompts of the call, or to the store."""
        scheduler, memory, engine = self.parts.scheduler, self.parts.memory, generation.engine
        memory.release(generation)
        if self._waits and self._shared is not None:
            self._waits = False
            self._shared.leave(memory)
        group, self._shared = self._shared, None  # its cache is to live no longer than those who wait for it
        inherited = group is not None and group.inherits(generation) and not self._reuse
        if not generation.begun:
            return
        # A cache in memory shared with other requests is moved out only if a later prompt may reuse it.
        keep = generation.error is None and (self._reuse or inherited or not scheduler.shares_memory(engine))
        scheduler.move_out(engine, keep=keep)
        if keep and not scheduler.closed:
            if inherited and group is not None:
                group.inherit(generation, memory)
            else:
                scheduler.store.put(engine, reuse=self._reuse)
        generation.engine = self.parts.engine


def read_prompt(
    parts: ModelParts, options: Mapping[str, Any], prompt: str | Sequence[int] | TextPrompt | ChatPrompt
) -> TextPrompt | ChatPrompt:
    """Returns a prompt with its ids, for `open_prompt`. Raises InputError for one that does not fit the model."""
    if not isinstance(prompt, TextPrompt | ChatPrompt):
        prompt = TextPrompt(parts.prompt_ids(prompt), prompt if isinstance(prompt, str) else None)
    options = {**DEFAULTS, **options}
    kept = KeptTokens(parts.require_open(), options["context_overflow"], options["num_sink_tokens"])
    kept.checked(prompt.ids)
    return prompt


def open_prompt(
    parts: ModelParts,
    prompt: str | Sequence[int] | TextPrompt | ChatPrompt,
    options: Mapping[str, Any],
    shared: SharedPrefills | None = None,
) -> ChunkStream:
    """Opens a stream of one prompt. `shared`: the other prompts of the call. Raises as `open_stream`."""
    if isinstance(prompt, ChatPrompt):
        return open_answer(parts, prompt, options, shared)
    return open_text(parts, prompt, options, shared)


def open_answer(
    parts: ModelParts, prompt: ChatPrompt, options: Mapping[str, Any], shared: SharedPrefills | None = None
) -> ChatStream:
    """As `open_prompt`, of a conversation."""
    return prompt.answered(open_text(parts, prompt.ids, {**prompt.defaults, **options}, shared))


def open_text(
    parts: ModelParts,
    prompt: str | Sequence[int] | TextPrompt,
    options: Mapping[str, Any],
    shared: SharedPrefills | None = None,
) -> Stream:
    """As `open_prompt`, of a text or its ids."""
    parts.require_open()
    parts = parts.adapted(options.get("adapter"))
    text, ids = (prompt.text, prompt.ids) if isinstance(prompt, TextPrompt) else (prompt, parts.prompt_ids(prompt))
    bounded = shared is None or not shared.begun  # a call that has begun is not cut
    lifecycle = Prompted(parts, options, None if shared is None else shared.join(ids))
    after_text = isinstance(text, str) and bool(text.strip())
    return open_stream(parts, lifecycle, ids, options, after_text=after_text, bounded=bounded)


def open_stream(
    parts: ModelParts,
    lifecycle: Lifecycle,
    ids: Sequence[int],
    options: Mapping[str, Any],
    *,
    after_text: bool,
    bounded: bool = True,
) -> Stream:
    """Opens a stream that continues `ids`.

    Args:
        parts: The model.
        lifecycle: Provides the cache and gets it back.
        ids: The whole sequence so far, (T,).
        options: As returned by `options_of`.
        after_text: Whether the new text continues a text.
        bounded: Whether a full queue refuses it.

    Raises:
        QueueFullError: The queue is full.
        InputError: `ids` or an option is out of range.
    """
    codec, options = parts.tokenizer, {**DEFAULTS, **options}
    stops = _texts(options["stop"])
    if stops and codec is None:
        raise InputError("this bundle has no tokenizer, so that no stop string can be found in its output")
    sampling = SamplingConfig.of({**options, "bad_words_ids": _bad_words(codec, options)})
    end_ids = _end_ids(options, parts)
    constraint = parts.vocabulary.matcher(options, end_ids)
    request = Request(
        ids,
        max_new_tokens=options["max_new_tokens"],
        end_ids=end_ids,
        sampling=sampling,
        prompt_lookup=options["prompt_lookup"],
        timeout=options["timeout"],
        constraint=constraint,
        drafter=_drafter(parts, options),
        breakers=_breakers(codec, sampling) if sampling.dry_multiplier else None,
        logprobs=options["logprobs"],
        prompt_logprobs=options["prompt_logprobs"],
        context_overflow=options["context_overflow"],
        num_sink_tokens=options["num_sink_tokens"],
    )
    keep = options["keep_special_tokens"]
    after_text = after_text or constraint is not None  # a constraint sees the space that begins a text
    text = None if codec is None else TextStream(codec, after_text=after_text, keep_special_tokens=keep)
    generation = Generation(parts.require_open(), request, lifecycle)
    parts.scheduler.admit(generation, bounded=bounded)
    return Stream(generation, text, StopStrings(stops), parts.scheduler.wake)


def _end_ids(options: Mapping[str, Any], parts: ModelParts) -> list[int]:
    """The ids that end the sequence: the call's EOS tokens, or the bundle's and the adapter's; and `stop_token_ids`."""
    manifest = parts.manifest
    eos = or_default(options["eos_token_id"], (*manifest.eos_token_ids, *parts.adapter_ends))
    ids = {"eos_token_id": [eos] if is_int(eos) else eos, "stop_token_ids": options["stop_token_ids"]}
    for name, given in ids.items():
        valid = all(token < manifest.vocab_size for token in given)
        require(valid, name, given, f"a list of token ids from 0 to {manifest.vocab_size - 1}")
    return [int(token) for given in ids.values() for token in given]


def _drafter(parts: ModelParts, options: Mapping[str, Any]) -> Drafter | None:
    asked = options["draft"]
    if asked and parts.draft is None:
        raise InputError(
            "draft is True, and this model has no draft model: give one to pastkey.load(draft=BUNDLE)", option="draft"
        )
    return None if parts.draft is None or asked is False else parts.draft.drafter(parts.memory)


def _texts(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _bad_words(codec: TextCodec | None, options: Mapping[str, Any]) -> Sequence[Sequence[int]]:
    """The ids of all bad words. Each text is encoded by itself and after a space."""
    given = options["bad_words_ids"]
    texts = _texts(options["bad_words"])
    if not texts:
        return given  # type: ignore[no-any-return]
    if codec is None:
        raise InputError(
            "this bundle has no tokenizer, so that bad words have no ids: give bad_words_ids", option="bad_words"
        )
    encoded = [codec.encode(space + text, add_special_tokens=False) for text in texts for space in ("", " ")]
    return [*given, *encoded]


def _breakers(codec: TextCodec | None, sampling: SamplingConfig) -> Breakers:
    given = sampling.dry_sequence_breakers
    if codec is not None:
        return sequence_breakers(given, codec.pieces(), lambda text: codec.encode(text, add_special_tokens=False))
    if given == SamplingConfig.dry_sequence_breakers:
        return {}
    if any(isinstance(breaker, str) for breaker in given):
        raise InputError(
            "this bundle has no tokenizer, so that dry_sequence_breakers have no ids: give lists of ids",
            option="dry_sequence_breakers",
        )
    return sequence_breakers(given, (), lambda _: ())
