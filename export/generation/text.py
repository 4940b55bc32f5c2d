"""Text in, text out: puts onnxruntime-extensions' tokenizer operators before and after a generation graph.

HfJsonTokenizer reads a tokenizer.json, but selects its algorithm by the class in tokenizer_config.json, not by the
file's content. So classes are tried: the first that encodes and decodes all sample texts as `tokenizers` does is used.
A tokenizer that no class reads exactly is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from tokenizers import Tokenizer

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.errors import ContractError, InputError, MissingExtraError, first_line
from pastkey.files.tokenizer_file import open_tokenizer
from pastkey.runtime.providers.ort import OrtError
from pastkey.runtime.text.codec import TextCodec, TextStream
from pastkey.runtime.text.token_bytes import token_bytes

from ..graph.edit import IR_VERSION, OPSET
from ..graph.session import cpu_session
from ..source.tokenizers.conversion import sample_texts
from .nodes import Nodes, typed
from .utf8 import DROPPED, whole_characters

DOMAIN = "ai.onnx.contrib"
_CLASSES = ("PreTrainedTokenizerFast", "GPT2Tokenizer", "LlamaTokenizer")
_KINDS = ("BPE", "Unigram")  # other kinds can crash the process
_LETTERS = [chr(256 + byte) for byte in range(256)]  # BpeDecoder maps them to the bytes


class ReadsOtherwiseError(ContractError):
    """No operator reads a bundle's tokenizer exactly."""


def library() -> str:
    """Returns the path of onnxruntime-extensions' library. Raises MissingExtraError if it is not installed."""
    try:
        import onnxruntime_extensions
    except ImportError:
        raise MissingExtraError(
            "the package 'onnxruntime-extensions' is not installed, whose operators read a tokenizer: "
            "type  pip install onnxruntime-extensions  and try again"
        ) from None
    path: str = onnxruntime_extensions.get_library_path()
    return path


@dataclass(frozen=True)
class TextOperators:
    """A bundle's tokenizer as operators."""

    encoder: Mapping[str, str]  # HfJsonTokenizer's attributes
    pieces: Sequence[bytes]  # the bytes of each id, b"" for special tokens
    tail: str | None  # a special token appended to a text, whose id is then cut off

    def encode(self, n: Nodes, text: ir.Value) -> ir.Value:
        """Encodes a text (1,) to ids (1, T) int64.

        HfJsonTokenizer loses the end of a text that is the beginning of a special token: of "a<b" if there is "<s>".
        Appending a whole special token prevents this.
        """
        if self.tail is None:
            return n.add("HfJsonTokenizer", text, domain=DOMAIN, **self.encoder)
        longer = n.add("StringConcat", text, n.add("Constant", value_strings=[self.tail]))
        ids = n.add("HfJsonTokenizer", longer, domain=DOMAIN, **self.encoder)
        return n.add("Slice", ids, n.number([0]), n.number([-1]), n.number([1]))


