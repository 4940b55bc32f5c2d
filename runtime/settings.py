"""The options of a user, with their defaults. Standard library only, so that `--help` is fast."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict, get_args

from pastkey.errors import InputError, OptionError
from pastkey.values import is_collection, is_int, is_number, is_one_of, require, shown

# An execution provider: a short name ("cuda") or onnxruntime's name, alone or in a pair with options.
Choice = str | tuple[str, dict[str, Any]]

MAX_NEW_TOKENS = 64  # of generate, stream and `pastkey run`
CHAT_NEW_TOKENS = 512  # of an answer
_LEAST, _MOST = 2.0**-149, 2.0**127  # settings become float32, where others would be 0 or infinity
NUM_SINK_TOKENS = 4  # first tokens that always stay in the context, including the BOS token
MAX_DRAFT_TOKENS = 7  # drafts per step, besides the certain token
BENCH_PROMPT_TOKENS = 512
BENCH_NEW_TOKENS = 128
MAX_CONTINUATIONS = 10_000  # of a prompt; each takes some kilobytes


SessionSettings = Mapping[str, Any]  # onnxruntime's session options by name
Pooling = Literal["mean", "last", "none"]  # of an embedding; llama.cpp's words

ContextOverflow = Literal["error", "shift"]  # for a sequence longer than the context
LogitsProcessor = Callable[[Any, Any], Any]  # numpy arrays: ids (T,) int64, logits (V,) float32 -> new logits


class SchemaModel(Protocol):
    """A class that writes its JSON schema, as the models of Pydantic 2 do."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]: ...


