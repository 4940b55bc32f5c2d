"""From a prompt's ids and a call's options to a stream, whose first step comes with its first `next`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pastkey.errors import InputError
from pastkey.values import is_collection, require, shown

from .batching.shared_prefill import SharedPrefill
from .engine.engine import Engine
from .generate import Generation
from .sampling.dry import Breakers, sequence_breakers
from .settings import MAX_NEW_TOKENS, NUM_SINK_TOKENS, GenerateOptions, SamplingConfig, SessionOptions
from .speculation.drafter import Drafter
from .stream import Stream
from .text.codec import TextCodec, TextStream
from .text.stop_strings import StopStrings

if TYPE_CHECKING:
    from .language_model import LanguageModel

_SWITCHES = ("exact", "keep_special_tokens", "prompt_logprobs", "prompt_lookup", "reuse_prefix")


def open_stream(
    model: LanguageModel,
    ids: Sequence[int],
    options: GenerateOptions | SessionOptions,
    *,
    after_text: bool,
    provide: Callable[[Generation], tuple[Engine, int]],
    retired: Callable[[Generation], None],
    starting: Callable[[Generation], object],
) -> Stream:
    """A stream behind `ids`.

    Args:
        model: The model.
        ids: The whole text so far, (T,).
        options: Checked names, and values to check.
        after_text: Whether the new text goes on from a text.
        provide: See Generation.
        retired: See Generation.
        starting: See Generation.

    Raises:
        InputError: The model cannot take `ids`, or an option is out of range.
    """
    for name in _SWITCHES:
        require(isinstance(options.get(name, False), bool), name, options.get(name), "True or False")
    codec = model.tokenizer
    stops = _texts("stop", options.get("stop", ()))
    if stops and codec is None:
        raise InputError("this bundle has no tokenizer, so that no stop string can be found in what it generates")
    sampling = SamplingConfig.of({**options, "bad_words_ids": _bad_words(codec, options)})
    constraint = model.vocabulary.matcher(options)
    generation = Generation(
        model.require_open(),
        ids,
        max_new_tokens=options.get("max_new_tokens", MAX_NEW_TOKENS),
        end_ids=model.manifest.eos_token_ids,
        sampling=sampling,
        prompt_lookup=options.get("prompt_lookup", True),
        timeout=options.get("timeout"),
        constraint=constraint,
        drafter=_drafter(model, options),
        breakers=_breakers(codec, sampling) if sampling.dry_multiplier else None,
        logprobs=options.get("logprobs"),
        prompt_logprobs=bool(options.get("prompt_logprobs", False)),
        context_overflow=options.get("context_overflow", "error"),
        num_sink_tokens=options.get("num_sink_tokens", NUM_SINK_TOKENS),
        driver=model.scheduler,
        provide=provide,
        retired=retired,
        starting=starting,
    )
    keep = options.get("keep_special_tokens", False)
    after_text = after_text or constraint is not None  # which sees the space that begins a text
    text = None if codec is None else TextStream(codec, after_text=after_text, keep_special_tokens=keep)
    return Stream(generation, text, StopStrings(stops), model.scheduler.wake)


def open_prompt(
    model: LanguageModel, prompt: str | Sequence[int], options: GenerateOptions, shared: SharedPrefill | None = None
) -> Stream:
    """A stream of one prompt, with a cache from the store of prefixes, or from another continuation of the same."""
    model.require_open()
    reuse, exact = options.get("reuse_prefix", False), options.get("exact", False)
    anew = options.get("prompt_logprobs") is True  # what is in the cache already has no logits

    def provide(generation: Generation) -> tuple[Engine, int]:
        found = None if shared is None or anew else shared.take(generation, model.scheduler.move_out)
        if found is None:
            found = model.scheduler.store.take(generation.kept_ids, reuse=reuse and not anew, exact=exact)
        model.memory.promise(found[0], generation.most_tokens)
        return found

    def retired(generation: Generation) -> None:
        engine = generation.engine
        model.memory.release(engine)
        if not generation.begun:
            return
        # Moving out of the memory that it shares with others is worth it where a later call may ask for it.
        keep = generation.error is None and (reuse or not model.scheduler.shares_memory(engine))
        model.scheduler.move_out(engine, keep=keep)
        if keep and not model.closed:
            model.scheduler.store.put(engine, reuse=reuse)

    return open_stream(
        model,
        model.prompt_ids(prompt),
        options,
        after_text=isinstance(prompt, str) and bool(prompt.strip()),
        provide=provide,
        retired=retired,
        starting=lambda _: model.require_open(),  # it may be closed since this call
    )


def _drafter(model: LanguageModel, options: GenerateOptions | SessionOptions) -> Drafter | None:
    asked = options.get("draft")
    if asked is not None and not isinstance(asked, bool):
        raise InputError(
            f"draft is {shown(asked)}; True or False was expected: the draft model itself is an option of load"
        )
    if asked and model.draft is None:
        raise InputError("draft is True, and this model has no draft model: give one to pastkey.load(draft=BUNDLE)")
    return None if model.draft is None or asked is False else model.draft.drafter(model.memory)


def _texts(name: str, given: Any) -> tuple[str, ...]:
    texts = tuple(given) if is_collection(given) or isinstance(given, Iterator) else (given,)
    if any(not isinstance(text, str) or not text for text in texts):
        raise InputError(f"{name} is {shown(given)}; texts of at least one character were expected")
    return texts


def _bad_words(codec: TextCodec | None, options: Mapping[str, Any]) -> Sequence[Sequence[int]]:
    """The ids of all bad words: those of a text as it stands, and after a space."""
    given = options.get("bad_words_ids", ())
    texts = _texts("bad_words", options.get("bad_words", ()))
    if not texts:
        return given  # type: ignore[no-any-return]  # which SamplingConfig checks
    if codec is None:
        raise InputError("this bundle has no tokenizer, so that bad words have no ids: give bad_words_ids")
    encoded = [codec.encode(space + text, add_special_tokens=False) for text in texts for space in ("", " ")]
    return [*SamplingConfig(bad_words_ids=given).bad_words_ids, *encoded]


def _breakers(codec: TextCodec | None, sampling: SamplingConfig) -> Breakers:
    given = sampling.dry_sequence_breakers
    if codec is not None:
        return sequence_breakers(given, codec.pieces(), lambda text: codec.encode(text, add_special_tokens=False))
    if given == SamplingConfig.dry_sequence_breakers:
        return {}
    if any(isinstance(breaker, str) for breaker in given):
        raise InputError("this bundle has no tokenizer, so that dry_sequence_breakers have no ids: give lists of ids")
    return sequence_breakers(given, (), lambda _: ())
