"""`pastkey see`: parse, look, write one file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pastkey.command import Command, id_list, positive_int, say
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.errors import InputError
from pastkey.files.durable import refuse_special, write_whole
from pastkey.runtime.commands.flags import SOURCE, add_bundle, add_option, prompt_of
from pastkey.runtime.options import OPTIONS

if TYPE_CHECKING:
    from pastkey.runtime import SamplingOptions

    from .inspection import Floats

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_LAST, _MOST_SHOWN = 128, 256  # tokens that are shown; a page is some 600 pixels wide


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_bundle(parser, SOURCE)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to look at; - reads it from standard input")
    prompt.add_argument("--prompt-ids", metavar="IDS", type=id_list, help="the prompt as token ids, such as 1,2,3")
    add("--out", metavar="FILE", type=Path, required=True, help="the page")
    add("--title", metavar="TEXT", help="title of the page (default: the model's name)")
    add("--position", metavar="N", type=positive_int, help="look at the model after N tokens (default: the prompt's)")
    add("--max-new-tokens", metavar="N", type=positive_int, default=32, help="largest number of new tokens")
    add("--reference", metavar="BUNDLE_OR_SOURCE", help="compare each prediction with this model's")
    last = f"show the last N tokens, {_MOST_SHOWN} at most"
    add("--last", metavar="N", type=positive_int, default=_LAST, help=last)
    numbers = "1,2,3"
    add(
        "--layers",
        metavar=numbers,
        type=_from_one,
        help="layers whose attention is shown, from 1 (default: as many as fit)",
    )
    add(
        "--heads",
        metavar=numbers,
        type=_from_one,
        help="heads whose attention is shown, from 1 (default: as many as fit)",
    )
    sampling = parser.add_argument_group("choice of tokens")
    for name in _SAMPLING:
        add_option(sampling, OPTIONS[name])


def _from_one(text: str) -> list[int]:
    found = [number - 1 for number in id_list(text)]
    if not found or min(found) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from 1, such as 1,2,3")
    return found


def _run(arguments: argparse.Namespace) -> int:
    refuse_special(arguments.out)
    if arguments.out.is_dir():
        raise InputError(f"{arguments.out} is a folder; --out names the file to write")
    if arguments.last > _MOST_SHOWN:
        raise InputError(f"--last is {arguments.last}, and a page shows {_MOST_SHOWN} tokens at most")
    panels = look(open_bundle(arguments.bundle), arguments)
    text = panels["text"]
    if arguments.position is not None:
        text["at"] = arguments.position - 1 - text["first"]
        if not 0 <= text["at"] < len(text["surprise"]):
            shown = f"{text['first'] + 1} to {text['first'] + len(text['surprise'])}"
            raise InputError(f"--position {arguments.position} is not one of the shown tokens, {shown}")
    from .inline import page

    content = page(panels, arguments.title).encode()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.out, content)
    say(f"{arguments.out}: {len(content) / 1000:.0f} kB")
    return 0


def look(bundle: Bundle, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the panels of a bundle. Raises the errors of `inspect`, of a generation and of a reference."""
    from pastkey.runtime import load

    from .inspection import TOP, inspect
    from .panels import panels
    from .text import EXAMPLE, continued, stages

    sampling: SamplingOptions = {n: v for n in _SAMPLING if (v := getattr(arguments, n)) is not None}  # type: ignore[assignment]
    prompt = arguments.prompt_ids if arguments.prompt is None else prompt_of(arguments.prompt)
    with load(bundle.path, "cpu") as lm:
        text, codec = continued(lm, prompt, arguments.max_new_tokens, sampling), lm.tokenizer
    seen = inspect(
        bundle, text.ids, text.following, shown=arguments.last, layers=arguments.layers, heads=arguments.heads
    )
    settings = sampling if sampling.get("temperature") else EXAMPLE
    steps = list(stages(text, seen.first, seen.logits, settings, TOP))
    found = None if arguments.reference is None else _reference(bundle, arguments.reference, text.ids, seen.first)
    return panels(bundle, codec, text, seen, settings, steps, found)


def _reference(bundle: Bundle, path: str, ids: list[int], first: int) -> tuple[str, Floats]:
    """Returns the name and the logits (W, V) of another model on the same tokens."""
    import numpy as np

    from pastkey.export.measure.reference import open_reference

    predictor = open_reference(path, bundle, ids, len(ids), say=say)
    return Path(path).name or path, predictor.logits(np.array(ids))[first:]


see_command = Command(_add_arguments, _run)