class SamplingOptions(TypedDict, total=False):
    """How tokens are sampled. The fields and defaults are those of SamplingConfig."""

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
    """The options of every text. The defaults are SamplingConfig's and the constants above."""

    max_new_tokens: int | None
    stop: str | Sequence[str] | None
    bad_words: Sequence[str] | None
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

    docs/sampling.md has the stages of the sampler in order. None is "not set": the default.

    - `max_new_tokens` (int, 64): The largest number of new tokens. The end of the context may come first.
    - `temperature` (float, 0): 0 selects the likeliest token. Above 0 tokens are sampled: with 1 from the model's own
      distribution, with less from a sharper one.
    - `top_k` (int, 0): Draws from the k likeliest tokens; 0 from all.
    - `top_p` (float, 1): Draws from the fewest likeliest tokens that together have this probability.
    - `min_p` (float, 0): Drops tokens below this share of the likeliest one's probability.
    - `typical_p` (float, 1): Draws from the tokens nearest to the entropy that together have this probability.
    - `top_n_sigma` (float, -1): Draws from logits within so many standard deviations of the largest.
    - `xtc_probability` (float, 0): The probability of dropping all but the least likely of the top choices.
    - `xtc_threshold` (float, 0.1): The smallest probability of a top choice.
    - `repetition_penalty` (float, 1): Above 1, tokens of the text, prompt included, become less likely.
    - `presence_penalty` (float, 0): Subtracted from the logits of tokens that the text has, prompt included.
    - `frequency_penalty` (float, 0): Subtracted from these logits once per occurrence.
    - `penalty_last_n` (int, -1): The number of last tokens that these three penalties consider; -1 for all.
    - `no_repeat_ngram_size` (int, 0): Bans repetitions of n-grams of this size; 0 bans none.
    - `dry_multiplier` (float, 0): DRY, a penalty on prolonging a repetition; 0 for none.
    - `dry_base` (float, 1.75): The growth factor of the DRY penalty per token of the repetition.
    - `dry_allowed_length` (int, 2): The shortest repetition with the DRY penalty.
    - `dry_penalty_last_n` (int, -1): The number of last tokens that DRY considers; -1 for all.
    - `dry_sequence_breakers` (list of texts, or of lists of ids): Repetitions end at these.
    - `min_new_tokens` (int, 0): Bans EOS tokens before this many new tokens.
    - `logit_bias` (mapping of ids to numbers, None): Added to their logits.
    - `suppress_tokens` (list of ids, none): Banned tokens.
    - `bad_words` (list of texts, none): Banned texts, as the tokenizer encodes them.
    - `bad_words_ids` (list of lists of ids, none): Banned sequences of tokens.
    - `forced_decoder_ids` (list of pairs, none): Pairs of a position among the new tokens, from 0, and the id there.
    - `forced_eos_token_id` (int or None, None): The id of the last token if `max_new_tokens` ends the generation.
    - `logits_processor` (function or list of functions, none): A function of (ids (T,), logits (V,)), numpy arrays,
      that returns new logits (V,). The step waits for it.
    - `seed` (int or None, None): The same seed samples the same tokens; None uses a new seed.
    - `logprobs` (int or None, None): Returns the log-probability of each new token and of this many likeliest tokens.
      In int8 and int4 those of a prefill (`prompt_logprobs`, `lm.score`) differ by some hundredths of a nat.
    - `prompt_logprobs` (bool, False): Also returns those of the prompt's tokens. Then no cached prefix is used.
    - `stop` (str or a sequence of str, none): The continuation ends before the first of these texts.
    - `eos_token_id` (id or list of ids, the bundle's): The EOS tokens; an empty list for none.
    - `stop_token_ids` (list of ids, none): Further ids that end the continuation.
    - `reuse_prefix` (bool, False): Reuses the KV cache of an earlier sequence for the common prefix, and keeps this one
      for later calls. In int8 the output may differ at a near tie if the shared part was generated.
    - `exact` (bool, False): With `reuse_prefix`, computes the generated tokens of the prefix again. Then int8 output
      does not depend on the cache.
    - `timeout` (float or None, None): Seconds from the first step. Then the generation ends within one step, with the
      finish_reason "deadline" and the text so far.
    - `context_overflow` ("error" or "shift", "error"): With "shift" the oldest tokens are dropped from a full context,
      half of them at a time, and the generation continues. A longer prompt is truncated in the same way.
    - `num_sink_tokens` (int, 4): The number of first tokens that stay; in a conversation all before the first question.
    - `prompt_lookup` (bool, True): Drafts tokens where the text repeats itself, and checks them in one step. In int8 a
      near tie may resolve differently.
    - `draft` (bool, as loaded): Uses the model's draft model if that is faster.
    - `adapter` (str, None): The name of a loaded LoRA adapter, which the text is computed with: docs/adapters.md.
    - `keep_special_tokens` (bool, False): The text shows special tokens up to the EOS token.
    - `json_schema` (JSON schema or Pydantic model, None): The text is JSON that validates. At most one of these four.
    - `regex` (str, None): The text matches this expression.
    - `choices` (list of texts, None): The text is one of these.
    - `grammar` (str, None): The text follows this grammar, in Lark's notation.
    """

    reuse_prefix: bool | None
    exact: bool | None
    prompt_logprobs: bool | None


class PlacementOptions(TypedDict, total=False):
    """Where a bundle runs: arguments of `load`."""

    providers: Choice | Sequence[Choice] | None
    threads: int | None
    allow_fallback: bool
    session_options: SessionSettings | None
    native: bool | None


class SessionOptions(TextOptions, total=False):
    """The options of `Session.generate` and `Session.stream`."""

    exact: bool | None


CHAT_OPTIONS: frozenset[str] = ChatOptions.__optional_keys__
GENERATE_OPTIONS: frozenset[str] = GenerateOptions.__optional_keys__
SESSION_OPTIONS: frozenset[str] = SessionOptions.__optional_keys__


# Options of other programs, and their equivalents here.
_ELSEWHERE = {
    "adapter_name": "adapter is the option",
    "do_sample": "a temperature above 0 draws, and 0 takes the likeliest token",
    "guided_json": "json_schema is the option",
    "ignore_eos": "eos_token_id=[] lets no EOS token end the text",
    "lookahead": "prompt_lookup is the option",
    "n": "generate(n=...) and stream_many(n=...) give several continuations",
    "max_length": "max_new_tokens is the most new tokens, without the prompt's",
    "num_beams": "there is no beam search, and generate(n=...) gives several continuations",
    "num_return_sequences": "generate(n=...) gives several continuations",
    "response_format": "json_schema is the option",
    "stop_strings": "stop is the option",
}


def options_of(call: str, options: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The options of a call without those that are None. Raises as `require_known` and `require_valid`.

    A class as `json_schema` becomes its schema, which other processes can read too.
    """
    require_known(call, options, known)
    require_valid(options)
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(model := given.get("json_schema"), type) and hasattr(model, "model_json_schema"):
        given["json_schema"] = _schema_of(model)
    return given


def _schema_of(model: type[SchemaModel]) -> dict[str, Any]:
    """The schema of a Pydantic model. Raises InputError if it has none, as with a field that JSON cannot hold."""
    try:
        return model.model_json_schema()
    except Exception as error:  # of the model's own code
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"json_schema is {shown(model)}, which has no JSON schema ({reason}): change its fields"
        ) from None


