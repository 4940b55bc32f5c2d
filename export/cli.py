"""The commands `export`, `verify` and `check`: parse, run, report."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pastkey import names
from pastkey.bundle import Bundle, KVGeometry, open_bundle
from pastkey.command import Command, positive_int, print_json, say
from pastkey.errors import ContractError, InputError

if TYPE_CHECKING:
    from .observe import Observation
    from .source import Source
    from .verify import Verification


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", help="a checkpoint or Hugging Face folder, a .gguf file, a llama2.c .bin, or path/to/file.py:factory")
    add("--out", required=True, metavar="BUNDLE", help="the folder to write")
    add("--precision", choices=names.PRECISIONS, default="int8", help="of the weights (default: int8)")
    add("--target", choices=names.TARGETS, default="cpu", help="where it will run (default: cpu)")
    add("--graph", choices=("auto", *names.GRAPHS), default="auto", help="which graph (default: auto)")
    add("--context", type=positive_int, metavar="N", help="context length in tokens; required for a module")
    add(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.json of a module, or llama2.c's tokenizer .bin; without one, ids only",
    )
    add("--force", action="store_true", help="replace an existing bundle")
    add("--trust-remote-code", action="store_true", help="run the Python code that a Hugging Face folder brings")
    add("--json", action="store_true", help="print the report as one JSON object")


def _export(arguments: argparse.Namespace) -> int:
    from .pipeline import export

    with _Stages() as stages, _prints_of_the_module():
        report = export(
            arguments.source,
            arguments.out,
            arguments.precision,
            arguments.target,
            arguments.graph,
            arguments.tokenizer,
            arguments.context,
            arguments.force,
            trust_remote_code=arguments.trust_remote_code,
            progress=stages.next,
        )
    if arguments.json:
        print_json(report.to_json())
        return 0
    say(
        f"{report.path}: {report.manifest.graph} graph, {report.manifest.precision}, {report.weight_bytes:,} bytes of "
        f"weights ({report.weight_bytes / report.fp32_weight_bytes:.3f} of float32), {report.seconds:.1f} s"
    )
    _say_parity(report.manifest.parity["fp32"], "float32 against torch")
    if "int8" in report.manifest.parity:
        _say_parity(report.manifest.parity["int8"], "int8 against itself")
        quality = report.manifest.quality
        say(
            f"  int8 against float32: KL divergence {quality['kl_divergence']:.2g} nats, "
            f"top-1 agreement {quality['top1_agreement']:.1%}"
        )
    speaks = names.TOKENIZER in report.manifest.files
    hint = "--prompt ..." if speaks else "--prompt-ids ...   (ids only: no --tokenizer was given)"
    say(f"next:  pastkey run {report.path} {hint}")
    return 0


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", help="the bundle folder")
    add("source", nargs="?", help="what it was exported from; without it, the bundle's own uncached run")
    add("--trust-remote-code", action="store_true", help="run the Python code that a Hugging Face folder brings")
    add("--json", action="store_true", help="print one JSON object: ok, and one figure per check")


def _verify(arguments: argparse.Namespace) -> int:
    from .source import open_source
    from .verify import verify

    bundle = open_bundle(arguments.bundle, verify=True)
    if arguments.source is None:
        verification = verify(bundle)
    else:
        with _prints_of_the_module():
            source = open_source(
                arguments.source,
                context_length=bundle.manifest.context_length,
                trust_remote_code=arguments.trust_remote_code,
                say=say,
            )
            verification = _against(bundle, source)
    result = verification.to_json()
    if arguments.json:
        print_json(result)
    else:
        _say_parity(result, f"{bundle.path} against {verification.reference}")
        for check in verification.checks:
            if not check.ok:
                say(f"  {check.name}: {check.detail}")
    return 0 if verification.ok else 1


def _against(bundle: Bundle, source: Source) -> Verification:
    from .observe import observe
    from .optimum import NativeDecoder
    from .verify import verify

    try:
        observation = observe(source.module, source.context_length)
    except ContractError:
        if source.folder is None:
            raise
        return verify(bundle, NativeDecoder(source.module))  # what optimum's exporter took instead
    _require_same_shape(bundle, source.name, observation)
    return verify(bundle, source.module, layers=observation.layers)


def _require_same_shape(bundle: Bundle, source: str, observation: Observation) -> None:
    manifest = bundle.manifest
    if (manifest.vocab_size, manifest.layers) != (observation.vocab_size, observation.geometry):
        raise InputError(
            f"{bundle.path} has {manifest.vocab_size} tokens and the cache {_shown(manifest.layers)}, {source} has "
            f"{observation.vocab_size} and {_shown(observation.geometry)}: name the source that it was exported from"
        )


def _shown(layers: Sequence[KVGeometry]) -> str:
    first = layers[0]
    return f"of {len(layers)} layers, {first.kv_heads} heads of size {first.key_head_size}"


def _say_parity(verification: dict, title: str) -> None:  # type: ignore[type-arg]
    say(f"  {title}, {verification['tokens']} tokens: {'equal' if verification['ok'] else 'DIFFERENT'}")
    for name, check in verification["checks"].items():
        mark = "ok  " if check["ok"] else "FAIL"
        if check["measure"] == "first_difference":
            figure = "identical ids" if check["value"] is None else f"first differs at token {check['value']}"
        else:
            figure = f"{check['measure'].replace('_', ' ')} {check['value']:.1e} (limit {check['limit']:.0e})"
        say(f"    {mark} {name:<12} {figure}")


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="the bundle folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object: per program, loads and why not")


def _check(arguments: argparse.Namespace) -> int:
    from .check import check

    verdicts = check(arguments.bundle)
    if arguments.json:
        print_json({"bundle": arguments.bundle, "programs": {v.program: v.to_json() for v in verdicts}})
        return 0
    width = max(len(verdict.program) for verdict in verdicts)
    for verdict in verdicts:
        print(f"{verdict.program:<{width}}  {'loads' if verdict.loads else 'does not load'}")
        if verdict.loads:
            print(f"    {verdict.how}")
        for kind, sentences in (("reason", verdict.reasons), ("warning", verdict.warnings)):
            for sentence in sentences:
                print(f"    {kind}: {sentence}")
    return 0


def _prints_of_the_module() -> contextlib.AbstractContextManager[object]:
    """Sends what the user's file prints to standard error: standard output is for the one JSON object."""
    return contextlib.redirect_stdout(sys.stderr)


class _Stages:
    """Shows the stages of an export: a line each, with the seconds of the one before; redrawn on a terminal."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._current = ""
        self._live = sys.stderr.isatty()

    def __enter__(self) -> _Stages:
        return self

    def next(self, stage: str) -> None:
        self._end()
        self._current, self._started = stage, time.perf_counter()
        if self._live:
            print(f"  … {stage}", end="", file=sys.stderr, flush=True)

    def _end(self) -> None:
        if not self._current:
            return
        start = "\r\x1b[K" if self._live else ""
        print(f"{start}  {self._current}  {time.perf_counter() - self._started:.1f} s", file=sys.stderr, flush=True)
        self._current = ""

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._end()
        elif self._current and self._live:
            print(file=sys.stderr, flush=True)


export_command = Command(_add_export_arguments, _export)
verify_command = Command(_add_verify_arguments, _verify)
check_command = Command(_add_check_arguments, _check)
