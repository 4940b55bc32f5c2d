"""The rules of `check` for the programs that read Hugging Face's files: optimum and transformers.js."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pastkey.contract import names
from pastkey.precisions import PRECISIONS

from . import facts
from .bundle_view import BundleView, Graph
from .rules import Finding, Rule, cache_inputs, expected_tokens, graph_name, sizes, stop, warn


# --- optimum ------------------------------------------------------------------------------------------------------
def optimum_makes_the_cache(view: BundleView, graph: Graph) -> Iterator[Finding]:
    config = view.config
    if config.problem:
        yield stop(f"{config.problem}; expected the sizes of the cache and a known model_type")
        return
    kind = str(config.get("model_type"))
    if kind not in facts.TRANSFORMERS_TYPES:
        yield stop(
            f"config.json has the model_type {kind!r}, which transformers {facts.TRANSFORMERS_VERSION} does not "
            f"know{_none_fits(kind)}"
        )
        return
    cache = facts.optimum_cache(config.content)
    if isinstance(cache, str):
        yield stop(f"config.json has no {cache}, which the empty cache is made from")
        return
    for layer in range(graph.layers):
        geometry = graph.geometry(layer)
        if geometry and geometry != cache.geometry:
            yield stop(
                f"it makes a cache of {sizes(cache.geometry)} for the model_type {kind!r} ({cache.because} of "
                f"config.json); layer {layer} of the graph has {sizes(geometry)}"
            )
            return
    past = graph.inputs.get(names.past_key(0))
    if past is not None and past.dtype not in ("float32", "float16"):
        yield stop(f"the graph's cache is {past.dtype}; it makes float32 or float16: export without a quantized cache")


def _none_fits(kind: Any) -> str:
    if kind != facts.UNKNOWN_TYPE:
        return ""
    return ": no model type has this graph's cache, use pastkey or plain onnxruntime"


def optimum_tokenizer(view: BundleView, graph: Graph) -> Iterator[Finding]:
    if not view.has_tokenizer:
        yield warn(f"it takes ids only: {view.tokenizer.problem}")
        return
    config = view.tokenizer_config
    kind = config.get("tokenizer_class")
    takes = config.get("model_input_names")
    if str(kind).startswith("PreTrainedTokenizer") and not (isinstance(takes, list) and "token_type_ids" not in takes):
        yield warn(
            'the tokenizer also returns token_type_ids, which generate(**inputs) refuses: write "model_input_names": '
            f'["input_ids", "attention_mask"] in {names.TOKENIZER_CONFIG}'
        )
    if kind is None:
        yield warn(
            f"{names.TOKENIZER_CONFIG} has no tokenizer_class, so transformers goes by the model_type of config.json "
            f"and may add tokens of its own: write {names.TOKENIZER_CLASS}"
        )
    elif str(kind).endswith("Backend"):
        yield warn(
            f"transformers {facts.TRANSFORMERS_VERSION} does not know the tokenizer_class {kind!r}: write "
            f"{names.TOKENIZER_CLASS}"
        )
    elif str(kind).removesuffix("Fast") in facts.TRANSFORMERS_ADDS_BOS:
        adds = bool(config.get("add_bos_token", True))
        if adds != view.adds_bos:
            yield warn(
                f"a {kind} {'adds a' if adds else 'leaves out the'} BOS token where tokenizer.json, and so pastkey, "
                f"{'adds none' if adds else 'adds it'}: set add_bos_token to {str(not adds).lower()} in "
                f"{names.TOKENIZER_CONFIG}"
            )


def rope_is_said_twice(view: BundleView, graph: Graph) -> Iterator[Finding]:
    theta, wanted = view.config.get("rope_theta"), view.config.section("rope_parameters").get("rope_theta")
    if theta != wanted and (wanted is not None):
        yield warn(
            f"config.json has rope_parameters.rope_theta {wanted} and rope_theta {theta}: transformers 5 reads the "
            f"first, {facts.TRANSFORMERS_VERSION} the second; the graph is right, a model built from config.json is "
            "not: write both"
        )


# --- transformers.js ----------------------------------------------------------------------------------------------
def js_knows_the_model(view: BundleView, graph: Graph) -> Iterator[Finding]:
    config = view.config
    if config.problem:
        yield stop(f"{config.problem}; expected the number of layers and a known model_type")
        return
    kind = str(config.get("model_type"))
    key = facts.js_layers_key(kind)
    if key is None:
        yield stop(f"config.json has the model_type {kind!r}, which it does not have{_none_fits(kind)}")
    elif not isinstance(config.get(key), int) or config.get(key) < graph.layers:
        yield stop(f"config.json has {key} {config.get(key)!r}; the graph has the cache of {graph.layers} layers")


def js_makes_the_cache(view: BundleView, graph: Graph) -> Iterator[Finding]:
    for name in sorted(cache_inputs(graph.layers) & set(graph.inputs)):
        shape = graph.inputs[name].shape
        wrong = len(shape) != 4 or shape[0] not in (names.BATCH, 1) or not isinstance(shape[2], str)
        if wrong or any(isinstance(shape[axis], str) for axis in (1, 3)):
            yield stop(
                f"{name} is {shape}; the empty cache is made from these axes, where any name but {names.BATCH} is 0: "
                f"expected ({names.BATCH}, heads, {names.PAST}, size) with numbers for heads and size, export again"
            )
            return


def js_finds_the_files(where: str) -> Rule:
    def rule(view: BundleView, graph: Graph) -> Iterator[Finding]:
        settings = view.config.section("transformers.js_config")
        mine = PRECISIONS[view.bundle.manifest.precision].transformers_js
        chosen = settings.get("dtype")
        chosen = chosen.get("model") if isinstance(chosen, dict) else chosen
        default = chosen if chosen not in (None, "auto") else facts.JS_DEFAULT_DTYPE[where]
        file = facts.JS_GRAPH.get(str(default), f"onnx/model_{default}.onnx")
        if file != graph_name(view):
            yield warn(
                f"{file}, which it opens by default, is not there: pass {{ dtype: {mine!r} }}, or "
                "write dtype under transformers.js_config in config.json"
            )
        yield from _js_finds_the_weights(where, view, graph, settings.get("use_external_data_format"))

    return rule


def _js_finds_the_weights(where: str, view: BundleView, graph: Graph, declared: Any) -> Iterator[Finding]:
    file = Path(graph_name(view)).name
    count = declared.get(file, declared.get("model", 0)) if isinstance(declared, dict) else declared
    chunks = min(int(count), names.MAX_SHARDS) if isinstance(count, int) else 0  # true counts as 1
    fetched = {names.weights_file(file, i) for i in range(chunks)}
    folder = view.bundle.all_logits_graph.parent
    for name in sorted(fetched - set(graph.weights)):
        if not (folder / name).is_file():
            yield stop(
                f"use_external_data_format in config.json declares onnx/{name}, which does not exist: correct it"
            )
    for name in sorted(set(graph.weights) - fetched):
        text = (
            f'the weights onnx/{name} are not declared: write {{"{file}": {len(graph.weights)}}} under '
            "transformers.js_config.use_external_data_format in config.json, and name them "
            f"{names.weights_file(file)}"
        )
        yield (
            stop(text) if where == "browser" else warn(f"{text}; from a local folder it loads, from a hub it does not")
        )
    for name, size in graph.weights.items():
        if where == "browser" and size >= 2**31:
            yield warn(
                f"onnx/{name} has {size:,} bytes; a browser may refuse a file of 2 GiB and more: export with "
                "--shard-size 2GB"
            )


def js_tokenizer(view: BundleView, graph: Graph) -> Iterator[Finding]:
    config = view.tokenizer_config
    if not view.has_tokenizer or config.problem:
        yield warn(f"it takes ids only: {view.tokenizer.problem or config.problem}")
        return
    for place, known in facts.JS_TOKENIZER_PARTS.items():
        for kind in _kinds(view.tokenizer.get(place)):
            if kind not in known:
                yield warn(f"it takes ids only: it does not know the {place} {kind!r} of tokenizer.json")
    if view.special_ids and not (config.get("add_bos_token") or config.get("add_eos_token")):
        yield warn(
            f"its text-generation pipeline silently gives other text, {expected_tokens(view)}, which it leaves "
            f'out: write "add_bos_token": true in {names.TOKENIZER_CONFIG}'
        )
    if names.CHAT_TEMPLATE in view.bundle.manifest.files and not config.get("chat_template"):
        yield warn(
            f"it does not read {names.CHAT_TEMPLATE}: put the template under chat_template in {names.TOKENIZER_CONFIG}"
        )


def _kinds(part: Any) -> Iterator[str]:
    """Yields the types of a tokenizer component and of its nested components."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in ("normalizers", "pretokenizers", "processors", "decoders"):
            for child in part.get(inner) or ():
                yield from _kinds(child)
