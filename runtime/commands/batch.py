"""The command batch: a file of rows is answered, with progress, and a report at the end."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from pastkey.command import print_json, say
from pastkey.errors import InputError
from pastkey.folder import sha256

from ..bulk.answers import Answer
from ..bulk.generator import Generator
from ..bulk.job import Job, JobRecord, is_begun, open_job, refuse_output, require_formats
from ..session_file import bundle_digest
from ..settings import ChatOptions, PlacementOptions
from .rerun import require_cpu
from .untrusted_rows import SandboxedGenerator

_EVERY = 10.0  # seconds between two lines of progress


def batch(
    arguments: argparse.Namespace, options: ChatOptions, placement: PlacementOptions, trust: Mapping[str, Any]
) -> int:
    """Runs or goes on with a job, and prints its report. `trust`: as `load` takes trust and limits, where not usual."""
    source, out = Path(arguments.input), Path(arguments.out)
    require_shard(arguments.shard)
    require_formats(source, out)
    refuse_output(out, force=arguments.force or is_begun(out))
    settings: dict[str, Any] = {**options, "exact": arguments.exact}
    settings["template"] = None if arguments.template is None else sha256(Path(arguments.template))
    given: dict[str, Any] = {"exact": arguments.exact, "template": arguments.template, **placement, **options}
    generator: Generator | SandboxedGenerator
    if trust:
        require_cpu(arguments)
        del given["providers"]
        generator = SandboxedGenerator(arguments.bundle, trust["limits"], **given)
        digest = generator.digest
    else:
        generator = Generator(arguments.bundle, **given)
        digest = bundle_digest(generator.model.bundle)
    wanted = JobRecord(
        bundle=digest,
        input=sha256(source),
        shard=arguments.shard,
        settings=json.loads(json.dumps(settings, sort_keys=True)),  # as it comes back from the file
        created=int(time.time()),
        replaces=False,
    )
    with open_job(source, out, wanted, force=arguments.force) as job:
        if job.record.report is None:
            report = answer_all(job, generator, out)
            job.finish(report)
        else:
            report = dict(job.record.report)
            say(f"{out} is complete: nothing was left to do")
    if arguments.json:
        print_json(report)
    else:
        _print_report(report)
    return 0


def require_shard(shard: str) -> None:
    """Raises InputError unless it is "" or "I/N"."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
    if shard and not (found and 1 <= int(found[1]) <= int(found[2])):
        raise InputError(f"--shard is {shard!r}; I/N was expected, with I from 1 to N")


def answer_all(job: Job, generator: Generator | SandboxedGenerator, out: Path) -> dict[str, Any]:
    """Answers what is left. Returns the report, which tells of this run in its speeds and of the job in the rest."""
    before, started = job.done, time.monotonic()
    tokens = {"prompt_tokens": 0, "new_tokens": 0}
    if before:
        say(f"{before} of {job.total} rows are answered already")
    try:
        with _shown(job) as progress:
            for identity, answer in generator.answers(job.rows(), created=job.record.created):
                job.add(identity, answer)
                for name, count in counted_tokens(answer).items():
                    tokens[name] += count
                progress.update(job, tokens["new_tokens"])
    except (KeyboardInterrupt, SystemExit):
        say(f"{job.done} of {job.total} rows are answered: the same command goes on")
        raise
    seconds = max(time.monotonic() - started, 1e-9)
    return {
        "out": str(out),
        "rows": job.total,
        "errors": job.errors,
        "resumed": before,
        **tokens,
        "seconds": seconds,
        "rows_per_second": (job.done - before) / seconds,
        "tokens_per_second": tokens["new_tokens"] / seconds,
        "bundle": job.record.bundle,
    }


def counted_tokens(answer: Answer) -> dict[str, int]:
    """How many tokens an answer tells of, in either form."""
    usage = ((answer.get("response") or {}).get("body") or {}).get("usage") or {}
    found = {
        "prompt_tokens": answer.get("prompt_tokens") or usage.get("prompt_tokens"),
        "new_tokens": answer.get("new_tokens") or usage.get("completion_tokens"),
    }
    return {name: count or 0 for name, count in found.items()}


def _print_report(report: dict[str, Any]) -> None:
    print(f"{report['out']}: {report['rows']} rows, {report['errors']} with an error")
    print(
        f"{report['rows'] - report['resumed']} rows in {report['seconds']:.1f} s: "
        f"{report['rows_per_second']:.2f} rows/s, {report['tokens_per_second']:.1f} new tokens/s"
    )
    print(f"bundle {report['bundle']}")


class _Progress(Protocol):
    def update(self, job: Job, tokens: int) -> None:
        """One row more is answered, and so many tokens are new in this run."""


@contextlib.contextmanager
def _shown(job: Job) -> Iterator[_Progress]:
    """A bar on a terminal where tqdm is installed, lines elsewhere."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            pass
        else:
            with tqdm(initial=job.done, total=job.total, unit="row", file=sys.stderr, dynamic_ncols=True) as bar:
                yield _Bar(bar)
                return
    yield _Lines(job)


class _Bar:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def update(self, job: Job, tokens: int) -> None:
        self._bar.set_postfix(errors=job.errors, tokens=tokens, refresh=False)
        self._bar.update(1)


class _Lines:
    def __init__(self, job: Job) -> None:
        self._before, self._started = job.done, time.monotonic()
        self._told = self._started

    def update(self, job: Job, tokens: int) -> None:
        now = time.monotonic()
        if now - self._told < _EVERY and job.done < job.total:
            return
        self._told, seconds = now, max(now - self._started, 1e-9)
        say(
            f"{job.done} of {job.total} rows, {job.errors} with an error, "
            f"{(job.done - self._before) / seconds:.2f} rows/s, {tokens / seconds:.1f} new tokens/s"
        )
