"""A tiny decoder as a bundle, written in ONNX's textual syntax, and the same function in numpy.

The runtime is tested against this, so that its tests need neither torch nor the exporter. Learned positions, H query
heads over K key/value heads, two attention calls, no normalisation: x += attention(x); logits = x · embedding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract import names
from pastkey.contract.bundle import Bundle, CacheShift, KVGeometry, Manifest, StaticShape, open_bundle
from pastkey.files.durable import write_json
from pastkey.files.folder import file_records
from pastkey.precisions import PRECISIONS
from pastkey.runtime import Engine
from pastkey.runtime.engine.golden import Golden

from ..onnx_text import encode_model

V, E, H, K = 37, 24, 4, 2
ALPHABET = "abcdefghijklmnopqrstuvwxyzé日 .<>ABCDE"  # of the decoder's ids, from 0
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tiny:
    """Sizes and weights of the decoder."""

    layers: tuple[KVGeometry, ...]
    context_length: int
    weights: Mapping[str, Array]

    @classmethod
    def random(cls, sizes: Sequence[tuple[int, int]], context_length: int, seed: int = 0) -> Tiny:
        """`sizes` holds the head size of keys and of values of each attention call."""
        rng = np.random.default_rng(seed)
        shapes = {"embedding": (V, E), "position": (context_length, E)}
        for i, (key, value) in enumerate(sizes):
            shapes |= {
                f"wq{i}": (E, H * key),
                f"wk{i}": (E, K * key),
                f"wv{i}": (E, K * value),
                f"wo{i}": (H * value, E),
            }
        weights = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
        return cls(tuple(KVGeometry(K, key, value) for key, value in sizes), context_length, weights)

    def text(self, graph: str, **options: Any) -> str:
        """See `tiny_graph`."""
        return tiny_graph(self, graph, **options)

    def saying(self, script: Sequence[int]) -> Tiny:
        """A decoder of these sizes whose token after position i is `script[i]`, whatever came before."""
        embedding = np.random.default_rng(0).normal(size=(V, E))
        embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
        weights = {name: np.zeros_like(weight) for name, weight in self.weights.items()}
        weights["embedding"] = embedding.astype(np.float32)
        weights["position"][: len(script)] = 50 * embedding[list(script)]
        return Tiny(self.layers, self.context_length, weights)

    def spoilt(self, places: slice, number: float = np.nan) -> Tiny:
        """A decoder that computes this number at these positions."""
        position = self.weights["position"].copy()
        position[places] = number
        return Tiny(self.layers, self.context_length, {**self.weights, "position": position})

    def __call__(self, ids: Sequence[int] | Array) -> Array:
        """The reference: logits (T, V) of an uncached pass over one row, in float64."""
        logits: Array = self.hidden_states(ids) @ self.weights["embedding"].astype(np.float64).T
        return logits

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The slow obvious way: the whole text again for each of so many tokens."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(np.argmax(self(ids)[-1])))
        return ids[len(prompt) :]

    def hidden_states(self, ids: Sequence[int] | Array) -> Array:
        """The factor of their multiplication, (T, E)."""
        w = {name: weight.astype(np.float64) for name, weight in self.weights.items()}
        x = w["embedding"][list(ids)] + w["position"][: len(ids)]  # (T, E)
        for i in range(len(self.layers)):
            q, k, v = projected(x, w, i)
            x = x + attended(q, k, v, np.tri(len(ids), dtype=bool)) @ w[f"wo{i}"]
        return x


def projected(x: Array, weights: Mapping[str, Array], i: int) -> list[Array]:
    """Queries (T, H, D), keys (T, K, D) and values (T, K, DV) of an attention call."""
    return [(x @ weights[f"w{n}{i}"]).reshape(len(x), heads, -1) for n, heads in (("q", H), ("k", K), ("v", K))]


def attended(q: Array, keys: Array, values: Array, seen: Array) -> Array:
    """(T, H * DV): each query head over the keys and values (S, K, ...) of its group, where `seen` (T, S)."""
    heads = []
    for h in range(H):
        scores = q[:, h] @ keys[:, h // (H // K)].T / np.sqrt(q.shape[-1])
        scores = np.exp(np.where(seen, scores, -np.inf))
        heads.append(scores / scores.sum(axis=-1, keepdims=True) @ values[:, h // (H // K)])
    return np.concatenate(heads, axis=-1)


FUSED_MASK = """
    one = Constant <value_ints = [1]> ()
    real = ReduceSum <keepdims = 0> (attention_mask, one)
    last = Sub(real, one)
    seqlens = Cast <to = 6> (last)
    mask_shape = Shape <start = 1> (attention_mask)
    scalar = Squeeze(mask_shape)
    total = Cast <to = 6> (scalar)
