"""The settings of an export and an evaluation, with the defaults of Python and of the command line.

Standard library only, so that `--help` starts at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypedDict

from pastkey.command import finite_float, positive_int
from pastkey.contract import names
from pastkey.errors import InputError, MissingFileError
from pastkey.precisions import PRECISIONS, Precision
from pastkey.providers import TARGETS
from pastkey.values import is_int, size_in_bytes

Options = Mapping[str, str] | Sequence[tuple[str, str]]

GRAPH_CHOICES = ("auto", *names.GRAPHS)
_DEFAULT = "int8"  # precision
STATIC_CHUNK = 64  # default tokens of a prefill run

SOURCES = (
    "a checkpoint, Hugging Face or ONNX folder, ORG/NAME on the Hugging Face Hub, a .gguf file, a llama2.c .bin, or "
    "FILE:factory of a .py or .ipynb file, such as train.py:'GPT(64)'"
)
TOKENIZERS = (
    "a tokenizer.json, a SentencePiece .model, GPT-2's encoder.json next to vocab.bpe, a .json list of characters or "
    "words, or path/to/file.py:factory"
)

EVAL_LENGTH = 512  # tokens of a window, if the context is that long
EVAL_WINDOWS = 24  # at most, from the beginning of the text
GREEDY_PROMPTS = 16  # maximum number of windows that provide a prompt
GREEDY_PROMPT_TOKENS = 32  # from a window's beginning, at most half of it
GREEDY_TOKENS = 32  # of a continuation, if prompt and continuation fit into a window's length


class ExportOptions(TypedDict, total=False):
    """The options of `export`.

    - `target` ("cpu"): Where the bundle will run: "cpu", "cuda", "openvino", "webgpu", "qnn", "coreml" or "portable".
    - `graph` ("auto"): "auto", "fused", "standard" or "static".
    - `format` ("onnx"): "ort" also writes pastkey's own graph in onnxruntime's ORT format.
    - `generate` (False): Also writes a whole generation as one graph, for programs in any language.
    - `hidden_states` (False): pastkey's own graph also returns the last hidden states, for `LanguageModel.embed`.
    - `adapters` (False): Also writes a graph for LoRA adapters, for `LanguageModel.load_adapter`.
    - `tokenizer` (the source's): tokenizer.json, a SentencePiece .model, GPT-2's encoder.json next to vocab.bpe, a
      list of characters or words as .json, a "file.py:factory" of one of these, of a tokenizers.Tokenizer or a
      tiktoken Encoding, or for a llama2.c model the tokenizer of its own format.
    - `context_length` (the source's): In tokens. Required for a module; may shorten the context of other sources.
    - `force` (False): Replaces an existing bundle.
    - `call` (found by trying): How a module is called, as an expression over `model` and `ids` (B, T):
      "model(ids, None)[0]".
    - `chat_template` (the source's): A .jinja file.
    - `calibration` (text that the model writes): A text file to quantize with and to measure on.
    - `max_kl` (None): Bounds the KL divergence from float32, in nats: the most sensitive matrices get a finer
      precision until the bound is met.
    - `sensitivity` (None): A .json file to write each matrix's sensitivity to.
    - `trust_remote_code` (False): Runs the Python code in a Hugging Face folder.
    - `network` (True): Whether a model on the Hub may be fetched. Otherwise it must be in the cache of huggingface_hub.
    - `weights` (None): A file with the state dict of a module: .safetensors, or a checkpoint that torch.load reads
      with weights_only=True. Only definitions of a "file.py:factory" are run then. The given module is not changed.
    - `eos` (the source's): The token, or tokens, that end a text: ids, or names such as "<EOS>" of the tokenizer.
    - `provider_options` (None): For the target's execution provider, which verifies the bundle at the end; names and
      values are onnxruntime's.
    - `session_options` (None): Options of onnxruntime's session there, as for `pastkey.load`.
    - `allow_fallback` (False): Whether the CPU may run operators there that the provider does not support.
    - `chunk` (64): Tokens of a prefill run of the static graph.
    - `cache` (True): Reads finished steps of an earlier export of the same source, and keeps them for the next one.
      The float32 graph with its proof and the model's own text are in the user's cache folder, at most 200 MB. Rounded
      weights are in a hidden folder next to `out` until the bundle is whole, so that a killed export can continue.
    - `quick` (False): Rounds weights to nearest, without calibration, and proves the bundle on a short text.
    - `shard_size` (None): Splits the weights of a graph into files smaller than this, in bytes or as "2GB": browsers
      and 32-bit devices read no larger ones.
    """

    target: str
    graph: str
    format: str
    generate: bool
    hidden_states: bool
    adapters: bool
    tokenizer: str | Path | None
    context_length: int | None
    force: bool
    call: str | None
    chat_template: str | Path | None
    calibration: str | Path | None
    max_kl: float | None
    sensitivity: str | Path | None
    trust_remote_code: bool
    network: bool
    weights: str | Path | None
    eos: int | str | Sequence[int | str] | None
    provider_options: Options | None
    session_options: Options | None
    allow_fallback: bool
    chunk: int | None
    cache: bool
    quick: bool
    shard_size: int | str | None


def _tokens(text: str) -> list[int | str]:
    """Token ids such as 1,2, or the name of one token."""
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        return [text]


# The headings of the flags.
_PRECISION, _DEVICE, _MODULE = "precision", "where the bundle will run", "a module of your own"
_GRAPHS, _RARE = "further graphs", "rare"


def _flag(group: str, default: Any, what: str, **further: Any) -> Any:
    """A field with its flag: its help, and further arguments of argparse, or "flag" for another name."""
    return dataclasses.field(default=default, metadata={"group": group, "help": what} | further)


def _switch(group: str, what: str) -> Any:
    return _flag(group, False, what, action="store_true")


@dataclass(frozen=True)
class ExportConfig:
    """The precision of the weights and the options of an export, documented in ExportOptions, with their flags.

    Raises InputError for an unknown choice, or one that another choice rules out.
    """

    precision: str | None = _flag(
        _PRECISION, None, "of the weights (default: int8; source, without rounding, if they are quantized already)",
        choices=PRECISIONS,
    )  # fmt: skip
    target: str = _flag(_DEVICE, "cpu", "the device, or portable for browsers and other programs", choices=TARGETS)
    quick: bool = _switch(_PRECISION, "round to nearest without calibration, and prove on a short text")
    calibration: str | Path | None = _flag(
        _PRECISION, None, "text to calibrate quantization on (default: text that the model writes)", metavar="FILE"
    )
    max_kl: float | None = _flag(
        _PRECISION, None, "KL budget: the most sensitive matrices stay in float32 (int4: int8) until it is met",
        metavar="NATS", type=finite_float,
    )  # fmt: skip
    sensitivity: str | Path | None = _flag(
        _PRECISION, None, "write the sensitivity of each matrix to this .json file", metavar="FILE"
    )
    graph: str = _flag(_DEVICE, "auto", "form of the graph", choices=GRAPH_CHOICES)
    format: str = _flag(_DEVICE, "onnx", "ort: also write the graph in the ORT format", choices=names.FORMATS)
    chunk: int | None = _flag(
        _DEVICE, None, f"length of a prefill run of the static graph (default: {STATIC_CHUNK})",
        metavar="TOKENS", type=positive_int,
    )  # fmt: skip
    context_length: int | None = _flag(
        _MODULE, None, "context length; required for a module", flag="--context", metavar="TOKENS", type=positive_int
    )
    weights: str | Path | None = _flag(
        _MODULE, None, "state dict of a module: .safetensors, or a checkpoint that torch.load reads with "
        "weights_only=True; a script then runs only its definitions",
        metavar="FILE",
    )  # fmt: skip
    tokenizer: str | Path | None = _flag(
        _MODULE, None, f"{TOKENIZERS} of a tokenizers.Tokenizer or tiktoken Encoding; or llama2.c's tokenizer .bin; "
        "without one, the bundle accepts ids only",
        metavar="FILE",
    )  # fmt: skip
    eos: int | str | Sequence[int | str] | None = _flag(
        _MODULE, None, 'id of the token that ends a generation, or its name, such as "<EOS>"; several ids: 1,2',
        metavar="TOKEN", type=_tokens, action="extend",
    )  # fmt: skip
    call: str | None = _flag(
        _MODULE, None, 'how to call it, an expression over model and ids (B, T), such as "model(ids, None)[0]" '
        "(default: found by trying)",
        metavar="EXPRESSION",
    )  # fmt: skip
    chat_template: str | Path | None = _flag(
        _MODULE, None, "a .jinja file (default: the source's chat template)", metavar="FILE"
    )
    adapters: bool = _switch(_GRAPHS, "also write a graph for LoRA adapters: --adapter of run")
    hidden_states: bool = _switch(
        _GRAPHS, "also output the last hidden states, for text embeddings: lm.embed in Python"
    )
    generate: bool = _switch(
        _GRAPHS, "also write a whole generation as one graph: one call from any language, prompt in, new ids out"
    )
    provider_options: Options | None = None  # the flags of these three are `pastkey.command`'s
    session_options: Options | None = None
    allow_fallback: bool = False
    force: bool = _switch("", "replace an existing bundle")
    trust_remote_code: bool = _switch(_RARE, "run the Python code in a Hugging Face folder")
    network: bool = _flag(
        _RARE, True, "fetch nothing: use the cache of huggingface_hub for ORG/NAME",
        flag="--no-network", action="store_false",
    )  # fmt: skip
    cache: bool = _flag(
        _RARE, True, "use no finished steps of an earlier export of the same source, and keep none for the next one",
        flag="--no-cache", action="store_false",
    )  # fmt: skip
    shard_size: int | str | None = _flag(
        _RARE, None, "write weights files smaller than this, such as 2GB (default: one file)", metavar="SIZE"
    )

    def __post_init__(self) -> None:
        for name, found, known in (
            ("precision", self.row.name if self.precision is None else self.precision, PRECISIONS),
            ("target", self.target, TARGETS),
            ("graph", self.graph, GRAPH_CHOICES),
            ("format", self.format, names.FORMATS),
        ):
            if found not in known:
                raise InputError(f"{name} is {found!r}; it must be one of {', '.join(known)}")
        if not all(is_int(token, 0) or (isinstance(token, str) and token) for token in self.eos_tokens):
            raise InputError(f"eos is {self.eos!r}; it must be a token id, a whole number from 0, or several")
        if self.max_kl is not None and not (math.isfinite(self.max_kl) and self.max_kl > 0):
            raise InputError(f"max_kl is {self.max_kl:g}; it must be a finite number of nats above 0, such as 0.01")
        if self.chunk is not None and not is_int(self.chunk, 1):
            raise InputError(f"chunk is {self.chunk!r}; it must be a whole number of tokens from 1")
        _ = self.shard_bytes  # raises InputError
        for excluded, option, other, why in _EXCLUDED:
            if excluded(self):
                both = f"{option} and {other}".format(target=self.target, graph=self.graph, precision=self.row.name)
                raise InputError(f"{both} exclude each other: {why}; leave out or change one of them")

    @property
    def row(self) -> Precision:
        """The precision, or that of a source that is not quantized."""
        return PRECISIONS.get(self.precision or _DEFAULT, PRECISIONS[_DEFAULT])

    def chosen(self, *, quantized: bool) -> ExportConfig:
        """Returns the settings with the precision for a source that is quantized or not, if the user named none."""
        if self.precision is not None:
            return self
        return dataclasses.replace(self, precision="source" if quantized and not self.static else _DEFAULT)

    @property
    def quantized(self) -> bool:
        """Whether weights are integers."""
        return self.row.quantized

    @property
    def static(self) -> bool:
        """Whether the export makes static graphs."""
        return self.graph == "static" or (self.graph == "auto" and TARGETS[self.target].npu)

    @property
    def shard_bytes(self) -> int | None:
        """The bytes that every weights file stays below, None for one file."""
        return None if self.shard_size is None else size_in_bytes(self.shard_size, "shard_size")

    @property
    def common(self) -> ExportConfig:
        """The settings of the graph for other programs, from which static graphs are made."""
        return dataclasses.replace(self, graph="standard", target="cpu", chunk=None) if self.static else self

    @property
    def eos_tokens(self) -> tuple[int | str, ...]:
        """The ids and names in `eos`, () if it is None."""
        if self.eos is None:
            return ()
        return (self.eos,) if isinstance(self.eos, int | str) else tuple(self.eos)

    @property
    def measures_each_matrix(self) -> bool:
        """Whether the export may measure the sensitivity of each matrix."""
        return self.max_kl is not None or self.sensitivity is not None


# Options that exclude each other, and why.
_STATIC = "a static graph"
_EXCLUDED: Sequence[tuple[Callable[[ExportConfig], bool], str, str, str]] = (
    (lambda c: c.format == "ort" and not TARGETS[c.target].ort_format,
     "--format ort", "--target {target}", "the ORT format is optimised for a CPU"),
    (lambda c: c.format == "ort" and c.static,
     "--format ort", _STATIC, "it is for graphs whose sizes change"),
    (lambda c: TARGETS[c.target].short == "cpu" and bool(c.provider_options or c.allow_fallback),
     "--provider-option or --allow-fallback", "--target {target}", "the CPU proves the bundle"),
    (lambda c: c.quick and c.measures_each_matrix,
     "--quick", "--max-kl and --sensitivity", "it measures no single matrix"),
    (lambda c: c.static and c.measures_each_matrix,
     "--max-kl or --sensitivity", _STATIC, "they are for pastkey's own int8, and the static graph has another"),
    (lambda c: c.row.name == "source" and (c.calibration is not None or c.measures_each_matrix),
     "--calibration, --max-kl or --sensitivity", "--precision source, the default of a quantized source,",
     "its weights stay unchanged, and --precision int8 rounds them again"),
    (lambda c: not c.quantized and (c.calibration is not None or c.measures_each_matrix),
     "--calibration, --max-kl or --sensitivity", "--precision {precision}", "it rounds no matrix to integers"),
    (lambda c: c.adapters and (c.target != "cpu" or c.static or c.row.name == "fp16"),
     "--adapters", "--target {target}, --graph {graph} and --precision {precision}",
     "adapters are for the CPU, graphs whose sizes change, and not for fp16"),
    (lambda c: c.generate and not TARGETS[c.target].loop,
     "--generate", "--target {target}", "it writes a Loop, which the target is not known to run"),
    (lambda c: c.generate and c.static, "--generate", _STATIC, "it writes a graph whose sizes change"),
    (lambda c: c.hidden_states and c.static, "--hidden-states", _STATIC, "static graphs return only logits"),
    (lambda c: c.chunk is not None and not c.static, "--chunk", "--graph {graph}", "it is for the static graph"),
    (lambda c: TARGETS[c.target].npu and not c.static,
     "--target {target}", "--graph {graph}", "it runs graphs of fixed sizes only, --graph static"),
    (lambda c: c.graph == "fused" and not TARGETS[c.target].takes_fused,
     "--graph fused", "--target {target}", "the fused graph is not known to run there, use --graph standard"),
    (lambda c: c.static and c.row.name != "fp32" and not (c.row.name == "int8" and TARGETS[c.target].static_int8),
     "--precision {precision}", _STATIC, "static graphs are made in float32, for qnn also in int8"),
)  # fmt: skip


def split_factory(text: str) -> tuple[Path, str] | None:
    """Splits path/to/file.py:factory, notebook.ipynb:expression or package.module:factory into a file and the rest.

    A missing second part is "". Returns None for any other text. Finding a module runs no code.
    """
    found = re.fullmatch(r"(.+?\.(?:py|ipynb))(?::(.*))?", text, re.DOTALL)
    if found is not None:
        return Path(found[1]), found[2] or ""
    found = re.fullmatch(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d\s].*)", text, re.DOTALL)
    return None if found is None else (_file_of_module(found[1]), found[2])


def _file_of_module(name: str) -> Path:
    """The file of a module of the working folder, as for `python -m`, or of an installed package."""
    places: Sequence[str] | None = [str(Path.cwd()), *sys.path]
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        spec = None if places is None else PathFinder.find_spec(parts[count - 1], [*places])
        if spec is None:
            raise MissingFileError(
                f"no module {name}: {'.'.join(parts[:count])} is in neither the working folder nor the environment; "
                "expected package.module:factory or path/to/file.py:factory"
            )
        places = spec.submodule_search_locations
    if not (spec and spec.origin and spec.origin.endswith(".py")):
        raise InputError(f"{name} is not a Python file: expected path/to/file.py:factory, or package.module:factory")
    return Path(spec.origin)