def require_known(call: str, options: Collection[str], known: Collection[str]) -> None:
    """Raises OptionError for the first of `options` that is not in `known`."""
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            usual = f"did you mean {near[0]!r}?" if near else "docs/sampling.md and GenerateOptions list the options"
            raise OptionError(f"{call}() has no option {shown(name)}; {_ELSEWHERE.get(name, usual)}")


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is sampled. docs/sampling.md has the order of the stages. The defaults are greedy decoding."""

    temperature: float = 0.0  # 0 selects the largest logit; 1 samples from the model's own distribution
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the fewest tokens that together have this probability; 1 keeps all
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1, tokens of the prompt and the completion become less likely
    seed: int | None = None  # 0 to 2**63 - 1; the same seed samples the same tokens; None uses a new one
    typical_p: float = 1.0  # keep the tokens nearest to the entropy that together have this probability; 1 keeps all
    top_n_sigma: float = -1.0  # keep logits within so many standard deviations of the largest; 0 or less keeps all
    xtc_probability: float = 0.0  # probability of dropping all but the last token above xtc_threshold
    xtc_threshold: float = 0.1  # above 0.5 no two tokens reach it
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the prompt or completion
    frequency_penalty: float = 0.0  # subtracted once per occurrence
    penalty_last_n: int = -1  # the last tokens that the three penalties consider; -1 is all
    no_repeat_ngram_size: int = 0  # bans repetitions of n-grams of this size; 0 bans none
    dry_multiplier: float = 0.0  # DRY's penalty on prolonging a repetition; 0 is none
    dry_base: float = 1.75  # its growth factor per token of the repetition
    dry_allowed_length: int = 2  # the shortest repetition with the penalty
    dry_penalty_last_n: int = -1  # the last tokens that it considers; -1 is all
    dry_sequence_breakers: Sequence[str | Sequence[int]] = ("\n", ":", '"', "*")  # repetitions end at these
    min_new_tokens: int = 0  # bans EOS tokens before this many new tokens
    logit_bias: Mapping[int, float] | None = None  # added to the logits of these ids; -inf bans
    suppress_tokens: Sequence[int] = ()  # banned ids
    bad_words_ids: Sequence[Sequence[int]] = ()  # banned sequences of ids
    forced_decoder_ids: Sequence[Sequence[int]] = ()  # pairs: a position among the new tokens, from 0, and the id there
    forced_eos_token_id: int | None = None  # the last id if max_new_tokens ends the generation
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] = ()  # functions of (ids, logits) that return logits

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SamplingConfig:
        """Creates one from a call's options, ignoring those that are not fields."""
        return cls(**{field.name: options[field.name] for field in dataclasses.fields(cls) if field.name in options})

    def __post_init__(self) -> None:
        require_valid(vars(self))


def require_valid(given: Mapping[str, Any]) -> None:
    """Raises InputError for the first option that has a wrong type or is out of range. None is "not set"."""
    for name, value in given.items():
        if name in _VALID and value is not None:
            valid, expected = _VALID[name]
            require(valid(value), name, value, expected)


Check = Callable[[Any], bool]


def _is(*kinds: type) -> Check:
    return lambda value: isinstance(value, kinds)


def _between(least: float, most: float) -> Check:
    return lambda value: is_number(value) and least <= value <= most


def _whole(least: int, most: int | None = None) -> Check:
    return lambda value: is_int(value, least, most)


def _each(valid: Check, least: int = 0) -> Check:
    """Checks each item of a list or another ordered collection."""
    return lambda value: is_collection(value) and len(value) >= least and all(map(valid, value))


