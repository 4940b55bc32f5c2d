"""Judges from a bundle's files which other programs can load it. A program is a list of rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pastkey.contract.bundle import read_bundle
from pastkey.precisions import PRECISIONS

from . import facts, hub_rules, rules
from .bundle_view import BundleView, read_bundle_view


@dataclass(frozen=True)
class Verdict:
    """The result for one program."""

    program: str
    how: str  # the code that loads the bundle
    reasons: tuple[str, ...]  # why it cannot load the bundle
    warnings: tuple[str, ...]  # how its text would silently differ

    @property
    def loads(self) -> bool:
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        return {
            "loads": self.loads,
            "how": self.how,
            "reasons": list(self.reasons),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class _Program:
    name: str
    how: Callable[[BundleView], str]
    rules: tuple[rules.Rule, ...]


def check(path: str | Path) -> tuple[Verdict, ...]:
    """Returns one verdict per program.

    Raises MissingFileError, InputError or IntegrityError if there is no bundle, or its manifest or graph cannot be
    read. A missing or altered file raises no error: the verdicts name it.
    """
    view = read_bundle_view(read_bundle(path))
    return tuple(_judge(program, view) for program in _PROGRAMS)


def _judge(program: _Program, view: BundleView) -> Verdict:
    findings = list(rules.graph_is_whole(view))
    if view.graph is not None:
        findings += [finding for rule in program.rules for finding in rule(view, view.graph)]
    chosen = {stops: tuple(dict.fromkeys(f.text for f in findings if f.stops is stops)) for stops in (True, False)}
    return Verdict(program.name, program.how(view), chosen[True], chosen[False])


# --- the programs -------------------------------------------------------------------------------------------------
def _javascript(where: str, package: str) -> _Program:
    return _Program(
        f"transformers.js in {'Node' if where == 'Node' else 'a browser'}",
        lambda c: (
            f"AutoModelForCausalLM.from_pretrained({str(c.bundle.path)!r}, "
            f"{{ dtype: {PRECISIONS[c.bundle.manifest.precision].transformers_js!r} }})  // {facts.TRANSFORMERS_JS}"
        ),
        (
            hub_rules.js_knows_the_model,
            hub_rules.js_makes_the_cache,
            hub_rules.js_finds_the_files(where),
            rules.feeds_every_input,
            rules.is_recent_enough(package),
            hub_rules.js_tokenizer,
            rules.generation_config_fits,
            rules.positions_are_fed,
            rules.pads_as_the_graph_does,
        ),
    )


_PROGRAMS = (
    _Program(
        "pastkey",
        lambda c: f"pastkey.load({str(c.bundle.path)!r})",
        (rules.pastkey_opens, rules.pastkey_feeds_every_input, rules.has_a_tokenizer),
    ),
    _Program(
        "onnxruntime",
        lambda c: (
            f"onnxruntime.InferenceSession({str(c.bundle.all_logits_graph)!r})"
            f"  # {c.bundle.manifest.min_onnxruntime} or newer; feed every input, an empty past at first"
        ),
        (rules.plain_loop_must_know,),
    ),
    _Program(
        "onnxruntime-genai",
        lambda c: f"onnxruntime_genai.Model({str(c.bundle.path)!r})  # {facts.GENAI}",
        (
            rules.genai_config_fits,
            rules.genai_feeds_every_input,
            rules.genai_search_fits,
            rules.is_recent_enough("onnxruntime-genai"),
            rules.genai_tokenizer,
            rules.genai_ends,
            rules.positions_are_fed,
        ),
    ),
    _Program(
        "optimum",
        lambda c: (
            f"ORTModelForCausalLM.from_pretrained({str(c.bundle.path)!r}, subfolder='onnx', "
            f"file_name={c.bundle.all_logits_graph.name!r})  # {facts.OPTIMUM}"
        ),
        (
            hub_rules.optimum_makes_the_cache,
            rules.feeds_every_input,
            hub_rules.optimum_tokenizer,
            rules.generation_config_fits,
            rules.positions_are_fed,
            rules.pads_as_the_graph_does,
            hub_rules.rope_is_said_twice,
        ),
    ),
    _javascript("Node", "onnxruntime-node"),
    _javascript("browser", "onnxruntime-web"),
)
