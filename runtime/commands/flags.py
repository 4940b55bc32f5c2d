"""Flags that several commands of the runtime share, and the arguments of `load` and of a generation that they make."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

from pastkey.command import byte_count, decode_input, finite_float, id_list, key_value, natural_int, placement_of
from pastkey.errors import InputError
from pastkey.files.folder import read_text

from ..sandbox.limits import Limits
from ..settings import CHAT_NEW_TOKENS, CHAT_OPTIONS, MAX_NEW_TOKENS, ChatOptions, SamplingConfig

BUNDLE: Final = "a folder that pastkey export wrote"
SOURCE: Final = (
    "a bundle; or what is exported once and kept: ORG/NAME on the Hugging Face Hub, a Hugging Face folder, a .gguf file"
)
ADAPTER: Final = "adapter"  # the name of --adapter's
_TRUSTED: Final = ("adapter_folder", "adapters", "draft_bundle", "draft")  # arguments that no untrusted bundle has
_LIMITS: Final[dict[str, Callable[[str], Any]]] = {"memory": byte_count, "seconds": finite_float}
# The flags of SamplingConfig's fields: type, meaning.
SAMPLING: dict[str, tuple[Callable[[str], Any], str]] = {
    "temperature": (finite_float, "0 takes the likeliest token; above 0, tokens are drawn"),
    "top_k": (natural_int, "draw from the K likeliest tokens; 0 for all"),
    "top_p": (finite_float, "draw from the likeliest tokens that together have probability P"),
    "min_p": (finite_float, "drop tokens below P times the likeliest one's probability"),
    "typical_p": (finite_float, "draw from the tokens nearest to the entropy that together have probability P"),
    "top_n_sigma": (finite_float, "draw from logits within S standard deviations of the largest; 0 or less for all"),
    "xtc_probability": (finite_float, "probability of dropping all but the least likely of the top choices"),
    "xtc_threshold": (finite_float, "smallest probability of a top choice"),
    "repetition_penalty": (finite_float, "above 1, tokens of the text become less likely"),
    "presence_penalty": (finite_float, "subtracted from the logits of tokens that the text has"),
    "frequency_penalty": (finite_float, "subtracted from these logits once per occurrence"),
    "penalty_last_n": (int, "tokens that these three look back; -1 for all"),
    "no_repeat_ngram_size": (natural_int, "no sequence of S tokens comes twice; 0 allows all"),
    "dry_multiplier": (finite_float, "DRY: a penalty on prolonging a repetition; 0 for none"),
    "dry_base": (finite_float, "factor of the DRY penalty for each token of the repetition"),
    "dry_allowed_length": (natural_int, "shortest repetition with the DRY penalty"),
    "dry_penalty_last_n": (int, "tokens that DRY looks back; -1 for all"),
    "min_new_tokens": (natural_int, "no EOS token before this many new tokens"),
    "suppress_tokens": (id_list, "ban these token ids"),
    "seed": (natural_int, "the same seed draws the same text"),
}


# --- the bundle ---------------------------------------------------------------------------------------------------
def add_bundle(parser: argparse.ArgumentParser, what: str = BUNDLE) -> None:
    """The bundle (`what` it is), and the flags of an untrusted one."""
    parser.add_argument("bundle", metavar="BUNDLE", help=what)
    add_untrusted(parser)


def add_untrusted(parser: argparse.ArgumentParser) -> None:
    """The flags of an untrusted bundle: `untrusted`, and `limits` as pairs, or None."""
    add = parser.add_argument
    add("--untrusted", action="store_true", help="open the bundle in a child process with limits")
    meaning = "with --untrusted: memory=BYTES, or seconds=S for an answer; repeat for both"
    add("--limit", dest="limits", metavar="NAME=VALUE", type=key_value, action="append", help=meaning)


def limits_of(arguments: argparse.Namespace) -> Limits | None:
    """The limits of an untrusted bundle, None for a trusted one. Raises InputError for flags that do not fit."""
    if not arguments.untrusted:
        if arguments.limits:
            raise InputError("--limit is for a bundle that is not trusted: add --untrusted")
        return None
    for name in _TRUSTED:
        if getattr(arguments, name, None):
            flag = "--adapter" if name.startswith("adapter") else "--draft"
            raise InputError(f"{flag} is for a bundle that is trusted: leave it out, or --untrusted")
    if arguments.provider not in (None, "cpu") or arguments.provider_options:
        raise InputError(
            f"--provider {arguments.provider} was given; an untrusted bundle runs on the CPU alone: leave it out"
        )
    found: dict[str, Any] = {}
    for name, text in arguments.limits or ():
        try:
            found[name] = _LIMITS[name](text)
        except (KeyError, argparse.ArgumentTypeError):
            raise InputError(
                f"--limit {name}={text} was given; memory=BYTES or seconds=S was expected, as in --limit memory=4e9"
            ) from None
    return Limits(**found)


def opening_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where the bundle runs, and its adapter, as `load` takes it. Raises InputError."""
    placement, adapter = placement_of(arguments), getattr(arguments, "adapter_folder", None)
    return placement if adapter is None else {**placement, "adapters": {ADAPTER: adapter}}


