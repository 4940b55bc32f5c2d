"""The benchmarks: one program, a question each.

    python -m benchmarks NAME [flags]     NAME --help has the flags

Never timed tests: figures are printed with their settings, and ratios come from arms that alternate in one run.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from pastkey.command import Parser, finite_float, positive_int, say
from pastkey.errors import InputError, PastkeyError
from pastkey.files.durable import write_json

from .measure import WORK, Answer, BenchmarkError, Table, machine


class Question(NamedTuple):
    """One row of the table. The function's docstring names the arms and the metric, its parameters are the flags."""

    name: str
    asks: str
    quoted: str  # the pages that have the figures
    answer: str  # module:function, imported when it is asked


SPEED, USE = "docs/performance.md", "docs/embedding.md, docs/what-was-tried.md"
QUESTIONS = (
    Question(
        "peers",
        "Speed, error, size and memory beside other engines?",
        "benchmarks/results.md",
        "peers.side_by_side:side_by_side",
    ),
    Question(
        "streams", "Speed of 1 to 16 requests at the same time, beside other engines", SPEED, "peers.streams:streams"
    ),
    Question("scaling", "Time of a step by context, rows, threads and model size", SPEED, "peers.scaling:scaling"),
    Question("step-cost", "Cost of a step outside onnxruntime", SPEED, "alone:step_cost"),
    Question("prefixes", "Time to the first token behind a cached prefix", SPEED, "alone:prefixes"),
    Question("memory", "Memory of a prompt by its length", SPEED, "alone:memory"),
    Question("demo", "Size, error and speed of the decoder of make demo", SPEED, "alone:demo"),
    Question("stories", "Share of the demo's stories that the grammar accepts", SPEED, "alone:stories"),
    Question("sampling", "Cost of the choice of a token, by settings", "docs/sampling.md", "alone:sampling"),
    Question("constrained", "Speed of JSON by a schema, beside free text", "docs/constrained.md", "alone:constrained"),
    Question("batch", "Speed of a job of many rows, beside separate calls", "docs/batch.md", "alone:batch"),
    Question("text-embeddings", "Cost and error of embeddings", "docs/text-embeddings.md", "alone:text_embeddings"),
    Question(
        "speculation", "Gain of prompt lookup and a draft model", "docs/speculation.md", "speculation:speculation"
    ),
    Question(
        "application", "What do an event loop, other work and a second model feel", USE, "application:application"
    ),
    Question("one-graph", "Cost of a generation in one graph", "docs/any-language.md", "alone:one_graph"),
    Question("calibration", "Gain of calibration in int8 on a text", "docs/design.md", "alone:calibration"),
    Question("pictures", "Draw the pictures of README and docs from their tables", "", "pictures.render:pictures"),
    Question(
        "sensitivity-chart",
        "Draw the cost of each matrix",
        "docs/tutorial.md",
        "pictures.sensitivity:sensitivity_chart",
    ),
)
DRAWN = ("pictures", "sensitivity-chart")


