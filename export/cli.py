"""The commands `export`, `verify` and `eval`: parse, run, report."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pastkey.command import (
    Command,
    add_placement,
    add_provider_settings,
    placement_of,
    positive_int,
    print_json,
    say,
)
from pastkey.contract import names
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.errors import InputError
from pastkey.files.durable import refuse_existing
from pastkey.files.folder import hub_id, read_json

from .progress import SILENT, Progress
from .settings import (
    EVAL_LENGTH,
    EVAL_WINDOWS,
    GREEDY_PROMPT_TOKENS,
    GREEDY_PROMPTS,
    GREEDY_TOKENS,
    SOURCES,
    ExportConfig,
)

_FLAGS = {field.name: field.metadata for field in dataclasses.fields(ExportConfig) if field.metadata}

if TYPE_CHECKING:
    from torch import nn

    from pastkey.runtime.options import PlacementOptions

    from .graft.probe.observe import CacheLayer
    from .measure.evaluate import Evaluation
    from .pipeline import Report
    from .source.hub import HubModel


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The destinations of the optional arguments are the fields of ExportConfig."""
    parser.add_argument("source", metavar="SOURCE", help=SOURCES)
    parser.add_argument("--out", required=True, metavar="BUNDLE", help="the folder to write")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for name, metadata in _FLAGS.items():
        if (heading := metadata["group"]) not in groups:
            groups[heading] = parser.add_argument_group(heading)
        _add_flag(groups[heading], name)
    add_provider_settings(parser.add_argument_group("provider"))
    parser.set_defaults(**{field.name: field.default for field in dataclasses.fields(ExportConfig)})


def _add_flag(group: argparse._ActionsContainer, name: str) -> None:
    """Adds the flag of this field of ExportConfig."""
    further = {key: value for key, value in _FLAGS[name].items() if key != "group"}
    flag = further.pop("flag", "--" + name.replace("_", "-"))
    group.add_argument(flag, dest=name, **further)


