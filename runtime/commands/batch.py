"""`pastkey batch`: a file of rows is answered, with lines of progress, and a report at the end."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pastkey.command import Command, print_json, say
from pastkey.contract import names
from pastkey.files.folder import sha256

from ..options import MAX_NEW_TOKENS
from ..settings import CHAT_NEW_TOKENS
from .flags import add_adapter, add_bundle, add_device, add_generation, generation_of, limits_of

if TYPE_CHECKING:
    from ..bulk.job import Job
    from ..bulk.rows import Answer, Row

_EVERY = 10.0  # seconds between two lines of progress


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    add = parser.add_argument
    add("input", metavar="IN", help="rows: JSON lines with a prompt or messages")
    add("--out", required=True, metavar="OUT", help="file of JSON lines to append the answers to")
    add("--exact", action="store_true", help="decode one row at a time, so that an int8 text depends on its row only")
    add("--template", metavar="FILE", help="chat template (Jinja) instead of the bundle's")
    add("--shard", metavar="I/N", default="", help="answer every N-th row, from the I-th on (default: all)")
    add("--force", action="store_true", help="start again: empty OUT first")
    add("--json", action="store_true", help="print the report as one JSON object")
    add_generation(parser, max_new_tokens=f"{MAX_NEW_TOKENS}; of an answer {CHAT_NEW_TOKENS}", seed=0)
    add_adapter(parser.add_argument_group("further models"))
    add_device(parser)
    parser.epilog = (
        "The same command continues a job that was stopped. A field of a row with the name of a setting "
        "(max_new_tokens, temperature, ...) overrides it. Each row draws by a seed made of --seed (0) and its id."
    )


def _run(arguments: argparse.Namespace) -> int:
    from ..bulk.job import open_job, refuse_output, shard_ids
    from ..model.session_file import bundle_digest
    from .limited_rows import LimitedGenerator, generator_of

    options, limits = generation_of(arguments), limits_of(arguments)
    source, out = Path(arguments.input), Path(arguments.out)
    ids = shard_ids(source, arguments.shard)
    refuse_output(out, source)
    with contextlib.ExitStack() as held:
        if limits is not None:
            limited = held.enter_context(contextlib.closing(LimitedGenerator(arguments, limits)))
            digest, answers = limited.digest, limited.answers
        else:
            generator = generator_of(arguments)
            digest, answers = bundle_digest(generator.model.bundle), generator.answers
        settings: dict[str, Any] = {
            "shard": arguments.shard,
            "exact": arguments.exact,
            "template": None if arguments.template is None else sha256(Path(arguments.template)),
            "bundle": digest,
            **json.loads(json.dumps({"seed": 0, **options})),  # as they come back from the file
        }
        if arguments.adapter_folder is not None:
            files = (names.ADAPTER_CONFIG, names.ADAPTER_WEIGHTS)
            settings["adapter"] = [sha256(Path(arguments.adapter_folder) / name) for name in files]
        with open_job(source, out, ids, settings, force=arguments.force) as job:
            report = {"out": str(out), **answer_all(job, answers), "bundle": digest}
    if arguments.json:
        print_json(report)
    else:
        _print_report(report)
    return int(0 < report["rows"] == report["errors"])


def answer_all(job: Job, answers: Callable[[Iterator[Row]], Iterator[tuple[Row, Answer]]]) -> dict[str, Any]:
    """Answers the remaining rows. Returns the report: its rows and errors are the job's, the rest is of this run."""
    before, started = job.done, time.monotonic()
    told, tokens = started, {"prompt_tokens": 0, "new_tokens": 0}
    if before:
        say(f"{before} of {job.total} rows are answered already")

    def speeds() -> dict[str, float]:
        seconds = max(time.monotonic() - started, 1e-9)
        rows, new = (job.done - before) / seconds, tokens["new_tokens"] / seconds
        return {"seconds": seconds, "rows_per_second": rows, "tokens_per_second": new}

    try:
        for row, answer in answers(job.rows()):
            job.add(row, answer)
            for name in tokens:
                tokens[name] += answer[name] or 0
            if time.monotonic() - told >= _EVERY or job.done == job.total:
                told = time.monotonic()
                say(f"{job.done} of {job.total} rows, {job.errors} with an error, {_told(speeds())}")
    except (KeyboardInterrupt, SystemExit, OSError):
        say(f"{job.done} of {job.total} rows are answered: the same command continues")
        raise
    return {"rows": job.total, "errors": job.errors, "resumed": before, **tokens, **speeds()}


def _told(speeds: Mapping[str, float]) -> str:
    return f"{speeds['rows_per_second']:.2f} rows/s, {speeds['tokens_per_second']:.1f} new tokens/s"


def _print_report(report: Mapping[str, Any]) -> None:
    print(f"{report['out']}: {report['rows']} rows, {report['errors']} with an error")
    print(f"{report['rows'] - report['resumed']} rows in {report['seconds']:.1f} s: {_told(report)}")
    print(f"bundle {report['bundle']}")


batch_command = Command(_add_arguments, _run)
