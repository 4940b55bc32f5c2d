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

from .measure import ROOT, WORK, Answer, BenchmarkError, Table, machine


class Question(NamedTuple):
    """One row of the table.

    The function's docstring names the arms and the metric, its parameters are the flags. A page that quotes the answer
    names the command: `quoted` finds it.
    """

    name: str  # of the function, with dashes
    module: str  # imported when the question is asked
    asks: str


QUESTIONS = (
    Question("peers", "peers.side_by_side", "How fast, accurate and small is pastkey beside other engines?"),
    Question("streams", "peers.streams", "How fast are 1 to 16 requests at the same time, beside other engines?"),
    Question("serve", "serve", "How fast are 1 to 64 clients of the server, beside llama.cpp's?"),
    Question("scaling", "peers.scaling", "How does a step's time grow with context, rows, threads and model size?"),
    Question("step-cost", "alone", "What does a step cost outside onnxruntime?"),
    Question("prefixes", "alone", "How much sooner is the first token behind a cached prefix?"),
    Question("memory", "alone", "How much memory does a prompt take, by its length?"),
    Question("two-graphs", "alone", "How fast is one graph of a model beside another, by context?"),
    Question("demo", "accuracy", "How large, accurate and fast is the decoder of make demo?"),
    Question("stories", "accuracy", "How many of the demo's stories does the grammar accept?"),
    Question("sampling", "alone", "What does the choice of a token cost, by settings?"),
    Question("constrained", "alone", "How fast is JSON by a schema, beside free text?"),
    Question("batch", "alone", "How much faster is a job of many rows than separate calls?"),
    Question("text-embeddings", "accuracy", "What do embeddings cost, and how near are int8's to float32's?"),
    Question("speculation", "speculation", "What do prompt lookup and a draft model bring?"),
    Question("application", "application", "What do an event loop, other work and a second model feel?"),
    Question("one-graph", "alone", "What does a generation in one graph cost?"),
    Question("training", "training", "How good is a decoder after the minutes of nanoGPT's recipe for a CPU?"),
    Question("calibration", "accuracy", "What does calibration bring to int8 on a text?"),
    Question("passes", "passes", "How often does an export read its weights?"),
    Question("pictures", "pictures.render", "Draws the pictures of README and docs from their tables."),
    Question(
        "terminal-picture", "pictures.terminal", "Runs README's commands for an own decoder, and draws a terminal."
    ),
    Question("sensitivity-chart", "pictures.sensitivity", "Draws the cost of each matrix in int8 or int4."),
    Question("decoder-pictures", "pictures.inside", "Draws the pictures of docs/decoder-only.md from its page."),
)
DRAWN = ("pictures", "terminal-picture", "sensitivity-chart", "decoder-pictures")


def quoted(question: Question) -> list[str]:
    """The pages that name the question's command."""
    pages = [ROOT / "Makefile", *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
    command = f"python -m benchmarks {question.name}"
    found = [page for page in pages if command in " ".join(page.read_text(encoding="utf-8").split())]
    return [page.relative_to(ROOT).as_posix() for page in found]


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
    "clients": "clients at the same time",
    "contexts": "tokens in the cache",
    "count": "texts to generate",
    "draft": "bundle of the draft model",
    "full": "more engines, and 24 windows of the text",
    "length": "tokens of a window",
    "lengths": "tokens of each prompt",
    "model": "GGUF file or Hugging Face folder (default: SmolLM2-135M-Instruct)",
    "new_tokens": "tokens to generate",
    "only": "engines to measure",
    "places": "places of the text where prompts begin",
    "prompt_tokens": "tokens of a prompt",
    "reference": "float32 bundle of the same model",
    "requests": "requests of each client",
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
    module = importlib.import_module(f".{question.module}", __package__)
    ask: Callable[..., Answer] = getattr(module, question.name.replace("-", "_"))
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
    parser = Parser(
        prog=f"python -m benchmarks {question.name}",
        description=f"{question.asks}\n\n{inspect.getdoc(ask)}\n\nQuoted in {', '.join(quoted(question))}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, parameter in inspect.signature(ask).parameters.items():
        kind, default = KINDS[parameter.annotation.removesuffix(" | None")], parameter.default
        meaning = MEANINGS.get(name, "")
        if parameter.kind is not parameter.KEYWORD_ONLY:
            optional = {} if default is parameter.empty else {"nargs": "?", "default": default}
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
    return line if line.startswith("|") else textwrap.fill(line, 120, subsequent_indent=indent, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
