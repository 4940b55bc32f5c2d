"""The options of all calls: one table, from which come the checks, the flags, the fields of the server and the docs.

Standard library only, so that `--help` is fast. An option is checked once, by the call that a user makes.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Protocol, TypedDict, TypeVar, get_args

from pastkey.errors import InputError, OptionError
from pastkey.typed import Between, TokenId, Where, check_of
from pastkey.values import is_collection, is_number, require, shown

T = TypeVar("T")
# An execution provider: a short name ("cuda") or onnxruntime's name, alone or in a pair with options.
Choice = str | tuple[str, dict[str, Any]]
SessionSettings = Mapping[str, Any]  # onnxruntime's session options by name
Pooling = Literal["mean", "last", "none"]  # of an embedding; llama.cpp's words
ContextOverflow = Literal["error", "shift"]  # for a sequence longer than the context
LogitsProcessor = Callable[[Any, Any], Any]  # numpy arrays: ids (T,) int64, logits (V,) float32 -> new logits

MAX_NEW_TOKENS = 64  # of generate, stream and `pastkey run`
NUM_SINK_TOKENS = 4  # first tokens that always stay in the context, including the BOS token
FORMS: Final = "constraints (one of these)"
MAX_CONTINUATIONS = 10_000  # of a prompt; each needs some kilobytes
_LEAST, _MOST = 2.0**-149, 2.0**127  # settings become float32, where others would be 0 or infinity


class PlacementOptions(TypedDict, total=False):
    """Where a bundle runs: arguments of `load`."""

    providers: Choice | Sequence[Choice] | None
    threads: int | None
    allow_fallback: bool
    session_options: SessionSettings | None
    native: bool | None


class SchemaModel(Protocol):
    """A class that writes its JSON schema, as the models of Pydantic 2 do."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]: ...


# Types with their ranges, and their words in an error. None is "not set" for every option.
Switch = Annotated[bool, "True or False"]
Count = Annotated[int, Between(0, math.inf), "a whole number from 0"]
Size = Annotated[int, Between(1, math.inf), "a whole number from 1"]
Whole = Annotated[int, "a whole number"]
Back = Annotated[int, Between(-1, math.inf), "a whole number from 0, or -1 for all"]
Share = Annotated[float, Between(0, 1), "a number from 0 to 1"]
Part = Annotated[float, Between(_LEAST, 1), "above 0 and at most 1"]
Scale = Annotated[float, Between(0, _MOST), "a number from 0 to 2**127"]
Signed = Annotated[float, Between(-_MOST, _MOST), "a number from -2**127 to 2**127"]
Text = Annotated[str, Where(lambda value: isinstance(value, str) and value != ""), "a text of at least one character"]
Texts = Annotated[Text | Sequence[Text], "a text, or a list of texts, each of at least one character"]
Ids = Annotated[Sequence[TokenId], "a list of token ids"]
_are_ids, _are_texts = check_of(Ids), check_of(Sequence[Text])
_SomeIds = Annotated[Sequence[int], Where(lambda value: _are_ids(value) and len(value) > 0)]
_Pair = Annotated[Sequence[int], Where(lambda value: _are_ids(value) and len(value) == 2)]
_SomeTexts = Annotated[Sequence[str], Where(lambda value: _are_texts(value) and len(value) > 0)]
_Bias = Annotated[float, Where(lambda value: (is_number(value) and abs(value) <= _MOST) or value == -math.inf)]
_SCHEMA = "a JSON schema, as a dict, as its JSON text or as the class of a Pydantic model"
_is_schema: Final = Where(
    lambda value: (
        isinstance(value, str | bool | Mapping) or (isinstance(value, type) and hasattr(value, "model_json_schema"))
    )
)
_is_provider: Final = Where(lambda value: isinstance(value, str) or is_collection(value))


@dataclass(frozen=True)
class Option:
    """An option of a call.

    Attributes:
        name: The keyword.
        kind: Its type, with its range and the end of the sentence that refuses another value: "top_k is -1; it must
            be ...".
        default: The value of an option that is not set.
        help: One line about its effect.
        metavar: The value of its flag, "" for a switch; None for an option without a flag.
        flag: The name of its flag, if it is not the option's own.
        group: Its heading.
    """

    name: str
    kind: Any
    default: Any = None
    help: str = ""
    metavar: str | None = None
    flag: str = ""
    group: str = ""

    @property
    def expected(self) -> str:
        """The expected values, in the words of an error."""
        return str(get_args(self.kind)[-1])

    @functools.cached_property
    def valid(self) -> Callable[[Any], bool]:
        """Whether a value is of its type and in its range."""
        return check_of(self.kind)