def _one_or_each(valid: Check) -> Check:
    return lambda value: valid(value) or _each(valid)(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


_IS_ID = _whole(0)
_SWITCH = (_is(bool), "True or False")
_COUNT = (_whole(0), "a whole number from 0")
_SIZE = (_whole(1), "a whole number from 1")
_NAME = (_is(str), "a text")
_TEXTS = (_one_or_each(_is_text), "a text, or a list of texts, each of at least one character")
_PENALTY = (_between(-_MOST, _MOST), "from -2**127 to 2**127; 0 changes nothing, and below 0 tokens become likelier")
_BACK = (_whole(-1), "a whole number from 0, or -1 for the whole text")

# The check of each option, and what an error expects. Other types are left to Python's TypeError.
_VALID: dict[str, tuple[Check, str]] = {
    # of `load` and of Engine
    "providers": (lambda value: isinstance(value, str) or is_collection(value), 'a name such as "cuda", or a list'),
    "threads": (is_int, "a whole number, or None for the physical cores"),
    "allow_fallback": _SWITCH,
    "session_options": (
        lambda value: isinstance(value, Mapping) and all(isinstance(name, str) for name in value),
        'a mapping of names to values such as {"enable_cpu_mem_arena": False}',
    ),
    "native": (_is(bool), "True, False or None"),
    "adapters": (
        lambda value: isinstance(value, Mapping) and all(map(_is_text, value)),
        'a mapping of names to folders such as {"sql": "adapters/sql"}',
    ),
    "verify": (_is(bool), "True, False or None"),
    "max_memory": _SIZE,
    "prefix_bytes": _COUNT,
    "max_batch": _SIZE,
    "max_queue": _COUNT,
    "chunk_size": _SIZE,
    "length": (is_int, "a whole number"),
    "ids": (is_collection, "a list of token ids"),
    # of a call
    "n": (_whole(1, MAX_CONTINUATIONS), f"a whole number from 1 to {MAX_CONTINUATIONS:,}"),
    "max_new_tokens": _COUNT,
    "stop": _TEXTS,
    "bad_words": _TEXTS,
    "eos_token_id": (_one_or_each(_IS_ID), "a token id, or a list of token ids"),
    "stop_token_ids": (_each(_IS_ID), "a list of token ids"),
    "logprobs": _COUNT,
    "prompt_logprobs": _SWITCH,
    "prompt_lookup": _SWITCH,
    "adapter": (_is_text, "the name of a loaded adapter"),
    "draft": (_is(bool), "True or False: the draft model itself is an option of load"),
    "timeout": (lambda value: is_number(value) and value > 0, "a number of seconds above 0"),
    "reuse_prefix": _SWITCH,
    "exact": _SWITCH,
    "context_overflow": (lambda value: is_one_of(value, ("error", "shift")), '"error" or "shift"'),
    "num_sink_tokens": _COUNT,
    "keep_special_tokens": _SWITCH,
    "regex": (_is_text, "a regular expression, as a text"),
    "grammar": (_is_text, "a grammar in Lark's notation, as a text"),
    "choices": (_each(_is_text, 1), "a list of texts of at least one character"),
    # of an embedding
    "pooling": (lambda value: is_one_of(value, get_args(Pooling)), "one of " + ", ".join(get_args(Pooling))),
    "normalize": _SWITCH,
    # of a conversation
    "system": _NAME,
    "documents": (_each(_is(Mapping)), 'a list of {"title": ..., "text": ...}, as the template reads them'),
    "special_tokens_as_text": _SWITCH,
    "name": _NAME,
    "call_id": _NAME,
    # of a SamplingConfig
    "temperature": (_between(0, _MOST), "a number from 0 to 2**127"),
    "top_k": (_whole(0), "a whole number from 0, which keeps all"),
    "top_p": (_between(_LEAST, 1), "above 0 and at most 1, which keeps all"),
    "min_p": (_between(0, 1), "between 0, which keeps all, and 1"),
    "repetition_penalty": (_between(_LEAST, _MOST), "above 0 and at most 2**127; 1 changes nothing"),
    "seed": (_whole(0, 2**63 - 1), "a whole number from 0 to 2**63 - 1"),
    "typical_p": (_between(_LEAST, 1), "above 0 and at most 1, which keeps all"),
    "top_n_sigma": (_between(-_MOST, _MOST), "a number above 0, or at most 0, which keeps all"),
    "xtc_probability": (_between(0, 1), "between 0, which keeps all, and 1"),
    "xtc_threshold": (_between(0, 1), "between 0 and 1; above 0.5 it keeps all"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "penalty_last_n": _BACK,
    "no_repeat_ngram_size": (_whole(0), "a whole number from 0, which bans nothing"),
    "dry_multiplier": (_between(0, _MOST), "a number from 0, which changes nothing"),
    "dry_base": (_between(1, _MOST), "a number from 1"),
    "dry_allowed_length": _COUNT,
    "dry_penalty_last_n": _BACK,
    "dry_sequence_breakers": (
        _each(lambda breaker: _is_text(breaker) or _each(_IS_ID, 1)(breaker)),
        "a list of texts, or of lists of token ids, each of at least one",
    ),
    "min_new_tokens": _COUNT,
    "logit_bias": (
        lambda value: (
            isinstance(value, Mapping)
            and all(map(_IS_ID, value))
            and all(_between(-_MOST, _MOST)(bias) or bias == -math.inf for bias in value.values())
        ),
        "a mapping of token ids to numbers, or to -inf, which bans",
    ),
    "suppress_tokens": (_each(_IS_ID), "a list of token ids"),
    "bad_words_ids": (_each(_each(_IS_ID, 1)), "a list of lists of token ids, each of at least one"),
    "forced_decoder_ids": (
        _each(lambda pair: _each(_IS_ID, 2)(pair) and len(pair) == 2),
        "a list of pairs: a place among the new tokens, from 0, and the token id there",
    ),
    "forced_eos_token_id": (_IS_ID, "a token id, or None"),
    "logits_processor": (
        _one_or_each(callable),
        "a function of (ids, logits) that returns logits, or a list of such functions",
    ),
}
