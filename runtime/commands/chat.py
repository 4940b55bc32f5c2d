"""`pastkey chat`: one question, or a conversation on standard input and output."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, cast

from pastkey.command import Command, print_json, progressed, say
from pastkey.errors import InputError

from ..model.generation_config import NAMES
from ..options import DEFAULTS
from ..sandbox.relay import run_limited
from ..settings import CHAT_NEW_TOKENS, ChatOptions
from .flags import (
    SOURCE,
    add_adapter,
    add_bundle,
    add_device,
    add_draft,
    add_generation,
    generation_of,
    limits_of,
    opening_of,
    prompt_of,
)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser, SOURCE)
    parser.add_argument("--json", action="store_true", help="with --prompt, print one JSON object instead of the text")
    add = parser.add_argument_group("prompt").add_argument
    add("--prompt", metavar="TEXT", help="ask one question, print the answer and end; - reads it from standard input")
    add("--system", metavar="TEXT", help="system text of the conversation")
    add("--template", metavar="FILE", help="chat template (Jinja) instead of the bundle's")
    own = {name: f"the model's, or {DEFAULTS[name]}" for name in NAMES if DEFAULTS[name] != ()}
    add_generation(parser, **own, max_new_tokens=CHAT_NEW_TOKENS)
    models = parser.add_argument_group("further models")
    add_draft(models)
    add_adapter(models)
    add_device(parser)
    parser.epilog = (
        "Without --prompt, each line of standard input is a question, or a command: /help lists them. The "
        "sampling options of the model's generation_config.json are the defaults; a flag overrides them."
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.json and arguments.prompt is None:
        raise InputError("--json holds the answer to one question: give it with --prompt TEXT")
    if (limits := limits_of(arguments)) is not None:
        tokens = (arguments.max_new_tokens or CHAT_NEW_TOKENS) + 1
        return run_limited("chat", _run, arguments, limits, tokens=tokens, lines=arguments.prompt in (None, "-"))
    from ..loading import load
    from .terminal import converse, print_answer

    options = generation_of(arguments)
    model = load(arguments.bundle, draft=arguments.draft_bundle, **opening_of(arguments))
    progressed()
    options = _with_defaults(options, model.sampling_defaults)
    chat = model.chat(arguments.system, template=arguments.template)
    if arguments.prompt is None:
        converse(chat, **options)
        return 0
    prompt = prompt_of(arguments.prompt)
    if not arguments.json:
        print_answer(chat, prompt, **options)
        return 0
    stream = chat.stream(prompt, **options)
    for _ in stream:
        progressed()
    answer = stream.completion
    assert answer is not None
    found: dict[str, Any] = {
        "messages": chat.messages,
        "text": answer.text,
        "ids": answer.ids,
        "finish_reason": answer.finish_reason,
        "stop_string": answer.stop_string,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "new_tokens": answer.new_tokens,
    }
    if arguments.logprobs is not None:
        found["logprobs"] = [dataclasses.asdict(token) for token in answer.logprobs]
    print_json({**found, "seconds": answer.prefill_seconds + answer.decode_seconds})
    return 0


def _with_defaults(options: ChatOptions, defaults: ChatOptions) -> ChatOptions:
    """The options, with the model's own where no flag was given, of which one line tells."""
    from ..model.generation_config import ALWAYS

    if options.get("temperature") == 0:  # asked for: nothing is drawn
        defaults = cast(ChatOptions, {name: value for name, value in defaults.items() if name in ALWAYS})
    used = {name: value for name, value in defaults.items() if name not in options}
    if used:
        shown = ", ".join(f"{name} {value}" for name, value in used.items())
        say(f"from the model's generation_config.json: {shown} (--temperature 0 chooses the likeliest token)")
    return cast(ChatOptions, {**used, **options})


chat_command = Command(_add_arguments, _run)