"""
LENGTHS = """
    seqlens = Identity(seqlens_k)
    total = Identity(total_sequence_length)
"""
FUSED_ATTENTION = """
    a{i}, present.{i}.key, present.{i}.value =
        com.microsoft.GroupQueryAttention <num_heads = {H}, kv_num_heads = {K}>
        (q{i}, k{i}, v{i}, past_key_values.{i}.key, past_key_values.{i}.value, seqlens, total)
"""
STANDARD_MASK = """
    zero = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    mask_shape = Shape <start = 1> (attention_mask)
    ids_shape = Shape <start = 1> (input_ids)
    s = Squeeze(mask_shape)
    t = Squeeze(ids_shape)
    p = Sub(s, t)
    columns = Range(zero, s, step)
    rows = Range(p, s, step)
    rows_up = Unsqueeze(rows, axis1)
    causal = LessOrEqual(columns, rows_up)
    real = Cast <to = 9> (attention_mask)
    real_up = Unsqueeze(real, axis1)
    allowed = And(causal, real_up)
    nought = Constant <value_float = 0.0> ()
    minus = Constant <value_float = -1000000000.0> ()
    bias3 = Where(allowed, nought, minus)
    bias = Unsqueeze(bias3, axis1)
"""
# A group's query heads are below one another, (B, K, H/K * T, D), so that keys and values need no repetition.
STANDARD_ATTENTION = """
    qs{i} = Constant <value_ints = [0, 0, {H}, {D}]> ()
    ks{i} = Constant <value_ints = [0, 0, {K}, {D}]> ()
    vs{i} = Constant <value_ints = [0, 0, {K}, {DV}]> ()
    group{i} = Constant <value_ints = [0, {K}, -1, {D}]> ()
    heads{i} = Constant <value_ints = [0, {H}, -1, 0]> ()
    groups{i} = Constant <value_ints = [0, {K}, -1, 0]> ()
    apart{i} = Constant <value_ints = [0, {H}, -1, {DV}]> ()
    flat{i} = Constant <value_ints = [0, 0, -1]> ()
    scale{i} = Constant <value_float = {SCALE}> ()
    q4{i} = Reshape(q{i}, qs{i})
    qt{i} = Transpose <perm = [0, 2, 1, 3]> (q4{i})
    qg{i} = Reshape(qt{i}, group{i})
    k4{i} = Reshape(k{i}, ks{i})
    kt{i} = Transpose <perm = [0, 2, 1, 3]> (k4{i})
    v4{i} = Reshape(v{i}, vs{i})
    vt{i} = Transpose <perm = [0, 2, 1, 3]> (v4{i})
    present.{i}.key = Concat <axis = 2> (past_key_values.{i}.key, kt{i})
    present.{i}.value = Concat <axis = 2> (past_key_values.{i}.value, vt{i})
    kk{i} = Transpose <perm = [0, 1, 3, 2]> (present.{i}.key)
    dot{i} = MatMul(qg{i}, kk{i})
    scaled{i} = Mul(dot{i}, scale{i})
    byhead{i} = Reshape(scaled{i}, heads{i})
    biased{i} = Add(byhead{i}, bias)
    soft{i} = Softmax <axis = -1> (biased{i})
    bygroup{i} = Reshape(soft{i}, groups{i})
    out{i} = MatMul(bygroup{i}, present.{i}.value)
    outh{i} = Reshape(out{i}, apart{i})
    outt{i} = Transpose <perm = [0, 2, 1, 3]> (outh{i})
    a{i} = Reshape(outt{i}, flat{i})