# fmt: off
_OF_A_TEXT: Final[Mapping[str, tuple[Option, ...]]] = {
    "length and end": (
        Option("max_new_tokens", Count, MAX_NEW_TOKENS, "most new tokens; the end of the context may come first", "N"),
        Option("min_new_tokens", Count, 0, "no EOS token before this many new tokens", "N"),
        Option("stop", Texts, (), "end before this text", "TEXT"),
        Option("eos_token_id", Annotated[TokenId | Ids, "a token id, or a list of token ids"], None,
               "the EOS tokens, instead of the bundle's", "IDS"),
        Option("stop_token_ids", Ids, (), "token ids that end the text, in addition to the EOS tokens", "IDS"),
        Option("timeout", Annotated[float, Between(_LEAST, math.inf), "a number of seconds above 0"], None,
               "seconds from the first step after which the text ends as it is", "SECONDS"),
    ),
    "choice of tokens": (
        Option("temperature", Scale, 0.0, "0 chooses the likeliest token; above 0, tokens are drawn", "X"),
        Option("top_k", Count, 0, "draw from the N likeliest tokens; 0 for all", "N"),
        Option("top_p", Part, 1.0, "draw from the fewest likeliest tokens that together have probability P", "P"),
        Option("min_p", Share, 0.0, "drop tokens below P times the likeliest one's probability", "P"),
        Option("seed", Annotated[int, Between(0, 2**63 - 1), "a whole number from 0 to 2**63 - 1"], None,
               "the same seed draws the same text; without one, each text differs", "N"),
    ),
    "penalties": (
        Option("repetition_penalty", Annotated[float, Between(_LEAST, _MOST), "above 0 and at most 2**127"], 1.0,
               "above 1, tokens of the text, prompt included, become less likely", "X"),
        Option("presence_penalty", Signed, 0.0, "subtracted from the logits of tokens that the text has", "X"),
        Option("frequency_penalty", Signed, 0.0, "subtracted from these logits once per occurrence", "X"),
        Option("penalty_last_n", Back, -1, "last tokens that these three consider; -1 for all", "N"),
    ),
    FORMS: (  # by llguidance
        Option("json_schema", Annotated[str | bool | Mapping[str, Any] | type[SchemaModel], _is_schema, _SCHEMA], None,
               "JSON that validates against this schema; in Python, also the class of a Pydantic model", "FILE"),
        Option("regex", Text, None, "a text that matches this regular expression", "PATTERN"),
        Option("choices", Annotated[_SomeTexts, "a list of texts of at least one character"], None,
               "one of these texts", "TEXT", "--choice"),
        Option("grammar", Text, None, "a text that follows this Lark grammar", "FILE"),
    ),
    "output": (
        Option("logprobs", Count, None, "log-probability of each new token, and of the N likeliest", "N"),
        Option("prompt_logprobs", Switch, False, "also those of the prompt's tokens; then no cached prefix is used"),
        Option("keep_special_tokens", Switch, False, "show special tokens up to the EOS token", ""),
    ),
    "context, cache and drafts": (
        Option("context_overflow", Annotated[ContextOverflow, '"error" or "shift"'], "error",
               "in a full context: an error, or drop the oldest tokens, half of them at a time", "error|shift"),
        Option("num_sink_tokens", Count, NUM_SINK_TOKENS,
               "with shift, keep this many first tokens; in a conversation all before the first question", "N"),
        Option("reuse_prefix", Switch, False,
               "reuse the KV cache of a text with the same beginning; in int8 a token of almost equal score may win"),
        Option("exact", Switch, False,
               "with reuse_prefix, compute generated tokens again: then int8 output does not depend on the cache"),
        Option("prompt_lookup", Switch, True,
               "draft tokens from earlier text that repeats; in int8 a token of almost equal score may win", ""),
        Option("draft", Switch, None, "use the draft model, an option of load"),
        Option("adapter", Text, None, "name of the LoRA adapter to compute with"),
    ),
    "rare": (
        Option("typical_p", Part, 1.0, "draw from the tokens nearest to the entropy with together probability P", "P"),
        Option("top_n_sigma", Signed, -1.0, "keep logits within X standard deviations of the largest; 0 for all", "X"),
        Option("xtc_probability", Share, 0.0, "probability of dropping all top choices but the least likely", "P"),
        Option("xtc_threshold", Share, 0.1, "smallest probability of a top choice; above 0.5 nothing is dropped", "P"),
        Option("no_repeat_ngram_size", Count, 0, "ban repetitions of N tokens; 0 bans none", "N"),
        Option("dry_multiplier", Scale, 0.0, "DRY: a penalty on prolonging a repetition; 0 for none", "X"),
        Option("dry_base", Annotated[float, Between(1, _MOST), "a number from 1"], 1.75,
               "factor of the DRY penalty for each token of the repetition", "X"),
        Option("dry_allowed_length", Count, 2, "shortest repetition with the DRY penalty", "N"),
        Option("dry_penalty_last_n", Back, -1, "last tokens that DRY considers; -1 for all", "N"),
        Option("dry_sequence_breakers",
               Annotated[Sequence[Text | _SomeIds], "a list of texts, or of lists of token ids, each of at least one"],
               ("\n", ":", '"', "*"), "repetitions end at these texts or ids, for DRY"),
        Option("logit_bias", Annotated[Mapping[TokenId, _Bias], "a mapping of token ids to numbers, or -inf"], None,
               "added to the logits of these ids; -inf bans"),
        Option("suppress_tokens", Ids, (), "ban these token ids", "IDS"),
        Option("bad_words", Texts, (), "ban this text, as the tokenizer encodes it", "TEXT", "--bad-word"),
        Option("bad_words_ids", Annotated[Sequence[_SomeIds], "a list of lists of token ids, each of at least one"], (),
               "ban these sequences of tokens"),
        Option("forced_decoder_ids", Annotated[Sequence[_Pair], "a list of pairs: a place, from 0, and a token id"], (),
               "pairs of a place among the new tokens, from 0, and the id there"),
        Option("forced_eos_token_id", Annotated[TokenId, "a token id, or None"], None,
               "the last id, where max_new_tokens ends the text"),
        Option("logits_processor", Annotated[LogitsProcessor | Sequence[LogitsProcessor], "a function, or a list"], (),
               "function of (ids (T,), logits (V,)), numpy arrays, that returns new logits; the step waits for it"),
    ),
}
# Arguments of `load`, of an engine and of other calls. Other types are left to Python's TypeError.
_OTHERS: Final[Mapping[str, Any]] = {
    "providers": Annotated[Any, _is_provider, 'a name such as "cuda", or a list'],
    "session_options": Annotated[Mapping[str, Any], "a mapping of onnxruntime's names to values"],
    "adapters": Annotated[Mapping[Text, Any], "a mapping of names to folders"],
    "ids": Annotated[Sequence[Any], "a list of token ids"],
    "n": Annotated[int, Between(1, MAX_CONTINUATIONS), f"a whole number from 1 to {MAX_CONTINUATIONS:,}"],
    "pooling": Annotated[Pooling, "one of " + ", ".join(get_args(Pooling))],
    "documents": Annotated[Sequence[Mapping[str, Any]], 'a list of {"title": ..., "text": ...}'],
    **dict.fromkeys(("threads", "length"), Whole),
    **dict.fromkeys(("max_memory", "max_batch", "chunk_size"), Size),
    **dict.fromkeys(("prefix_bytes", "max_queue"), Count),
    **dict.fromkeys(("allow_fallback", "native", "verify", "normalize", "special_tokens_as_text"), Switch),
    **dict.fromkeys(("system", "name", "call_id"), Annotated[str, "a text"]),
}
# fmt: on
# The options of a text, by name.
OPTIONS: Final[Mapping[str, Option]] = {
    row.name: dataclasses.replace(row, group=group) for group, rows in _OF_A_TEXT.items() for row in rows
}
DEFAULTS: Final[Mapping[str, Any]] = {name: option.default for name, option in OPTIONS.items()}
CHECKED: Final[Mapping[str, Option]] = {**OPTIONS, **{name: Option(name, kind) for name, kind in _OTHERS.items()}}


