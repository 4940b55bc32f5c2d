"""Sampling: from logits to a token, stage by stage. `_changes` and `_truncations` define the order.

The order is that of transformers; stages that transformers lacks are as in llama.cpp. Each stage is a pure function
of an array (V,). docs/output.md defines them. Temperature 0 chooses the largest logit after the first half.
`export/generation/sampler.py` implements five of the settings as a graph.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from pastkey.errors import InputError
from pastkey.values import shown

from ..settings import SamplingConfig
from . import bans, dry, penalties, truncation
from .dry import Breakers
from .history import History
from .native import NativeDraw
from .penalties import IdArray, Scores
from .processors import apply_processor
from .random_stream import EXCLUDE, Uniforms, fresh_seed, uniform

_REAL = ("temperature", "top_p", "min_p", "repetition_penalty")  # rounded to float32, the type of the graph's inputs

Change = Callable[[Scores, IdArray], Scores]


class Sampler:
    """Samples tokens by a SamplingConfig. A draw depends only on the logits, the seed and the position.

    Attributes:
        config: The given config, with a seed and with settings rounded to float32.
    """

    def __init__(
        self,
        config: SamplingConfig,
        *,
        prompt_tokens: int = 0,
        max_new_tokens: int | None = None,
        end_ids: Collection[int] = (),
        vocab_size: int | None = None,
        breakers: Breakers | None = None,
        library: str = "",
    ) -> None:
        """Raises InputError for an id outside the vocabulary.

        Args:
            config: The settings.
            prompt_tokens: Number of prompt tokens.
            max_new_tokens: Limit of new tokens.
            end_ids: EOS tokens.
            vocab_size: V.
            breakers: DRY's sequence breakers; see `dry.sequence_breakers`.
            library: The path of pastkey's kernel library, where it may be used.
        """
        nearest: dict[str, Any] = {name: float(np.float32(getattr(config, name))) for name in _REAL}
        seed = fresh_seed() if config.seed is None else int(config.seed)  # numpy's as well
        self.config = dataclasses.replace(config, **nearest, seed=seed)
        self._seed, self._uniforms = seed, Uniforms(seed)
        if vocab_size is not None:
            _require_known_ids(config, vocab_size)
        self._text = _Text(prompt_tokens, max_new_tokens, frozenset(end_ids), breakers or {})
        self._changes = list(_changes(self.config, self._text))
        self._truncations = list(_truncations(self.config)) if self.config.temperature else []
        self._library = library
        self._native = self._native_draw()
        self._history = History()

    def __call__(self, logits: Scores, ids: Sequence[int]) -> int:
        """Returns the next token's id.

        Args:
            logits: (V,); stay unchanged.
            ids: The prompt and the new tokens so far: one growing list, or a new list each time.

        Raises:
            InputError: The settings ban every token, or a `logits_processor` fails.
        """
        text = self._history.of(ids) if self._changes else None
        if self._native is not None:
            token = self._native(logits, text, self._uniforms.at(len(ids)) if self.config.temperature else 0.0)
            if token is not None:
                return token
        if text is not None:
            for change in self._changes:
                logits = change(logits, text)
        largest = int(logits.argmax())
        if logits[largest] == -np.inf:
            raise InputError(
                "the settings ban every token at this place: relax one of logit_bias, bad_words_ids, "
                "no_repeat_ngram_size, min_new_tokens, suppress_tokens, forced tokens and logits_processor"
            )
        if not self.config.temperature:
            return largest
        for _, stage in self._stages(len(ids)):
            logits = stage(logits)
        return truncation.draw(logits, self._uniforms.at(len(ids)))

    def stages(self, logits: Scores, ids: Sequence[int]) -> Iterator[tuple[str, Scores]]:
        """Yields the logits (V,) after each stage of a call, with the stage's name. For a temperature above 0.

        The first is "penalties", all that changes single logits, if there is any.
        """
        text = self._history.of(ids)
        for change in self._changes:
            logits = change(logits, text)
        if self._changes:
            yield "penalties", logits
        for name, stage in self._stages(len(ids)):
            logits = stage(logits)
            yield name, logits

    def _stages(self, place: int) -> Iterator[tuple[str, Callable[[Scores], Scores]]]:
        """The temperature, and the stages after it that restrict the candidates, by the names of their settings."""
        yield "temperature", partial(truncation.apply_temperature, temperature=self.config.temperature)
        yield from self._truncations
        if self._excludes(place):
            yield "xtc", partial(truncation.exclude_top_choices, threshold=self.config.xtc_threshold)

    def twin(self) -> Sampler:
        """A sampler with the same settings and seed for drafts, without the user's logits processors."""
        made = copy.copy(self)
        made._changes = list(_changes(dataclasses.replace(self.config, logits_processor=()), self._text))
        made._native = made._native_draw()
        made._history = History()
        return made

    def _native_draw(self) -> NativeDraw | None:
        """The library's choice, if there are no other stages than those that it computes."""
        c = self.config
        changes = bool(c.logit_bias) + (c.repetition_penalty != 1) + bool(c.presence_penalty or c.frequency_penalty)
        others = {name for name, _ in self._truncations} - {"top_k", "top_p", "min_p"}
        alone = len(self._changes) == changes and not others and not c.xtc_probability
        return NativeDraw.of(self._library, c) if alone else None

    def _excludes(self, place: int) -> bool:
        """Whether XTC applies to this token, by a separate random number."""
        config = self.config
        applies = config.xtc_probability > 0 and config.xtc_threshold <= 0.5  # no two tokens reach a larger one
        return applies and uniform(self._seed, place, EXCLUDE) < config.xtc_probability