def text_operators(bundle: Bundle) -> TextOperators:
    """Returns the operators for a bundle's tokenizer, compared with `tokenizers` on the sample texts.

    Raises:
        MissingExtraError: onnxruntime-extensions is not installed.
        ReadsOtherwiseError: It does not read this tokenizer exactly.
    """
    file = bundle.path / names.TOKENIZER
    content = file.read_text(encoding="utf-8")
    config = json.loads((bundle.path / names.TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    if (kind := json.loads(content)["model"].get("type", "BPE")) not in _KINDS:
        raise ReadsOtherwiseError(f"onnxruntime-extensions does not read this tokenizer exactly: its model is {kind}")
    try:
        pieces = token_bytes(TextCodec.from_file(file), bundle.manifest.vocab_size)
    except InputError as error:
        raise ReadsOtherwiseError(str(error)) from error
    reasons, tail = [], _tail(file)
    for name in _CLASSES:
        encoder = {"tokenizer_vocab": content, "tokenizer_config": json.dumps(config | {"tokenizer_class": name})}
        operators = TextOperators(encoder, pieces, tail)
        reasons.append(_difference(file, operators))
        if reasons[-1] is None:
            return operators
    raise ReadsOtherwiseError(f"onnxruntime-extensions does not read this tokenizer exactly: {reasons[0]}")


def with_text(model: ir.Model, operators: TextOperators) -> None:
    """Adds text input and output to a generation graph (`loop.generate_whole`), in place.

    `text` (1,) string replaces `input_ids`. The new output `completion` (1,) string, next to `ids`, is the text of the
    new ids without the end token and without an unfinished last character.
    """
    graph = model.graph
    front, behind = Nodes(model, "encode"), Nodes(model, "decode")
    text = typed(names.TEXT, ir.DataType.STRING, [1])
    ids = operators.encode(front, text)
    prompt = graph.inputs[0]
    assert prompt.name == names.INPUT_IDS
    for node, place in tuple(prompt.uses()):
        node.replace_input_with(place, ids)
    graph.inputs[0] = text
    graph.insert_before(graph[0], front.nodes)
    made = next(value for value in graph.outputs if value.name == names.GENERATED_IDS)
    ends = next(value for value in graph.inputs if value.name == "end_ids")
    completion = _decoded(behind, made, ends, operators.pieces)
    completion.name, completion.shape = names.COMPLETION, ir.Shape([1])
    completion.type = ir.TensorType(ir.DataType.STRING)
    graph.extend(behind.nodes)
    graph.outputs.append(completion)
    model.opset_imports[DOMAIN] = 1


def _decoded(n: Nodes, ids: ir.Value, ends: ir.Value, pieces: Sequence[bytes]) -> ir.Value:
    """Decodes ids (N,) to a string (1,). Ids in `ends` (E,) add no text."""
    sizes = np.array([len(piece) for piece in pieces])
    column = n.number([1])
    ended = n.add("Equal", n.add("Unsqueeze", ids, column), ends)
    open_ = n.add("Equal", n.add("ReduceSum", n.as_int(ended), column, keepdims=0), n.number(0))
    size = n.add("Mul", n.gathered(sizes, ids), n.as_int(open_))
    # Rows as long as the longest piece, from which each id's own bytes are selected.
    within = n.number(list(range(max(1, int(sizes.max())))))
    start = n.gathered(np.cumsum(sizes) - sizes, ids)
    places = n.add("Add", n.add("Unsqueeze", start, column), within)
    taken = n.add("Less", within, n.add("Unsqueeze", size, column))
    everything = np.frombuffer(b"".join(pieces) + bytes(int(sizes.max())), np.uint8)
    rows = n.gathered(everything, places)
    flat, kept = (n.add("Reshape", value, n.number([-1])) for value in (rows, taken))
    letters = whole_characters(n, n.cast(n.add("Compress", flat, kept, axis=0), ir.DataType.INT64))
    # The operator divides by the number of ids. An additional id, which it drops, prevents division by zero.
    return n.add("BpeDecoder", n.add("Concat", letters, n.number([DROPPED]), axis=0), domain=DOMAIN, **_decoder())


def _decoder() -> dict[str, Any]:
    """BpeDecoder's attributes for a vocabulary of the bytes and U+FFFD. It drops ids beyond these."""
    replacement = "".join(_LETTERS[byte] for byte in "\N{REPLACEMENT CHARACTER}".encode())
    return {
        "id_vocab": "\n".join([*_LETTERS, replacement]) + "\n",
        "byte_decoder": "\n".join(f"{ord(letter)}\t{byte}" for byte, letter in enumerate(_LETTERS)),
        "skip_special_tokens": 1,
    }


def _tail(file: Path) -> str | None:
    """Returns a special token that can follow a text without changing its ids and that no tokenizer rule adds."""
    tokenizer = Tokenizer.from_file(str(file))
    for token, kind in tokenizer.get_added_tokens_decoder().items():
        if kind.special and not (kind.lstrip or kind.single_word):
            ids = _encoded(tokenizer, f"a{kind.content}")
            if ids[-1:] == [token] and ids[:-1] == _encoded(tokenizer, "a"):
                return str(kind.content)
    return None


def _beginnings(tokenizer: Tokenizer) -> list[str]:
    """Returns texts that end in the beginning of an added token, where a matcher still waits for the rest."""
    contents = {kind.content for kind in tokenizer.get_added_tokens_decoder().values()}
    cuts = {content[:length] for content in contents for length in (1, 2, len(content) - 1) if content[:length]}
    return [f"{before}{cut}" for cut in sorted(cuts - contents)[:40] for before in ("a", "x = 1 ")]


def _difference(file: Path, operators: TextOperators) -> str | None:
    """Returns the first difference between the operators and `tokenizers` on the sample texts, or None."""
    tokenizer, codec = open_tokenizer(Tokenizer, file.read_bytes(), file), TextCodec.from_file(file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    int64, string = ir.DataType.INT64, ir.DataType.STRING
    try:
        encode = _alone(string, int64, operators.encode)
        decode = _alone(int64, string, lambda n, ids: _decoded(n, ids, n.number([-1]), operators.pieces))
        for text in [*sample_texts(), *_beginnings(tokenizer)]:
            expected = _encoded(tokenizer, text)
            if not expected:  # cannot be a prompt
                continue
            ids = encode(np.array([text], object))[0].tolist()
            if ids != expected:
                return f"{text!r} has the ids {expected[:8]}, and the graph returns {ids[:8]}"
            stream = TextStream(codec, after_text=True)
            spoken = "".join([*map(stream.push, expected), stream.flush()])
            if (written := str(decode(np.array(expected, np.int64))[0])) != spoken:
                return f"the ids {expected[:8]} decode to {spoken!r}, and the graph returns {written!r}"
    except OrtError as error:
        return first_line(error)
    return None


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids, [] if the tokenizer lacks one for a part of the text: the library raises plain Exception."""
    try:
        return list(tokenizer.encode(text).ids)
    except Exception:
        return []


def _alone(given: ir.DataType, made: ir.DataType, build: Callable[[Nodes, ir.Value], ir.Value]) -> Any:
    """Returns a function of one array (N,) that runs a graph of these nodes only."""
    value = typed("given", given, ["n"])
    graph = ir.Graph([value], [], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}, name="alone")
    model = ir.Model(graph, ir_version=IR_VERSION)
    nodes = Nodes(model, "alone")
    output = build(nodes, value)
    output.type = ir.TensorType(made)
    graph.extend(nodes.nodes)
    graph.outputs.append(output)
    session = cpu_session(ir.to_proto(model).SerializeToString(), threads=1, library=library())
    return lambda array: session.run(None, {"given": array})[0]