"""


# The mask is given, and only the values of new tokens are returned.
STATIC_ATTENTION = (
    STANDARD_ATTENTION.replace("present.{i}.key", "keys{i}")
    .replace("present.{i}.value", "values{i}")
    .replace("kt{i}", "present.{i}.key")
    .replace("vt{i}", "present.{i}.value")
    .replace(", bias)", ", mask)")
)


def static_graph(tiny: Tiny, tokens: int) -> str:
    """The decoder as a static graph of so many new tokens, as ONNX text without its weights."""
    text = tiny.text("static", last_only=False)
    sizes = {"B": 1, "T": tokens, "S": tiny.context_length + tokens}
    sizes |= {f"P{i}": tiny.context_length for i in range(len(tiny.layers))}
    sizes |= {f"S{i}": tokens for i in range(len(tiny.layers))}  # of present
    for name, size in sizes.items():
        text = re.sub(rf"(?<=[\[ ]){name}(?=[\],])", str(size), text)
    return text


def tiny_graph(tiny: Tiny, graph: str, *, last_only: bool, hidden: bool = False) -> str:
    """The decoder with a cache, as ONNX text without its weights.

    A graph of last positions with `hidden` has the last hidden states as an output.
    """
    mask, attention = {
        "static": ("", STATIC_ATTENTION),
        "fused": (FUSED_MASK, FUSED_ATTENTION),
        "standard": (STANDARD_MASK, STANDARD_ATTENTION),
    }[graph]
    inputs = ["int64[B, T] input_ids", "int64[B, T] position_ids"]
    if graph == "static":
        inputs = ["int32[B, T] input_ids", "float[B, 1, T, S] mask", "int32[B, T] position_ids"]
    elif mask is FUSED_MASK and last_only:
        mask = LENGTHS
        inputs += ["int32[B] seqlens_k", "int32 total_sequence_length"]
    else:
        inputs.append("int64[B, S] attention_mask")
    if last_only:
        inputs.append("int64[1] logits_start")
    outputs = [f"float[B, {'N' if last_only else 'T'}, {V}] logits"]
    body = (
        mask + "word = Gather(embedding, input_ids)\n place = Gather(position, position_ids)\n x0 = Add(word, place)\n"
    )
    for i, layer in enumerate(tiny.layers):
        for kind, size in (("key", layer.key_head_size), ("value", layer.value_head_size)):
            inputs.append(f"float[B, {K}, P{i}, {size}] past_key_values.{i}.{kind}")
            outputs.append(f"float[B, {K}, S{i}, {size}] present.{i}.{kind}")
        sizes = {"D": layer.key_head_size, "DV": layer.value_head_size, "SCALE": repr(layer.key_head_size**-0.5)}
        body += "".join(f"{name}{i} = MatMul(x{i}, w{name}{i})\n" for name in "qkv")
        body += attention.format(i=i, H=H, K=K, **sizes)
        body += f"o{i} = MatMul(a{i}, wo{i})\n x{i + 1} = Add(x{i}, o{i})\n"
    end = f"x{len(tiny.layers)}"
    if hidden:
        outputs.append(f"float[B, T, {E}] {names.LAST_HIDDEN_STATE}")
        body += f"{names.LAST_HIDDEN_STATE} = Identity({end})\n"
    if last_only:
        body += "many = Constant <value_ints = [9999]> ()\n axis = Constant <value_ints = [1]> ()\n"
        body += f"start = Identity(logits_start)\nend = Slice({end}, start, many, axis)\n"
        end = "end"
    body += f"head = Transpose <perm = [1, 0]> (embedding)\n logits = MatMul({end}, head)\n"
    text = (
        '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>\n'
        f"tiny ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n{body}}}"
    )
    # The syntax wants quotes around a name with dots in it.
    return re.sub(r"(past_key_values|present)\.\d\.\w+", r'"\g<0>"', text)


PROJECTION = re.compile(r"(\w+) = MatMul\((\w+), (w[qkvo]\d)\)")


def adapter_graph(tiny: Tiny, graph: str) -> tuple[str, dict[str, str]]:
    """The graph of last positions with (x A) B behind each projection, as ONNX text, and its metadata."""
    text, inputs = tiny.text(graph, last_only=True), ""
    pairs = []
    for number, found in enumerate(PROJECTION.finditer(text)):
        out, x, weight = found.groups()
        columns, rows = tiny.weights[weight].shape
        inputs += f', float[{columns}, R{number}] "lora_A.{number}", float[R{number}, {rows}] "lora_B.{number}"'
        low = f'low{number} = MatMul({x}, "lora_A.{number}")\n more{number} = MatMul(low{number}, "lora_B.{number}")'
        new = f"base{number} = MatMul({x}, {weight})\n {low}\n {out} = Add(base{number}, more{number})"
        text = text.replace(found[0], new)
        pairs.append([[f"model.{weight}", f"model.{weight}.weight", rows]])
    return text.replace(") => (", f"{inputs}) => (", 1), {names.ADAPTED: json.dumps(pairs)}


def write_bundle(folder: Path, tiny: Tiny, graph: str, **fields: Any) -> Bundle:
    """Writes `tiny` as a bundle; `fields` replace the manifest's. Files already in the folder are listed.

    With `adapters=True`, there is the graph for LoRA adapters, and with `golden=True` there are golden logits.
    With `data_file=NAME`, the weights are in that file next to the graphs, and with `hidden_size=E` the graphs of last
    positions give the last hidden states. A static one needs `chunk`.
    """
    (folder / "onnx").mkdir(parents=True)
    data_file = fields.pop("data_file", "")
    common = "standard" if graph == "static" else graph
    texts = {PRECISIONS["fp32"].graph: tiny.text(common, last_only=False)}
    if graph == "static":
        fields.setdefault("static", StaticShape(fields.pop("chunk"), -1e4, (0,)))
        texts[names.STATIC_DECODE_GRAPH] = static_graph(tiny, 1)
        texts[names.STATIC_PREFILL_GRAPH] = static_graph(tiny, fields["static"].chunk)
    else:
        texts[names.LAST_LOGITS_GRAPH] = tiny.text(graph, last_only=True, hidden="hidden_size" in fields)
    for path, text in texts.items():
        model, data = encode_model(text, tiny.weights, data_file)
        (folder / path).write_bytes(model)
        if data_file:
            (folder / path).with_name(data_file).write_bytes(data)
    if fields.pop("adapters", False):
        text, metadata = adapter_graph(tiny, graph)
        (folder / names.ADAPTER_GRAPH).write_bytes(encode_model(text, tiny.weights, metadata=metadata)[0])
    tokenizer = fields.pop("tokenizer", None)
    if tokenizer is not None:
        tokenizer.save(str(folder / names.TOKENIZER))
    if "tokenizer_config" in fields:
        write_json(folder / names.TOKENIZER_CONFIG, fields.pop("tokenizer_config"))
    if "generation_config" in fields:
        write_json(folder / names.GENERATION_CONFIG, fields.pop("generation_config"))
    manifest: dict[str, Any] = {
        "pastkey_version": "0", "source": "tiny", "precision": "fp32", "target": "cpu", "graph": graph,
        "graph_reason": "asked for", "vocab_size": V, "context_length": tiny.context_length, "layers": tiny.layers,
        "opset": 17, "ir_version": 8, "min_onnxruntime": "1.23.0",
        "shift": CacheShift("positions are learned"),
        "files": file_records(folder, [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]),
    }  # fmt: skip
    golden = fields.pop("golden", False)
    write_json(folder / names.MANIFEST, Manifest(**(manifest | fields)).to_json())
    return with_golden(open_bundle(folder, verify=False)) if golden else open_bundle(folder, verify=False)


def with_golden(bundle: Bundle) -> Bundle:
    """Adds golden logits of this CPU."""
    limit = PRECISIONS[bundle.manifest.precision].golden_limit
    Golden.computed(Engine(bundle, threads=1), 5, limit).save(bundle.path / names.GOLDEN)
    return relisted(bundle.path, names.GOLDEN)


def relisted(folder: Path, *more: str, **fields: Any) -> Bundle:
    """The bundle with its files as they are by now, `more` among them, and with other fields of the manifest."""
    content = json.loads((folder / names.MANIFEST).read_bytes())
    files = file_records(folder, [*content["files"], *more])
    write_json(folder / names.MANIFEST, content | {"files": files} | fields)
    return open_bundle(folder, verify=False)
