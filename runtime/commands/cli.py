"""The commands run, chat, batch, bench, inspect, compile, sign and devices: parse, call, print."""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pastkey.command import (
    Command,
    add_placement,
    add_untrusted,
    decode_input,
    finite_float,
    id_list,
    natural_int,
    placement_of,
    positive_int,
    print_json,
    print_text,
    say,
)
from pastkey.contract import names
from pastkey.errors import InputError, ProviderError
from pastkey.files.folder import read_text

from ..settings import (
    BENCH_NEW_TOKENS,
    BENCH_PROMPT_TOKENS,
    CHAT_NEW_TOKENS,
    CHAT_OPTIONS,
    MAX_NEW_TOKENS,
    ChatOptions,
    PlacementOptions,
    SamplingConfig,
)

if TYPE_CHECKING:
    from ..decoding.completion import Completion
    from ..model.chat.chat import Chat
    from .bench import BenchReport


# The flags of SamplingConfig's fields: type, meaning.
_SAMPLING: dict[str, tuple[Callable[[str], Any], str]] = {
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


# --- run ----------------------------------------------------------------------------------------------------------
def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_bundle(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue; - reads it from standard input")
    prompt.add_argument("--prompt-ids", metavar="1,2,3", type=id_list, help="the prompt as token ids")
    _add_generation(parser, MAX_NEW_TOKENS)
    _add_draft(parser)
    add_placement(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, in place of the text")
    parser.epilog = (
        "The continuation goes to standard output as it comes, without the prompt: text, or ids without a tokenizer."
    )


def _run(arguments: argparse.Namespace) -> int:
    from ..loading import load

    prompt = arguments.prompt_ids if arguments.prompt is None else arguments.prompt
    if prompt == "-":
        prompt = _standard_input()
    options = _generation_options(arguments)
    model = load(arguments.bundle, draft=arguments.draft_bundle, **_placement(arguments), **_trust(arguments))
    if arguments.json:
        completion = dataclasses.asdict(model.generate(prompt, **options))
        for name in ("cached_tokens", "tool_calls", "prompt_logprobs"):  # none: nothing came before, nor was asked for
            del completion[name]
        if arguments.logprobs is None:
            del completion["logprobs"]
        print_json(completion)
        return 0
    _show_what_can_be_shown()
    for chunk in model.stream(prompt, **options):
        text = chunk.text if names.TOKENIZER in model.manifest.files else "".join(f"{token} " for token in chunk.ids)
        print_text(text)
    print()
    return 0


# --- chat ---------------------------------------------------------------------------------------------------------
def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_bundle(parser)
    parser.add_argument("--system", metavar="TEXT", help="system text of the conversation")
    parser.add_argument("--template", metavar="FILE", help="chat template (Jinja) in place of the bundle's")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="ask one question, print the answer and end; - reads it from standard input"
    )
    _add_generation(parser, CHAT_NEW_TOKENS, models_own=True)
    _add_draft(parser)
    add_placement(parser)
    parser.add_argument("--json", action="store_true", help="with --prompt, print one JSON object in place of the text")
    parser.epilog = (
        "Without --prompt, each line of standard input is a question, or a command: /help lists them. Tokens are drawn "
        "as the model's authors set it in generation_config.json, where they did; a flag wins."
    )


def _chat(arguments: argparse.Namespace) -> int:
    if arguments.json and arguments.prompt is None:
        raise InputError("--json holds the answer to one question: give it with --prompt TEXT")
    from ..loading import load
    from .terminal import converse, print_answer

    options = _generation_options(arguments)
    model = load(arguments.bundle, draft=arguments.draft_bundle, **_placement(arguments), **_trust(arguments))
    options = _with_defaults(options, model.sampling_defaults)
    chat = model.chat(arguments.system, template=arguments.template)
    prompt = _standard_input() if arguments.prompt == "-" else arguments.prompt
    if arguments.json:
        print_json(_answer_json(chat, chat.ask(prompt, **options), options))
        return 0
    _show_what_can_be_shown()
    if prompt is not None:
        print_answer(chat, prompt, **options)
    else:
        converse(chat, **options)
    return 0


def _with_defaults(options: ChatOptions, defaults: ChatOptions) -> ChatOptions:
    """The options, with the model's own where no flag was given, of which one line tells."""
    from ..model.generation_config import ALWAYS

    if options.get("temperature") == 0:  # asked for: nothing is drawn
        defaults = cast(ChatOptions, {name: value for name, value in defaults.items() if name in ALWAYS})
    used = {name: value for name, value in defaults.items() if name not in options}
    if used:
        shown = ", ".join(f"{name} {value}" for name, value in used.items())
        say(f"as the model's generation_config.json has it: {shown} (--temperature 0 takes the likeliest token)")
    return cast(ChatOptions, {**used, **options})


def _answer_json(chat: Chat, answer: Completion, options: ChatOptions) -> dict[str, Any]:
    return {
        "messages": chat.messages,
        "text": answer.text,
        "ids": answer.ids,
        "finish_reason": answer.finish_reason,
        "stop_string": answer.stop_string,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "new_tokens": answer.new_tokens,
        **({} if options.get("logprobs") is None else {"logprobs": list(map(dataclasses.asdict, answer.logprobs))}),
        "seconds": answer.prefill_seconds + answer.decode_seconds,
    }


# --- batch --------------------------------------------------------------------------------------------------------
def _add_batch(parser: argparse.ArgumentParser) -> None:
    from .batch import add_job

    _add_bundle(parser)
    add_job(parser)
    _add_generation(parser, None)
    add_placement(parser)
    parser.set_defaults(seed=0)


def _batch(arguments: argparse.Namespace) -> int:
    from .batch import batch

    return batch(arguments, _generation_options(arguments), _placement(arguments), _trust(arguments))


# --- bench --------------------------------------------------------------------------------------------------------
def _add_bench(parser: argparse.ArgumentParser) -> None:
    _add_bundle(parser)
    parser.add_argument(
        "--prompt-tokens",
        metavar="N",
        type=positive_int,
        default=BENCH_PROMPT_TOKENS,
        help="prompt tokens to prefill (%(default)s)",
    )
    parser.add_argument(
        "--new-tokens", metavar="N", type=natural_int, default=BENCH_NEW_TOKENS, help="decode so many (%(default)s)"
    )
    add_placement(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import bench
    from .rerun import rerun, untrusted_of

    if untrusted_of(arguments):
        return rerun("bench", _bench, arguments)
    report = bench(
        arguments.bundle,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        **_placement(arguments),
    )
    if arguments.json:
        print_json(report.to_json())
    else:
        _print_bench(report)
    return 0


def _print_bench(report: BenchReport) -> None:
    settings = dict(report.settings)
    note = settings.pop("note", None)
    decode, memory = report.decode_tokens_per_second, report.peak_rss_bytes
    print(f"prefill  {report.prefill_tokens_per_second:10.1f} tokens/s  ({settings['prompt_tokens']} tokens)")
    print(f"decode   {decode:10.1f} tokens/s  ({settings['new_tokens']} tokens)" if decode else "decode   no room")
    print(f"load     {report.load_seconds:10.3f} s")
    print(f"memory   {memory / 2**20:10.1f} MiB at the peak" if memory else "memory   unknown on this system")
    if report.int8_kernels is not None:
        print(f"int8     {report.int8_kernels.note}")
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    if note:
        say(f"note: {note}")


# --- inspect ------------------------------------------------------------------------------------------------------
def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_bundle(parser)
    add_placement(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _inspect(arguments: argparse.Namespace) -> int:
    from .inspection import inspect, print_inspection
    from .rerun import rerun, untrusted_of

    if untrusted_of(arguments):
        return rerun("inspect", _inspect, arguments)
    inspection = inspect(arguments.bundle, **_placement(arguments))
    if arguments.json:
        print_json(inspection.to_json())
    else:
        print_inspection(inspection)
    if inspection.refusal is not None:
        raise ProviderError(inspection.refusal)
    return 0


# --- compile ------------------------------------------------------------------------------------------------------
def _add_compile(parser: argparse.ArgumentParser) -> None:
    _add_bundle(parser, any_author=False)
    parser.add_argument("--out", required=True, metavar="BUNDLE2", help="the folder to write")
    add_placement(parser)
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")


def _compile(arguments: argparse.Namespace) -> int:
    from .context_binary import compile_bundle

    made = compile_bundle(
        arguments.bundle,
        arguments.out,
        arguments.provider,
        dict(arguments.provider_options or ()),
        dict(arguments.session_options or ()),
        threads=arguments.threads or 0,
        allow_fallback=arguments.allow_fallback,
        force=arguments.force,
    )
    say(f"{made.path}: compiled for {made.manifest.compiled}")
    return 0


# --- sign ---------------------------------------------------------------------------------------------------------
def _add_sign(parser: argparse.ArgumentParser) -> None:
    _add_bundle(parser, nargs="?", any_author=False)
    keys = parser.add_mutually_exclusive_group(required=True)
    keys.add_argument("--key", metavar="PRIVATE.pem", help="the private ed25519 key to sign with")
    keys.add_argument("--new-key", metavar="PRIVATE.pem", help="make a key: private in this file, public beside it")


def _sign(arguments: argparse.Namespace) -> int:
    from ..model.signature import new_key, sign_bundle

    if arguments.bundle is None and arguments.key is not None:
        raise InputError("--key signs a bundle: name its folder")
    if arguments.new_key is not None:
        public = new_key(arguments.new_key)
        say(f"{arguments.new_key}: keep it private; {public} is for those who verify your bundles")
    if arguments.bundle is not None:
        say(f"{sign_bundle(arguments.bundle, arguments.new_key if arguments.key is None else arguments.key)}: signed")
    return 0


# --- devices ------------------------------------------------------------------------------------------------------
def _add_devices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _devices(arguments: argparse.Namespace) -> int:
    from ..providers.int8_kernels import int8_kernels
    from ..providers.ort import onnxruntime
    from ..providers.placement import overlapping
    from .devices import devices

    rows, kernels = devices(), int8_kernels()
    if arguments.json:
        print_json(
            {
                "onnxruntime": onnxruntime.__version__,
                "devices": [dataclasses.asdict(row) for row in rows],
                "int8_kernels": dataclasses.asdict(kernels),
            }
        )
        return 0
    print(f"onnxruntime {onnxruntime.__version__}")
    for row in rows:
        state = "available" if row.available else "absent"
        told = [f"devices {', '.join(row.devices)}"] if row.devices else []
        told = [row.package, *told] if row.available else [row.note if row.package else f"comes with {row.note}"]
        print(f"  {row.short_name:<14} {state:<10} {'; '.join([row.hardware, *told])}")
    print(f"int8 MatMuls on this CPU: {kernels.note}")
    if sentence := overlapping():
        say(f"note: {sentence}")
    return 0


# --- shared -------------------------------------------------------------------------------------------------------
def _add_bundle(parser: argparse.ArgumentParser, nargs: str | None = None, *, any_author: bool = True) -> None:
    """The bundle, and with `any_author` the flags of an untrusted one."""
    parser.add_argument("bundle", metavar="BUNDLE", nargs=nargs, help="a folder that pastkey export wrote")
    if any_author:
        add_untrusted(parser)


def _add_generation(parser: argparse.ArgumentParser, most: int | None, *, models_own: bool = False) -> None:
    """The flags of a generation. With `models_own` what is not given is the model's own."""
    add = parser.add_argument
    shown = f"{MAX_NEW_TOKENS}; of an answer {CHAT_NEW_TOKENS}" if most is None else str(most)
    add("--max-new-tokens", metavar="N", type=natural_int, default=most, help=f"largest number of new tokens ({shown})")
    for name, (kind, meaning) in _SAMPLING.items():
        default = getattr(SamplingConfig, name)
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


def _add_draft(parser: argparse.ArgumentParser) -> None:
    what = "smaller bundle of the same vocabulary that drafts tokens (none)"
    parser.add_argument("--draft", metavar="BUNDLE", dest="draft_bundle", help=what)


def _generation_options(arguments: argparse.Namespace) -> ChatOptions:
    """What _add_generation's flags were set to. Raises InputError for settings out of range."""
    given = {name: value for name in CHAT_OPTIONS if (value := getattr(arguments, name, None)) is not None}
    for name in ("json_schema", "grammar"):
        if name in given:
            given[name] = read_text(Path(given[name]))
    options = cast(ChatOptions, given)
    SamplingConfig.of(options)  # now, and not after the first question
    return options


def _placement(arguments: argparse.Namespace) -> PlacementOptions:
    return cast(PlacementOptions, placement_of(arguments))


def _trust(arguments: argparse.Namespace) -> dict[str, Any]:
    from .rerun import untrusted_of

    return untrusted_of(arguments)


def _standard_input() -> str:
    return decode_input(sys.stdin.buffer.read()).removesuffix("\n")


def _show_what_can_be_shown() -> None:
    """A terminal of another encoding shows a question mark for what it cannot."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


run_command = Command(_add_run, _run)
chat_command = Command(_add_chat, _chat)
batch_command = Command(_add_batch, _batch)
bench_command = Command(_add_bench, _bench)
inspect_command = Command(_add_inspect, _inspect)
compile_command = Command(_add_compile, _compile)
sign_command = Command(_add_sign, _sign)
devices_command = Command(_add_devices, _devices)
