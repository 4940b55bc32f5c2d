"""`pastkey run`: continues a prompt."""

from __future__ import annotations

import argparse
import dataclasses

from pastkey.command import Command, id_list, print_json, print_text, progressed
from pastkey.contract import names

from ..options import MAX_NEW_TOKENS
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
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, instead of the text")
    prompt = parser.add_argument_group("prompt (one of these)").add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue; - reads it from standard input")
    prompt.add_argument("--prompt-ids", metavar="IDS", type=id_list, help="the prompt as token ids, such as 1,2,3")
    add_generation(parser)
    models = parser.add_argument_group("further models")
    add_draft(models)
    add_adapter(models)
    add_device(parser)
    parser.epilog = (
        "The continuation goes to standard output as it comes, without the prompt: text, or ids without a tokenizer."
    )


def _run(arguments: argparse.Namespace) -> int:
    if (limits := limits_of(arguments)) is not None:
        from ..sandbox.relay import run_limited

        tokens = (arguments.max_new_tokens or MAX_NEW_TOKENS) + 1
        return run_limited("run", _run, arguments, limits, tokens=tokens, lines=arguments.prompt == "-")
    from ..loading import load

    prompt = arguments.prompt_ids if arguments.prompt is None else prompt_of(arguments.prompt)
    options = generation_of(arguments)
    model = load(arguments.bundle, draft=arguments.draft_bundle, **opening_of(arguments))
    progressed()
    stream = model.stream(prompt, **options)
    is_text = names.TOKENIZER in model.manifest.files
    for chunk in stream:
        progressed()
        if not arguments.json:
            print_text(chunk.text if is_text else "".join(f"{token} " for token in chunk.ids))
    if not arguments.json:
        print()
        return 0
    assert stream.completion is not None
    completion = dataclasses.asdict(stream.completion)
    for name in ("cached_tokens", "tool_calls", "prompt_logprobs"):  # none: nothing came before, nor was asked for
        del completion[name]
    if arguments.logprobs is None:
        del completion["logprobs"]
    print_json(completion)
    return 0


run_command = Command(_add_arguments, _run)