def existing_file(text: str) -> Path:
    """argparse type: a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a file")
    return Path(text)


# Annotation of a parameter -> how argparse reads it.
KINDS: dict[str, dict[str, Any]] = {
    "bool": {"action": "store_true"},
    "int": {"type": positive_int, "metavar": "N"},
    "float": {"type": finite_float, "metavar": "X"},
    "Path": {"type": Path},
    "TextFile": {"type": existing_file},
    "Sequence[int]": {"type": positive_int, "nargs": "+", "metavar": "N"},
    "Sequence[Path]": {"type": Path, "nargs": "+"},
    "Sequence[str]": {"nargs": "+", "metavar": "ENGINE"},
}
MEANINGS = {
    "charts": "folder for the charts",
    "count": "texts to generate",
    "draft": "bundle of the draft model",
    "fresh": "measure everything anew",
    "full": "more engines, and 24 windows of the text",
    "length": "tokens of a window",
    "lengths": "tokens of each prompt",
    "model": "GGUF file or Hugging Face folder (default: SmolLM2-135M-Instruct)",
    "new_tokens": "tokens to generate",
    "only": "engines to measure",
    "places": "places of the text where prompts begin",
    "prompt_tokens": "tokens of a prompt",
    "reference": "float32 bundle of the same model",
    "rounds": "interleaved rounds",
    "sizes": "models to export, smallest first",
    "streams": "requests at the same time",
    "text": "UTF-8 text to measure on",
    "threads": "threads of every engine",
    "ticks": "ticks of the event loop, 2 ms each",
    "useless": "reverse the draft model's logits, so that no draft is right",
    "windows": "windows of the text",
    "work": "folder for models and finished steps: after an interruption the same command goes on",
}


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 for a mistake, 1 for an engine that failed, 130 for an interrupt."""
    words = sys.argv[1:] if argv is None else [*argv]
    width = max(len(one.name) for one in QUESTIONS)
    listed = "\n".join(f"  {one.name:{width}}  {one.asks}" for one in QUESTIONS)
    parser = Parser(
        prog="python -m benchmarks",
        description=f"{__doc__}\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = {one.name: one for one in QUESTIONS}
    parser.add_argument("name", metavar="NAME", choices=names, help="one of these questions")
    question = names[parser.parse_args(words[:1]).name]
    module, _, function = question.answer.partition(":")
    ask: Callable[..., Answer] = getattr(importlib.import_module(f".{module}", __package__), function)
    arguments = vars(_parser(question, ask).parse_args(words[1:]))
    try:
        _answer(question, ask, words, **arguments)
    except (PastkeyError, BenchmarkError) as error:
        say(f"{question.name}: {error}")
        return 2 if isinstance(error, PastkeyError) else 1
    except KeyboardInterrupt:
        say(f"{question.name}: interrupted" + "; the same command goes on from here" * ("work" in arguments))
        return 130
    return 0


def _parser(question: Question, ask: Callable[..., Answer]) -> Parser:
    """The flags of a question: the parameters of its function."""
    parts = (question.asks, inspect.getdoc(ask) or "", question.quoted and f"Quoted in {question.quoted}.")
    parser = Parser(
        prog=f"python -m benchmarks {question.name}",
        description="\n\n".join(filter(None, parts)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, parameter in inspect.signature(ask).parameters.items():
        kind, default = KINDS[parameter.annotation.removesuffix(" | None")], parameter.default
        meaning = MEANINGS.get(name, "")
        if parameter.kind is not parameter.KEYWORD_ONLY:
            optional = {} if default is parameter.empty else {"nargs": "", "default": default}
            parser.add_argument(name, **kind | {"metavar": name.upper()} | optional)
            continue
        if default not in (None, False, WORK):
            meaning += f" (default {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
        parser.add_argument(f"--{name.replace('_', '-')}", **kind, default=default, help=meaning)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answer as JSON as well")
    parser.add_argument("--page", type=Path, help="write the answer to a .md file: between its markers, if it has them")
    return parser


def _answer(
    question: Question,
    ask: Callable[..., Answer],
    words: Sequence[str],
    json: Path | None,
    page: Path | None,
    **given: Any,
) -> None:
    cores = os.cpu_count() or 1
    if given.get("threads", 1) > cores:
        raise InputError(f"--threads is {given['threads']}; this machine has {cores} cores")
    parts: list[Table | str] = []
    for part in ask(**given):
        print(f"{part}\n", flush=True)
        parts.append(part)
    shown = " ".join(Path(word).name if os.sep in word else word for word in words)
    facts = [] if question.name in DRAWN else [f"`python -m benchmarks {shown}`", *machine()]
    print("".join(f"- {fact}\n" for fact in facts), end="")
    if json is not None:
        answer = [part if isinstance(part, str) else asdict(part) for part in parts]
        write_json(json, {"question": question.name, "answer": answer, "facts": facts})
    if page is not None:
        write_page(page, question, "\n\n".join([*map(str, parts), "\n".join(f"- {fact}" for fact in facts)]))


def write_page(page: Path, question: Question, section: str) -> None:
    """Puts the section between the page's markers of this question; a page that has none is the section alone."""
    begin, end = f"<!-- benchmarks {question.name} -->\n", f"<!-- end of {question.name} -->"
    text = "\n".join(map(_wrapped, section.split("\n"))).rstrip() + "\n"
    before, found, rest = (page.read_text(encoding="utf-8") if page.is_file() else "").partition(begin)
    new = f"{before}{begin}{text}{end}{rest.partition(end)[2]}" if found else f"# {question.asks}\n\n{text}"
    page.write_text(new, encoding="utf-8")
    say(f"written: {page}")


def _wrapped(line: str) -> str:
    """A line of prose as several; one of a table stays."""
    indent = "  " if line.startswith("- ") else ""
    return line if line.startswith("|") else textwrap.fill(line, 120, subsequent_indent=indent)


if __name__ == "__main__":
    sys.exit(main())