# --- a generation -------------------------------------------------------------------------------------------------
def add_generation(
    parser: argparse.ArgumentParser, most: int | None, *, models_own: bool = False, seed: int | None = None
) -> None:
    """The flags of a generation. With `models_own` the model's own settings are the defaults."""
    add = parser.add_argument
    shown = f"{MAX_NEW_TOKENS}; of an answer {CHAT_NEW_TOKENS}" if most is None else str(most)
    add("--max-new-tokens", metavar="N", type=natural_int, default=most, help=f"largest number of new tokens ({shown})")
    for name, (kind, meaning) in SAMPLING.items():
        default: Any = seed if name == "seed" else getattr(SamplingConfig, name)
        shown = {None: "drawn afresh", (): "none"}.get(default, default)
        flag, letter = "--" + name.replace("_", "-"), name.split("_")[-1][0].upper()
        known = None if models_own else default
        add(flag, metavar=letter, type=kind, default=known, help=f"{meaning} ({shown})")
    add(
        "--bad-word",
        metavar="TEXT",
        dest="bad_words",
        action="append",
        default=[],
        help="ban this text, as encoded; may be repeated",
    )
    add("--logprobs", metavar="N", type=natural_int, help="with --json, log-probabilities, also of the N likeliest")
    ids = "1,2,3"
    add("--eos-token-id", metavar=ids, type=id_list, help="the EOS tokens, in place of the bundle's")
    add("--stop-token-ids", metavar=ids, type=id_list, help="token ids that end the text, beside the EOS tokens")
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be repeated")
    add(
        "--prompt-lookup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draft tokens from earlier text where it repeats itself (on)",
    )
    add(
        "--context-overflow",
        choices=("error", "shift"),
        default="error",
        help="when the text exceeds the context: an error, or drop the oldest tokens (%(default)s)",
    )
    add("--num-sink-tokens", metavar="N", type=natural_int, help="with shift, keep this many of the first tokens (4)")
    add("--timeout", metavar="SECONDS", type=finite_float, help="end after this time, with the text so far (never)")
    add("--keep-special-tokens", action="store_true", help="show special tokens up to the EOS token")
    held = parser.add_mutually_exclusive_group()  # these need the package llguidance
    held.add_argument("--json-schema", metavar="FILE", help="JSON that validates against the schema in this file")
    held.add_argument("--regex", metavar="PATTERN", help="a text that matches this regular expression")
    held.add_argument(
        "--choice", metavar="TEXT", action="append", dest="choices", help="one of these texts; repeat for each"
    )
    held.add_argument("--grammar", metavar="FILE", help="a text that follows the Lark grammar in this file")


def add_draft(parser: argparse.ArgumentParser) -> None:
    """The flag of a draft model: `draft_bundle`."""
    what = "smaller bundle of the same vocabulary that drafts tokens (none)"
    parser.add_argument("--draft", metavar="BUNDLE", dest="draft_bundle", help=what)


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """The flag of a LoRA adapter: `adapter_folder`, which `opening_of` loads and `generation_of` names."""
    what = "LoRA adapter, a folder that peft saved; the bundle was exported with --adapters (none)"
    parser.add_argument("--adapter", metavar="FOLDER", dest="adapter_folder", help=what)


def generation_of(arguments: argparse.Namespace) -> ChatOptions:
    """What add_generation's flags were set to. Raises InputError for settings out of range."""
    given = {name: value for name in CHAT_OPTIONS if (value := getattr(arguments, name, None)) is not None}
    for name in ("json_schema", "grammar"):
        if name in given:
            given[name] = read_text(Path(given[name]))
    if getattr(arguments, "adapter_folder", None) is not None:
        given["adapter"] = ADAPTER
    options = cast(ChatOptions, given)
    SamplingConfig.of(options)  # now, and not after the first question
    return options


def prompt_of(text: str) -> str:
    """A prompt as it was given; "-" reads standard input. Raises InputError unless that is UTF-8."""
    return decode_input(sys.stdin.buffer.read()).removesuffix("\n") if text == "-" else text