def options_of(call: str, options: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The options of a call without those that are None. Raises as `require_known` and `require_valid`.

    A class as `json_schema` becomes its schema, which other processes can also read.
    """
    require_known(call, options, known)
    require_valid(options)
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(model := given.get("json_schema"), type):
        given["json_schema"] = _schema_of(model)
    return given


def _schema_of(model: type[SchemaModel]) -> dict[str, Any]:
    """The schema of a Pydantic model. Raises InputError if it has none, as with a field that JSON cannot hold."""
    try:
        return model.model_json_schema()
    except Exception as error:  # of the model's own code
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"json_schema is {shown(model)}, which has no JSON schema ({reason}): change its fields",
            option="json_schema",
        ) from None


def require_known(call: str, options: Collection[str], known: Collection[str]) -> None:
    """Raises OptionError for the first of `options` that is not in `known`."""
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]!r}?" if near else "docs/output.md lists the options"
            raise OptionError(f"{call}() has no option {shown(name)}; {meant}")


def require_valid(given: Mapping[str, Any]) -> None:
    """Raises InputError for the first option that has a wrong type or is out of range. None is "not set"."""
    for name, value in given.items():
        if name in CHECKED and value is not None:
            require(CHECKED[name].valid(value), name, value, CHECKED[name].expected)


def lists_options(model: type[T]) -> type[T]:
    """Decorates a class: the signature and docstring of each call with `**options` name them, as `help` shows them."""
    for call in vars(model).values():
        kind = getattr(call, "__annotations__", {}).get("options", "")
        if not kind.startswith("Unpack["):
            continue
        known = call.__globals__[kind.removeprefix("Unpack[").removesuffix("]")].__optional_keys__
        names = [*(name for name in OPTIONS if name in known), *sorted(known - OPTIONS.keys())]
        signature = inspect.signature(call)
        fixed = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=DEFAULTS.get(name)) for name in names]
        call.__signature__ = signature.replace(parameters=[*fixed, *named])
        told = [f"- {row.name}: {row.help}" for row in OPTIONS.values() if row.name in known]
        call.__doc__ = "\n".join([inspect.getdoc(call) or "", "", "Options; None is the default:", *told])
    return model