def _add_module_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a source that is opened again."""
    _add_flag(parser, "weights")
    _add_flag(parser, "trust_remote_code")


def _export(arguments: argparse.Namespace) -> int:
    options = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(ExportConfig)}
    config = ExportConfig(**options)  # validate before torch loads
    source: str | HubModel = arguments.source

    from .terminal import StageLines

    with StageLines() as stages, _prints_of_the_module():
        if (name := hub_id(arguments.source)) is not None:
            from .source.hub import find

            refuse_existing(Path(arguments.out), force=config.force)
            source = find(name, stages, network=config.network)
            if source.is_bundle:
                return _take_bundle(source, config, arguments, stages)
        from .pipeline import export_found

        report = export_found(source, Path(arguments.out), config, stages)
    if arguments.json:
        print_json(report.to_json())
        return 0
    say(
        f"{report.path}: {report.manifest.graph} graph, {report.manifest.precision}, {report.weight_bytes:,} bytes of "
        f"weights ({report.weight_bytes / report.fp32_weight_bytes:.3f} of float32), {report.seconds:.1f} s"
    )
    _say_parity(report.manifest.parity["fp32"], "float32 against the source")
    precision = report.manifest.precision
    if precision != "fp32":
        against = "the source" if precision == "fp16" else "itself"
        _say_parity(report.manifest.parity[precision], f"{precision} against {against}")
        quality = report.manifest.quality
        say(
            f"  {precision} against float32: KL divergence {quality['kl_divergence']:.2g} nats, "
            f"top-1 agreement {quality['top1_agreement']:.1%}"
        )
        for what, matrices in quality.get("weights", {}).items():
            say(f"  {len(matrices)} {'matrix' if len(matrices) == 1 else 'matrices'}: {what}")
        _say_sensitivity(report)
    _say_next(Bundle(report.path, report.manifest))
    return 0


def _take_bundle(source: HubModel, config: ExportConfig, arguments: argparse.Namespace, progress: Progress) -> int:
    """Writes a bundle from the Hub as it is."""
    ours = dataclasses.replace(config, force=False, network=True, cache=True)
    changed = next((f.name for f in dataclasses.fields(config) if getattr(ours, f.name) != f.default), None)
    if changed is not None:
        raise InputError(
            f"{source} is a bundle already, and is run unchanged: leave out the option {changed.replace('_', ' ')}, or "
            "export the model that it was made from"
        )
    bundle = source.write_bundle(Path(arguments.out), progress, force=config.force)
    if arguments.json:
        print_json({"bundle": arguments.out, "source": source.name, "revision": source.revision})
        return 0
    say(f"{bundle.path}: the bundle {source} at commit {source.revision[:12]}, {bundle.manifest.precision}")
    _say_next(bundle)
    return 0


def _say_next(bundle: Bundle) -> None:
    command, hint = "run", "--prompt ..."
    if bundle.tokenizer is None:
        hint = "--prompt-ids 1,2,3   (ids only: no --tokenizer was given)"
    elif read_json(bundle.path / names.TOKENIZER_CONFIG).get("chat_template"):
        command, hint = "chat", ""
    say(f"next:  pastkey {command} {shlex.quote(str(bundle.path))} {hint}".rstrip())


def _say_sensitivity(report: Report) -> None:
    kept = report.manifest.quality.get("float32_weights", [])
    if kept:
        say(f"  kept in float32 to meet --max-kl: {len(kept)} {'weight' if len(kept) == 1 else 'weights'}")
    raised = report.manifest.quality.get("int8_weights", [])
    if raised:
        say(f"  kept in int8 (most sensitive): {len(raised)} {'weight' if len(raised) == 1 else 'weights'}")
    if report.sensitivity is not None:
        worst = report.sensitivity.rows[:3]
        say(
            f"  most sensitive to {report.manifest.precision}: "
            + ", ".join(f"{row.weight} ({row.kl_divergence:.2g} nats)" for row in worst)
        )


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="the bundle folder")
    add(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="the source of the export (default: compare with the bundle's own uncached run)",
    )
    add("--key", metavar="PUBLIC.pem", help="require a signature by this key, made by pastkey sign; checked first")
    _add_module_flags(parser)
    add("--json", action="store_true", help="print one JSON object: ok, and one figure per check")
    add_placement(parser)


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.key is not None:
        from pastkey.runtime.model.signature import require_signature

        require_signature(arguments.bundle, arguments.key)
    bundle = open_bundle(arguments.bundle, verify=True)
    from .measure.verify import verify

    module: nn.Module | None = None
    layers: tuple[CacheLayer, ...] = ()
    with _prints_of_the_module():
        if arguments.source is not None:
            from .measure.reference import open_exported

            module, layers = open_exported(
                arguments.source,
                bundle,
                weights=arguments.weights,
                trust_remote_code=arguments.trust_remote_code,
                say=say,
            )
        with _shown("verify") as progress:
            placement = cast("PlacementOptions", placement_of(arguments))
            verification = verify(bundle, module, layers=layers, progress=progress, **placement)
    result = verification.to_json()
    if arguments.json:
        print_json(result if arguments.key is None else result | {"signed_by": arguments.key})
    else:
        if arguments.key is not None:
            say(f"  signed by the key in {arguments.key}")
        _say_parity(result, f"{bundle.path} against {verification.reference}")
        for check in verification.checks:
            if not check.ok:
                say(f"  {check.name}: {check.detail}")
    return 0 if verification.ok else 1


def _say_parity(verification: Mapping[str, Any], title: str) -> None:
    say(f"  {title}, {verification['tokens']} tokens: {'equal' if verification['ok'] else 'DIFFERENT'}")
    for name, check in verification["checks"].items():
        mark = "ok  " if check["ok"] else "FAIL"
        if check["measure"] == "first_difference":
            figure = "identical ids" if check["value"] is None else f"first differs at token {check['value']}"
        else:
            figure = f"{check['measure'].replace('_', ' ')} {check['value']:.1e} (limit {check['limit']:.0e})"
        say(f"    {mark} {name:<12} {figure}")


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="the bundle folder")
    add("--text", required=True, metavar="FILE", help="a UTF-8 text file to evaluate on")
    add("--reference", metavar="BUNDLE_OR_SOURCE", help="another bundle, or a source of export, run in torch")
    _add_module_flags(parser)
    shown = f"{EVAL_LENGTH}, or the context where that is shorter"
    add("--length", type=positive_int, metavar="TOKENS", help=f"length of a window (default: {shown})")
    add(
        "--windows",
        type=positive_int,
        default=EVAL_WINDOWS,
        metavar="N",
        help="at most N windows, from the beginning of the text",
    )
    add("--json", action="store_true", help="print one JSON object: the same figures, null for those without reference")
    add_placement(parser)
    parser.epilog = (
        "perplexity: exp of the mean loss in nats over every token of a window but its first. kl_divergence: "
        "KL(reference || bundle) in nats, mean over all positions. top1_agreement: share of positions whose most "
        f"likely token is the same. greedy_agreement: the first {GREEDY_PROMPT_TOKENS} tokens, or half, of each of the "
        f"first {GREEDY_PROMPTS} windows are a prompt, which both continue greedily by {GREEDY_TOKENS} tokens, or by "
        "as many as fit into the window; the tokens before the first difference, as a share of all. "
        "Windows are plain cuts of the whole text's tokens: only the first one has the tokenizer's BOS token."
    )


def _eval(arguments: argparse.Namespace) -> int:
    from .measure.evaluate import evaluate
    from .measure.predictors import BundlePredictor
    from .measure.texts import cut_windows, read_tokens

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
            from .measure.reference import open_reference

            reference = open_reference(
                arguments.reference,
                bundle,
                ids,
                windows[0].size,
                threads=arguments.threads,
                weights=arguments.weights,
                trust_remote_code=arguments.trust_remote_code,
                say=say,
            )
        own = BundlePredictor(bundle, **cast("PlacementOptions", placement_of(arguments)))
        with _shown("evaluate") as progress:
            evaluation = evaluate(own, windows, reference, progress=progress)
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


@contextlib.contextmanager
def _shown(stage: str) -> Iterator[Progress]:
    """Shows the stage's progress if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield SILENT
        return
    from .terminal import StageLines

    with StageLines() as stages:
        stages.stage(stage)
        yield stages


def _prints_of_the_module() -> contextlib.AbstractContextManager[object]:
    """Redirects prints of the user's module to standard error: standard output is reserved for the JSON object."""
    return contextlib.redirect_stdout(sys.stderr)


export_command = Command(_add_export_arguments, _export)
verify_command = Command(_add_verify_arguments, _verify)
eval_command = Command(_add_eval_arguments, _eval)