@dataclasses.dataclass(frozen=True)
class _Text:
    """The properties of a request that the stages need."""

    prompt_tokens: int
    max_new_tokens: int | None
    end_ids: frozenset[int]
    breakers: Breakers


def _changes(config: SamplingConfig, text: _Text) -> Iterator[Change]:
    """The stages before the temperature, which change single logits. Skips stages that are off."""
    c, recent = config, partial(penalties.last, count=config.penalty_last_n)
    if c.logit_bias:
        yield lambda logits, _: bans.add_bias(logits, c.logit_bias or {})
    if c.repetition_penalty != 1:
        yield lambda logits, ids: penalties.apply_repetition_penalty(logits, recent(ids), c.repetition_penalty)
    if c.presence_penalty or c.frequency_penalty:
        yield lambda logits, ids: penalties.apply_presence_and_frequency_penalty(
            logits, recent(ids), c.presence_penalty, c.frequency_penalty
        )
    if c.dry_multiplier:
        yield lambda logits, ids: dry.apply_dry(
            logits,
            penalties.last(ids, c.dry_penalty_last_n),
            c.dry_multiplier,
            c.dry_base,
            c.dry_allowed_length,
            text.breakers,
        )
    if c.no_repeat_ngram_size:
        yield lambda logits, ids: penalties.ban_repeated_ngrams(logits, ids, c.no_repeat_ngram_size)
    if words := bans.bad_words(c.bad_words_ids, text.end_ids):
        yield lambda logits, ids: bans.ban_bad_words(logits, ids, words)
    if c.min_new_tokens and text.end_ids:
        yield (
            lambda logits, ids: (
                bans.suppress(logits, text.end_ids) if ids.size < text.prompt_tokens + c.min_new_tokens else logits
            )
        )
    if forced := _forced(config, text):
        yield lambda logits, ids: bans.force(logits, forced[ids.size]) if ids.size in forced else logits
    if len(c.suppress_tokens):
        yield lambda logits, _: bans.suppress(logits, c.suppress_tokens)
    for processor in (c.logits_processor,) if callable(c.logits_processor) else c.logits_processor:
        yield partial(apply_processor, processor=processor)


def _truncations(config: SamplingConfig) -> Iterator[tuple[str, Callable[[Scores], Scores]]]:
    """The stages after the temperature, which restrict the candidates, by their settings. XTC follows them."""
    if config.top_n_sigma > 0:
        yield "top_n_sigma", partial(truncation.keep_top_n_sigma, n=config.top_n_sigma)
    if config.top_k:
        yield "top_k", partial(truncation.keep_top_k, k=config.top_k)
    if config.top_p < 1:
        yield "top_p", partial(truncation.keep_top_p, p=config.top_p)
    if config.min_p:
        yield "min_p", partial(truncation.keep_min_p, p=config.min_p)
    if config.typical_p < 1:
        yield "typical_p", partial(truncation.keep_typical, p=config.typical_p)


def _forced(config: SamplingConfig, text: _Text) -> dict[int, int]:
    """Position in the whole sequence -> the forced token."""
    forced = {text.prompt_tokens + place: token for place, token in config.forced_decoder_ids}
    if config.forced_eos_token_id is not None and text.max_new_tokens:
        forced[text.prompt_tokens + text.max_new_tokens - 1] = config.forced_eos_token_id
    return forced


def _require_known_ids(config: SamplingConfig, vocab_size: int) -> None:
    named = {
        "logit_bias": list(config.logit_bias or ()),
        "bad_words_ids": [token for word in config.bad_words_ids for token in word],
        "forced_decoder_ids": [token for _, token in config.forced_decoder_ids],
        "forced_eos_token_id": [] if config.forced_eos_token_id is None else [config.forced_eos_token_id],
        "suppress_tokens": list(config.suppress_tokens),
    }
    for name, tokens in named.items():
        for token in tokens:
            if token >= vocab_size:
                raise InputError(
                    f"{name} holds {shown(token)}; token ids are whole numbers from 0 to {vocab_size - 1}", option=name
                )
