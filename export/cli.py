"""The commands `export`, `verify`, `check` and `eval`: parse, run, report."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pastkey import names
from pastkey.bundle import Bundle, KVGeometry, open_bundle
from pastkey.command import Command, finite_float, positive_int, print_json, say
from pastkey.errors import ContractError, InputError

from .settings import EVAL_LENGTH, EVAL_WINDOWS, GREEDY_PROMPT_TOKENS, GREEDY_PROMPTS, GREEDY_TOKENS

if TYPE_CHECKING:
    from .evaluate import Evaluation, Ids
    from .observe import Observation
    from .pipeline import Report
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
    add("--calibration", metavar="FILE", help="text that int8 or int4 is made for (default: its own)")
    add(
        "--max-kl",
        type=finite_float,
        metavar="NATS",
        help="what it may cost: the matrices that cost most stay in float32, or of int4 in int8, until its KL "
        "divergence is no larger",
    )
    add(
        "--sensitivity",
        action="append",
        default=[],
        metavar="FILE",
        help="write what each matrix costs in int8 or int4, as .json or as a chart .png; may be given twice",
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
            calibration=arguments.calibration,
            max_kl=arguments.max_kl,
            sensitivity=arguments.sensitivity,
            trust_remote_code=arguments.trust_remote_code,
            progress=stages.next,
        )
    _warn_of_slow_kernels(report)
    if arguments.json:
        print_json(report.to_json())
        return 0
    say(
        f"{report.path}: {report.manifest.graph} graph, {report.manifest.precision}, {report.weight_bytes:,} bytes of "
        f"weights ({report.weight_bytes / report.fp32_weight_bytes:.3f} of float32), {report.seconds:.1f} s"
    )
    _say_parity(report.manifest.parity["fp32"], "float32 against torch")
    precision = report.manifest.precision
    if precision != "fp32":
        _say_parity(report.manifest.parity[precision], f"{precision} against itself")
        quality = report.manifest.quality
        say(
            f"  {precision} against float32: KL divergence {quality['kl_divergence']:.2g} nats, "
            f"top-1 agreement {quality['top1_agreement']:.1%}"
        )
        _say_sensitivity(report)
    speaks = names.TOKENIZER in report.manifest.files
    hint = "--prompt ..." if speaks else "--prompt-ids ...   (ids only: no --tokenizer was given)"
    say(f"next:  pastkey run {report.path} {hint}")
    return 0


def _warn_of_slow_kernels(report: Report) -> None:
    from pastkey.runtime.processor import int8_kernels

    manifest = report.manifest
    if manifest.precision != "fp32" and manifest.target == "cpu" and (kernels := int8_kernels()).fast is False:
        measured = "" if manifest.precision == "int8" else " (measured with int8)"
        say(f"warning: on this processor {manifest.precision} products take {kernels.note}{measured}")


def _say_sensitivity(report: Report) -> None:
    kept = report.manifest.quality.get("float32_weights", [])
    if kept:
        say(f"  kept in float32, to meet --max-kl: {len(kept)} {'weight' if len(kept) == 1 else 'weights'}")
    raised = report.manifest.quality.get("int8_weights", [])
    if raised:
        say(f"  in int8, where a bit buys most: {len(raised)} {'weight' if len(raised) == 1 else 'weights'}")
    if report.sensitivity is not None:
        worst = report.sensitivity.rows[:3]
        say(
            f"  {report.manifest.precision} costs most at "
            + ", ".join(f"{row.weight} ({row.kl_divergence:.2g} nats)" for row in worst)
        )


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


def _say_parity(verification: dict[str, Any], title: str) -> None:
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


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", help="the bundle folder")
    add("--text", required=True, metavar="FILE", help="a UTF-8 text file to measure it on")
    add("--reference", metavar="BUNDLE_OR_SOURCE", help="another bundle, or whatever export takes, run in torch")
    shown = f"{EVAL_LENGTH}, or the context where that is shorter"
    add("--length", type=positive_int, metavar="N", help=f"tokens of a window ({shown})")
    add(
        "--windows",
        type=positive_int,
        default=EVAL_WINDOWS,
        metavar="N",
        help="take so many at most, one after another from the beginning of the text (%(default)s)",
    )
    add("--threads", type=positive_int, metavar="N", help="threads within an operator of a bundle (physical cores)")
    add("--trust-remote-code", action="store_true", help="run the Python code that a Hugging Face folder brings")
    add("--json", action="store_true", help="print one JSON object: the same figures, null for those without reference")
    parser.epilog = (
        "perplexity: exp of the mean loss in nats over every token of a window but its first. kl_divergence: "
        "KL(reference || bundle) in nats, mean over all positions. top1_agreement: share of positions whose most "
        f"likely token is the same. greedy_agreement: the first {GREEDY_PROMPT_TOKENS} tokens, or half, of each of the "
        f"first {GREEDY_PROMPTS} windows are a prompt, which both continue greedily by {GREEDY_TOKENS} tokens, or by "
        "fewer where a window has no room for them; the tokens before the first difference, as a share of all. "
        "Windows are plain cuts of the whole text's tokens: a begin token that the tokenizer adds stands in the first "
        "one only."
    )


def _eval(arguments: argparse.Namespace) -> int:
    from .evaluate import BundlePredictions, cut_windows, evaluate, read_tokens

    bundle = open_bundle(arguments.bundle)
    context = bundle.manifest.context_length
    length = min(EVAL_LENGTH, context) if arguments.length is None else arguments.length
    if not 2 <= length <= context:
        raise InputError(f"--length is {length}; windows of this bundle have 2 to {context} tokens, its context")
    ids = read_tokens(arguments.text, bundle)
    windows = cut_windows(ids, length, arguments.windows)
    reference = None
    with _prints_of_the_module():
        if arguments.reference is not None:
            from .reference import open_reference

            reference = open_reference(
                arguments.reference,
                bundle,
                ids,
                windows[0].size,
                threads=arguments.threads,
                trust_remote_code=arguments.trust_remote_code,
                say=say,
            )
        own = BundlePredictions(bundle, threads=arguments.threads)
        evaluation = evaluate(own, windows, reference, progress=_bar)
    if arguments.json:
        print_json(evaluation.to_json())
    else:
        _print_evaluation(evaluation)
    return 0


def _print_evaluation(evaluation: Evaluation) -> None:
    figures = {
        "perplexity": (evaluation.perplexity, ".5g", ""),
        "reference_perplexity": (evaluation.reference_perplexity, ".5g", ""),
        "kl_divergence": (evaluation.kl_divergence, ".2g", " nats"),
        "top1_agreement": (evaluation.top1_agreement, ".1%", ""),
        "greedy_agreement": (evaluation.greedy_agreement, ".1%", ""),
    }
    for name, (value, form, unit) in figures.items():
        if value is not None:
            print(f"{name:<20}  {value:{form}}{unit}")
    against = "" if evaluation.reference is None else f" against {evaluation.reference}"
    print(
        f"{evaluation.bundle}{against}: {evaluation.tokens:,} tokens in windows of at most {evaluation.length}, "
        f"{evaluation.windows} of them"
    )


def _bar(windows: Sequence[Ids], what: str) -> Iterable[Ids]:
    """A progress bar on a terminal, nothing otherwise."""
    from tqdm import tqdm

    bar: Iterable[Ids] = tqdm(windows, desc=what, unit="window", disable=not sys.stderr.isatty())
    return bar


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
eval_command = Command(_add_eval_arguments, _eval)
