"""The rules of `check`: small functions that read a bundle's files and yield findings. Each fact has one place.

A finding is a sentence: found, expected, what to do. If it `stops`, the program does not load the bundle or fails at
its first token. Otherwise it warns that the program would return different text, or takes ids only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry, open_bundle
from pastkey.errors import PastkeyError
from pastkey.precisions import PRECISIONS
from pastkey.values import is_int, parse_version

from . import facts
from .bundle_view import BundleView, Graph, Tensor


@dataclass(frozen=True)
class Finding:
    """A finding of one rule."""

    text: str  # a sentence
    stops: bool  # whether the program fails; if not, it is a warning


Rule = Callable[[BundleView, Graph], Iterator[Finding]]


def stop(text: str) -> Finding:
    return Finding(text, stops=True)


def warn(text: str) -> Finding:
    return Finding(text, stops=False)


# --- the graph, for all programs ----------------------------------------------------------------------------------
def graph_is_whole(view: BundleView) -> Iterator[Finding]:
    graph = view.bundle.all_logits_graph
    if view.graph is None:
        yield stop(f"{graph_name(view)} is missing: it is the graph that every program opens, copy the folder again")
        return
    for file, size in view.graph.weights.items():
        path = graph.parent / file
        found = path.stat().st_size if path.is_file() else None
        if found is None or found < size:
            state = "is missing" if found is None else f"has {found} bytes"
            yield stop(f"onnx/{file} {state}; the graph's weights fill {size} bytes of it: copy the folder again")


def graph_name(view: BundleView) -> str:
    return PRECISIONS[view.bundle.manifest.precision].graph


def feeds_every_input(view: BundleView, graph: Graph) -> Iterator[Finding]:
    """Checks the inputs that optimum and transformers.js feed, their dtypes, and the outputs that they read."""
    yield from _feeds(graph, cache_inputs(graph.layers))


def _feeds(graph: Graph, past: set[str]) -> Iterator[Finding]:
    known = {names.INPUT_IDS, names.ATTENTION_MASK, names.POSITION_IDS}
    for name, tensor in graph.inputs.items():
        if name in known and tensor.dtype != "int64":
            yield stop(f"the input {name} is {tensor.dtype}; it is fed as int64: export again")
        elif name not in known | past:
            yield stop(
                f"the graph wants the input {name!r}, which is not fed; {', '.join(sorted(known))} and the past are"
            )
    for name in (names.LOGITS, *(f(i) for i in range(graph.layers) for f in (names.present_key, names.present_value))):
        if name not in graph.outputs:
            yield stop(f"the graph has no output {name!r}, which is read after each step: export again")


def cache_inputs(layers: int) -> set[str]:
    return {name(i) for i in range(layers) for name in (names.past_key, names.past_value)}


def positions_are_fed(view: BundleView, graph: Graph) -> Iterator[Finding]:
    if names.POSITION_IDS not in graph.inputs:
        yield warn("the graph takes no position_ids: in a padded batch a row's positions count its padding")


def pads_as_the_graph_does(view: BundleView, graph: Graph) -> Iterator[Finding]:
    if view.bundle.manifest.graph == "fused":
        yield warn(
            "prompts of different lengths in one batch are padded on the left, where the fused graph wants the padding "
            "on the right, and silently get other text: one prompt at a time, or export with --graph standard"
        )


def is_recent_enough(package: str) -> Rule:
    def rule(view: BundleView, graph: Graph) -> Iterator[Finding]:
        found, needed = facts.ONNXRUNTIME_OF[package], view.bundle.manifest.min_onnxruntime
        if parse_version(found) < parse_version(needed):
            yield stop(f"it runs on {package} {found}; the graph needs onnxruntime {needed}: use a newer release")

    return rule


# --- pastkey and plain onnxruntime --------------------------------------------------------------------------------
def pastkey_opens(view: BundleView, graph: Graph) -> Iterator[Finding]:
    manifest = view.bundle.manifest
    try:
        open_bundle(view.bundle.path)
    except PastkeyError as error:
        yield stop(str(error))
    for layer, geometry in enumerate(manifest.layers):
        if graph.geometry(layer) != geometry:
            yield stop(
                f"{names.past_key(layer)} and its value are {_shown(graph, layer)} in the graph; {names.MANIFEST} says "
                f"{sizes(geometry)}: export again"
            )


def pastkey_feeds_every_input(view: BundleView, graph: Graph) -> Iterator[Finding]:
    """As `feeds_every_input`, plus the states of short convolutions that the manifest lists."""
    states = view.bundle.manifest.states
    for i, state in enumerate(states):
        found, expected = graph.inputs.get(names.past_conv(i)), (names.BATCH, names.PAST_ROWS, state.size)
        if found is None or found.shape != expected:
            yield stop(
                f"{names.past_conv(i)} is {'not' if found is None else found.shape} in the graph; {names.MANIFEST} "
                f"says {expected}: export again"
            )
        if names.present_conv(i) not in graph.outputs:
            yield stop(
                f"the graph has no output {names.present_conv(i)!r}, which is read after each step: export again"
            )
    yield from _feeds(graph, cache_inputs(graph.layers) | {names.past_conv(i) for i in range(len(states))})


def has_a_tokenizer(view: BundleView, graph: Graph) -> Iterator[Finding]:
    if not view.has_tokenizer:
        yield warn(f"it takes ids only: {view.tokenizer.problem}; export with --tokenizer for text")


def plain_loop_must_know(view: BundleView, graph: Graph) -> Iterator[Finding]:
    if view.bundle.manifest.graph == "fused":
        yield warn("pad a batch on the right, and append one token per row at a time: so the fused graph counts")
    if view.special_ids:
        yield warn(f"encode prompts with special tokens, as tokenizers does by default: {expected_tokens(view)}")


def expected_tokens(view: BundleView) -> str:
    """The reason why text differs without special tokens such as BOS."""
    return f"since the model expects the tokens {list(view.special_ids)} that tokenizer.json adds to a prompt"


# --- onnxruntime-genai --------------------------------------------------------------------------------------------
def genai_config_fits(view: BundleView, graph: Graph) -> Iterator[Finding]:
    config = view.genai_config
    if config.problem:
        yield stop(f"{config.problem}: it is all that the program reads; export again")
        return
    kind, decoder = str(config.section("model").get("type")), config.section("model", "decoder")
    if kind not in facts.GENAI_TYPES:
        yield stop(f'{names.GENAI_CONFIG} has the model type {kind!r}, which it does not know: write "decoder"')
    if decoder.get("filename") != graph_name(view):
        yield stop(f"{names.GENAI_CONFIG} names the graph {decoder.get('filename')!r}; it is {graph_name(view)!r}")
    for layer in range(graph.layers):
        geometry = graph.geometry(layer)
        if geometry and geometry.key_head_size != geometry.value_head_size:
            yield stop(f"it makes keys and values of one size; layer {layer} of the graph has {sizes(geometry)}")
            break
    yield from _genai_sizes_agree(decoder, graph)
    vocab = graph.outputs.get(names.LOGITS, Tensor("", (0,))).shape[-1]
    if isinstance(vocab, int) and config.section("model").get("vocab_size") != vocab:
        yield stop(_differs("vocab_size", config.section("model").get("vocab_size"), f"logits of {vocab}"))


def _genai_sizes_agree(decoder: Mapping[str, Any], graph: Graph) -> Iterator[Finding]:
    """Warns about releases before GENAI_SIZES_SINCE, which read the sizes from the configuration."""
    said = tuple(decoder.get(key) for key in ("num_hidden_layers", "num_key_value_heads", "head_size"))
    for layer in range(graph.layers):
        geometry = graph.geometry(layer)
        if geometry and said != (graph.layers, geometry.kv_heads, geometry.key_head_size):
            yield warn(
                f"{names.GENAI_CONFIG} says {said[0]} layers of {said[1]} heads of size {said[2]}, the graph has "
                f"{graph.layers} layers, number {layer} with {sizes(geometry)}: releases before "
                f"{facts.GENAI_SIZES_SINCE} fail on it"
            )
            return


def _differs(key: str, found: Any, expected: str) -> str:
    return f"{names.GENAI_CONFIG} has {key} {found!r}; the graph has {expected}: export again"


def genai_feeds_every_input(view: BundleView, graph: Graph) -> Iterator[Finding]:
    if view.genai_config.problem:
        return
    given = facts.GENAI_INPUTS | dict(view.genai_config.section("model", "decoder", "inputs"))
    fed: set[str] = set()
    for pattern in given.values():
        if isinstance(pattern, str):
            fed |= {pattern.replace("%d", str(i)) for i in range(graph.layers)}
    for name in sorted(set(graph.inputs) - fed):
        yield stop(f"the graph wants the input {name!r}, which {names.GENAI_CONFIG} does not name under inputs")
    dtypes = {
        key: graph.inputs[given[key]].dtype
        for key in ("position_ids", "attention_mask")
        if isinstance(given.get(key), str) and given[key] in graph.inputs
    }
    if len(set(dtypes.values())) > 1:
        yield stop(f"position_ids and attention_mask must have one dtype; the graph's are {dtypes}: export again")


def genai_search_fits(view: BundleView, graph: Graph) -> Iterator[Finding]:
    if view.genai_config.problem:
        return
    search, context = (
        view.genai_config.section("search"),
        view.genai_config.section("model").get("context_length"),
    )
    longest = search.get("max_length")
    if longest is None:
        yield warn(f"search.max_length is not set: the cache of all {context} tokens is taken at once, set it")
    elif is_int(longest) and is_int(context) and longest > context:
        yield warn(
            f"search.max_length is {longest}, more than the context_length {context}, which it refuses: lower it, or "
            "call set_search_options(max_length=...)"
        )
    if search.get("past_present_share_buffer") and view.bundle.manifest.graph != "fused":
        yield stop(
            "search.past_present_share_buffer is true, and only a fused graph writes past and present in one buffer: "
            "set it to false"
        )
    yield from _samples(search, f"search of {names.GENAI_CONFIG}")


def genai_tokenizer(view: BundleView, graph: Graph) -> Iterator[Finding]:
    if not view.has_tokenizer or view.tokenizer_config.problem:
        missing = view.tokenizer.problem or view.tokenizer_config.problem
        yield warn(f"it takes ids only: {missing}")
        return
    model = str(view.tokenizer.section("model").get("type"))
    kind = str(view.tokenizer_config.get("tokenizer_class", ""))
    if model not in facts.GENAI_TOKENIZER_MODELS:
        yield warn(f"it takes ids only: it cannot read a tokenizer.json of the kind {model!r}, only BPE")
    elif kind and kind.removesuffix("Fast") not in facts.GENAI_TOKENIZER_CLASSES:
        yield warn(
            f"it takes ids only: it does not know the tokenizer_class {kind!r}; write {names.TOKENIZER_CLASS} in "
            f"{names.TOKENIZER_CONFIG}"
        )
    elif view.special_ids:
        yield warn(
            f"it silently gives other text, {expected_tokens(view)}, which it leaves out: call "
            'tokenizer.update_options(add_special_tokens="true") first'
        )


# --- generation_config.json and the like --------------------------------------------------------------------------
def _samples(settings: Any, where: str) -> Iterator[Finding]:
    """Warns about settings that change greedy text."""
    penalty = settings.get("repetition_penalty")
    if settings.get("do_sample"):
        yield warn(f"{where} says do_sample: it draws at random where pastkey takes the likeliest token")
    if penalty not in (None, 1, 1.0):
        yield warn(f"{where} says repetition_penalty {penalty}: pass 1.0 for the text that pastkey gives by default")


def generation_config_fits(view: BundleView, graph: Graph) -> Iterator[Finding]:
    generation = view.generation_config
    yield from _samples(generation, names.GENERATION_CONFIG)
    yield from _ends(view, generation.get("eos_token_id"), generation.problem or names.GENERATION_CONFIG)


def genai_ends(view: BundleView, graph: Graph) -> Iterator[Finding]:
    if view.genai_config.problem is None:  # otherwise genai_config_fits reports it
        yield from _ends(view, view.genai_config.section("model").get("eos_token_id"), names.GENAI_CONFIG)


def _ends(view: BundleView, found: Any, where: str) -> Iterator[Finding]:
    ends = found if isinstance(found, list) else [found]
    for token in (token for token in view.bundle.manifest.eos_token_ids if token not in ends):
        yield warn(f"it does not stop at the EOS token {token}: {where} has eos_token_id {found!r}, add it there")


# --- showing sizes ------------------------------------------------------------------------------------------------
def _tuple(geometry: KVGeometry) -> tuple[int, int, int]:
    return geometry.kv_heads, geometry.key_head_size, geometry.value_head_size


def sizes(geometry: KVGeometry) -> str:
    heads, key, value = _tuple(geometry)
    return f"{heads} heads of size {key}" + (f" for keys and {value} for values" if key != value else "")


def _shown(graph: Graph, layer: int) -> str:
    geometry, key = graph.geometry(layer), graph.inputs.get(names.past_key(layer))
    return sizes(geometry) if geometry else str(key.shape) if key else "not"
