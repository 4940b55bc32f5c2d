"""The options as types, for mypy and for editors. `options.py` has the table of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from .options import DEFAULTS, ContextOverflow, LogitsProcessor, SchemaModel

CHAT_NEW_TOKENS = 512  # of an answer
MAX_DRAFT_TOKENS = 7  # drafts per step, besides the certain token
BENCH_PROMPT_TOKENS = 512
BENCH_NEW_TOKENS = 128


class SamplingOptions(TypedDict, total=False):
    """How tokens are sampled: the fields of SamplingConfig."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    typical_p: float | None
    top_n_sigma: float | None
    xtc_probability: float | None
    xtc_threshold: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    penalty_last_n: int | None
    no_repeat_ngram_size: int | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_penalty_last_n: int | None
    dry_sequence_breakers: Sequence[str | Sequence[int]] | None
    min_new_tokens: int | None
    logit_bias: Mapping[int, float] | None
    suppress_tokens: Sequence[int] | None
    bad_words_ids: Sequence[Sequence[int]] | None
    forced_decoder_ids: Sequence[Sequence[int]] | None
    forced_eos_token_id: int | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None


class TextOptions(SamplingOptions, total=False):
    """The options of every text."""

    max_new_tokens: int | None
    stop: str | Sequence[str] | None
    bad_words: str | Sequence[str] | None
    eos_token_id: int | Sequence[int] | None
    stop_token_ids: Sequence[int] | None
    logprobs: int | None
    prompt_lookup: bool | None
    draft: bool | None
    timeout: float | None
    context_overflow: ContextOverflow | None
    num_sink_tokens: int | None
    keep_special_tokens: bool | None
    json_schema: str | bool | Mapping[str, Any] | type[SchemaModel] | None
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | None


class ChatOptions(TextOptions, total=False):
    """The options of `Chat.ask` and `Chat.stream`."""

    adapter: str | None


class GenerateOptions(ChatOptions, total=False):
    """The options of `LanguageModel.generate` and `LanguageModel.stream`.

    docs/output.md lists them, with the stages of the sampler in order. None is "not set": the default.
    """

    reuse_prefix: bool | None
    exact: bool | None
    prompt_logprobs: bool | None


class SessionOptions(TextOptions, total=False):
    """The options of `Session.generate` and `Session.stream`."""

    exact: bool | None


CHAT_OPTIONS: frozenset[str] = ChatOptions.__optional_keys__
GENERATE_OPTIONS: frozenset[str] = GenerateOptions.__optional_keys__
SESSION_OPTIONS: frozenset[str] = SessionOptions.__optional_keys__


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is sampled. docs/output.md has the fields and the order of the stages. The default is greedy.

    It checks nothing: `require_valid` does, once, in the call of a user.
    """

    temperature: float = DEFAULTS["temperature"]
    top_k: int = DEFAULTS["top_k"]
    top_p: float = DEFAULTS["top_p"]
    min_p: float = DEFAULTS["min_p"]
    repetition_penalty: float = DEFAULTS["repetition_penalty"]
    seed: int | None = DEFAULTS["seed"]
    typical_p: float = DEFAULTS["typical_p"]
    top_n_sigma: float = DEFAULTS["top_n_sigma"]
    xtc_probability: float = DEFAULTS["xtc_probability"]
    xtc_threshold: float = DEFAULTS["xtc_threshold"]
    presence_penalty: float = DEFAULTS["presence_penalty"]
    frequency_penalty: float = DEFAULTS["frequency_penalty"]
    penalty_last_n: int = DEFAULTS["penalty_last_n"]
    no_repeat_ngram_size: int = DEFAULTS["no_repeat_ngram_size"]
    dry_multiplier: float = DEFAULTS["dry_multiplier"]
    dry_base: float = DEFAULTS["dry_base"]
    dry_allowed_length: int = DEFAULTS["dry_allowed_length"]
    dry_penalty_last_n: int = DEFAULTS["dry_penalty_last_n"]
    dry_sequence_breakers: Sequence[str | Sequence[int]] = DEFAULTS["dry_sequence_breakers"]
    min_new_tokens: int = DEFAULTS["min_new_tokens"]
    logit_bias: Mapping[int, float] | None = DEFAULTS["logit_bias"]
    suppress_tokens: Sequence[int] = DEFAULTS["suppress_tokens"]
    bad_words_ids: Sequence[Sequence[int]] = DEFAULTS["bad_words_ids"]
    forced_decoder_ids: Sequence[Sequence[int]] = DEFAULTS["forced_decoder_ids"]
    forced_eos_token_id: int | None = DEFAULTS["forced_eos_token_id"]
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] = DEFAULTS["logits_processor"]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SamplingConfig:
        """Creates one from a call's options, ignoring those that are not fields."""
        return cls(**{field.name: options[field.name] for field in dataclasses.fields(cls) if field.name in options})
