"""The readers, each as a function of the bytes of one file. All others are valid, and every hash is right."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pastkey import names
from pastkey.bundle import open_bundle
from pastkey.export.measure.texts import encode_file
from pastkey.export.source import pretrained
from pastkey.export.source.llama2c import open_llama2c
from pastkey.export.source.tokenizer import read_tokenizer
from pastkey.export.source.weights import load_weights
from pastkey.folder import FileRecord, read_json
from pastkey.runtime import Engine
from pastkey.runtime.bulk.answers import plain_error
from pastkey.runtime.bulk.job import JobRecord, read_record
from pastkey.runtime.bulk.journal import Journal
from pastkey.runtime.bulk.requests import parse_request
from pastkey.runtime.bulk.tables import open_table
from pastkey.runtime.engine.embedding import EmbeddingRows
from pastkey.runtime.engine.golden import Golden
from pastkey.runtime.generation_config import sampling_defaults
from pastkey.runtime.session_file import read_session, write_session
from pastkey.runtime.text.chat_template import ChatTemplate
from pastkey.runtime.text.codec import TextCodec
from pastkey.runtime.text.messages import read_messages
from pastkey.runtime.unpacking import unpacked
from pastkey.train.checkpoint import (
    STATE,
    TOKENS_TRAIN,
    TOKENS_VAL,
    TrainingState,
    load_checkpoint,
    save_checkpoint,
)
from pastkey.train.data import DataInfo, survey, text_corpus
from pastkey.train.loop import _moments, _restore_moments, make_optimizer
from pastkey.train.model import Decoder
from pastkey.train.resumed import read_training
from pastkey.train.settings import TrainConfig
from pastkey.train.stories import read_stories
from pastkey.train.tokenizer import train_bpe

from ..runtime.conftest import Tiny, write_bundle
from .mutations import Mutation, mutate_bytes, mutate_headed, mutate_json, mutate_text
from .samples import gguf_valid, llama2c_tokenizer, llama2c_valid, sentencepiece

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<|user|>{{ message['content'] | trim }}"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Yes?"}]


@dataclass(frozen=True)
class Target:
    """A reader."""

    read: Callable[[bytes], object]
    valid: Callable[[], bytes]  # a file that it takes
    mutate: Mutation
    native: bool = False  # a library that is not in Python reads the bytes, so that it may run long, or end the process


@functools.cache
def workplace() -> Path:
    """A folder of this process, removed at its end."""
    folder = tempfile.TemporaryDirectory(prefix="pastkey-fuzz-")
    _kept.append(folder)
    os.environ["XDG_CACHE_HOME"] = os.devnull  # nothing is remembered, so that every input is hashed
    return Path(folder.name)


_kept: list[Any] = []


def written(name: str, content: bytes) -> Path:
    file = workplace() / name
    file.write_bytes(content)
    return file


# --- bundles ------------------------------------------------------------------------------------------------------
def _tokenizer() -> Tokenizer:
    letters = [*"abcdefghijklmnopqrstuvwxyz .,!?", "th", "he", "in", "<s>", "</s>", "<unk>"]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("h", "e"), ("i", "n")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("\t", " "), normalizers.NFC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return tokenizer


@functools.cache
def bundle_folder() -> Path:
    folder = workplace() / "bundle"
    write_bundle(
        folder,
        Tiny.random([(8, 8)], context_length=24),
        "standard",
        data_file="model.onnx_data",
        tokenizer=_tokenizer(),
        tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE},
        generation_config={"do_sample": True, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.1},
        parity={"fp32": {"ok": True, "kl_divergence": 0.5, "checks": {"a": {"value": 1.0}}}},
        operators={"MatMul": 5},
    )
    return folder


def _mended(folder: Path, file: str, content: bytes) -> None:
    """Writes one file and what its manifest says of it."""
    (folder / file).write_bytes(content)
    manifest = json.loads(_original(folder))
    record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for records in (manifest["files"], manifest.get("training", {}).get("files", {})):
        if file in records:
            records[file] = record
    (folder / names.MANIFEST).write_text(json.dumps(manifest))


@functools.cache
def _original(folder: Path) -> bytes:
    return (folder / names.MANIFEST).read_bytes()


@contextlib.contextmanager
def _changed(folder: Path, file: str, content: bytes) -> Iterator[None]:
    """The folder with this content in one file, which its manifest lists so, unless it is the manifest itself."""
    whole = (folder / file).read_bytes()
    _original(folder)
    try:
        if file == names.MANIFEST:
            (folder / file).write_bytes(content)
        else:
            _mended(folder, file, content)
        yield
    finally:
        (folder / file).write_bytes(whole)
        (folder / names.MANIFEST).write_bytes(_original(folder))


def _in_bundle(file: str, use: Callable[[Any], object]) -> Callable[[bytes], object]:
    def read(content: bytes) -> object:
        with _changed(bundle_folder(), file, content):
            return use(open_bundle(bundle_folder(), verify=True))

    return read


def _use_manifest(bundle: Any) -> str:
    from pastkey.runtime.commands.inspection import print_figures

    manifest = bundle.manifest
    for figures in (manifest.parity, manifest.quality, manifest.operators):
        print_figures(figures, indent=2)
    return json.dumps(manifest.to_json(), default=str)


def _use_template(bundle: Any) -> object:
    template = ChatTemplate.from_bundle(bundle)
    return template.render(MESSAGES)


def _use_tokenizer(bundle: Any) -> object:
    codec = TextCodec.from_file(bundle.tokenizer)
    ids = codec.encode("the inn, there. aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab")
    return codec.decode(ids), codec.decode(ids, keep_special_tokens=True), codec.added_tokens


def _use_graph(bundle: Any) -> object:
    engine = Engine(bundle, threads=1)
    engine.prefill([1, 2, 3])
    return engine.decode(4)


def _of_bundle(file: str) -> Callable[[], bytes]:
    return lambda: (bundle_folder() / file).read_bytes()


@functools.cache
def _session_engine() -> Any:
    bundle = open_bundle(bundle_folder(), verify=True)
    return bundle, Engine(bundle, threads=1)


def _session_valid() -> bytes:
    bundle, engine = _session_engine()
    engine.reset()
    engine.prefill([1, 2, 3])
    write_session(workplace() / "valid.session", bundle, [1, 2, 3, 4], engine)
    return (workplace() / "valid.session").read_bytes()


def _session(content: bytes) -> object:
    bundle, engine = _session_engine()
    engine.reset()
    return read_session(written("a.session", content), bundle, engine)


def _mutate_session(rng: Any, content: bytes) -> bytes:
    """Its header or its bytes; the hash at its end is mended."""
    digits = len(b"pastkey session 1\n")
    start = digits + 9
    length = int(content[digits : digits + 8])
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    header = mutate_json(rng, content[start : start + length])
    body = content[:digits] + b"%08d\n" % len(header) + header + content[start + length : -32]
    return body + hashlib.sha256(body).digest()


@functools.cache
def _zip_valid() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(bundle_folder().rglob("*")):
            if file.is_file() and file.stat().st_size < 3000:
                archive.write(file, f"b/{file.relative_to(bundle_folder())}")
    return packed.getvalue()


def _zip(content: bytes) -> object:
    folder = unpacked(io.BytesIO(content), "x.zip")
    shutil.rmtree(folder, ignore_errors=True)
    return folder


_ROWS = [
    {"id": 1, "prompt": "a", "stop": ["b"], "logit_bias": {"3": 1}},
    {"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": MESSAGES, "top_p": 0.5}},
]


def _rows(content: bytes) -> object:
    table, out = open_table(written("rows.jsonl", content)), io.BytesIO()
    table.write(out, lambda entry: plain_error("no"), ())
    return [parse_request(entry.content) for entry in table.entries() if isinstance(entry.content, dict)]


def _journal(content: bytes) -> object:
    with Journal(written("journal.jsonl", content)) as journal:
        return len(journal)


def _golden_valid() -> bytes:
    packed = io.BytesIO()
    np.savez(packed, ids=np.arange(9) % 3, ends=np.array([4, 9]), logits=np.zeros((2, 37), np.float32), limit=0.5)
    return packed.getvalue()


def _golden(content: bytes) -> object:
    bundle = open_bundle(bundle_folder(), verify=False)
    files = {**bundle.manifest.files, names.GOLDEN: FileRecord(len(content), "0" * 64)}
    folder = workplace() / "golden"
    folder.mkdir(exist_ok=True)
    (folder / names.GOLDEN).write_bytes(content)
    listed = dataclasses.replace(bundle.manifest, files=files)
    return Golden.of(dataclasses.replace(bundle, path=folder, manifest=listed))


def _embedding_rows(content: bytes) -> object:
    written("table.bin", bytes(4 * 6 * 8))
    rows = EmbeddingRows(workplace(), content.decode("utf-8", "replace"))
    return rows[np.array([[0, 3, 5]])]


# --- checkpoints --------------------------------------------------------------------------------------------------
CORPUS = "the cat sat on the mat.\nthe dog sat in the inn! " * 30


@functools.cache
def checkpoint_folder() -> Path:
    folder = workplace() / "checkpoint"
    (folder / "training").mkdir(parents=True)
    tokenizer = train_bpe([CORPUS], 270)
    tokenizer.save(folder)
    config = TrainConfig.from_given(
        {"hidden_size": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "context": 16, "threads": 1}
    )
    model = Decoder(config.model_config(tokenizer.vocab_size, tokenizer.begin, tokenizer.end))
    ids = np.array(tokenizer.document(CORPUS), "<u2")
    for name in (TOKENS_TRAIN, TOKENS_VAL):
        (folder / name).write_bytes(ids.tobytes())
    info = DataInfo("c", "f", 1, "<u2", len(ids), len(ids), 10, tokenizer.begin, tokenizer.end)
    optimizer = make_optimizer(model, config)
    model(torch.tensor([[1, 2]]), torch.tensor([[0, 1]])).sum().backward()
    optimizer.step()
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
    moments = _moments(optimizer, model)
    save_checkpoint(folder, model, TrainingState(3, moments, settings, info.to_json(), {"val_loss": 1.0}))
    return folder


def _in_checkpoint(file: str) -> Callable[[bytes], object]:
    def read(content: bytes) -> object:
        with _changed(checkpoint_folder(), file, content):
            checkpoint = load_checkpoint(checkpoint_folder())
            resumed = read_training(checkpoint)
            _restore_moments(make_optimizer(checkpoint.model, resumed.config), checkpoint.model, resumed.moments, 3)
            return resumed.step

    return read


def _of_checkpoint(file: str) -> Callable[[], bytes]:
    return lambda: (checkpoint_folder() / file).read_bytes()


# --- sources ------------------------------------------------------------------------------------------------------
def _safetensors() -> bytes:
    return (checkpoint_folder() / names.WEIGHTS).read_bytes()


def _weights(content: bytes) -> object:
    module = torch.nn.Linear(3, 2)
    return load_weights(module, written("weights.safetensors", content), lambda text: None)


def _small_safetensors() -> bytes:
    import safetensors.torch

    content: bytes = safetensors.torch.save({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    return content


def _huggingface(content: bytes) -> object:
    folder = workplace() / "huggingface"
    folder.mkdir(exist_ok=True)
    (folder / names.WEIGHTS).write_bytes(_safetensors())
    (folder / names.CONFIG).write_bytes(content)
    config = read_json(folder / names.CONFIG)
    pretrained._custom_code(folder, config)
    pretrained._check_folder(folder, config)
    pretrained._check_sizes(folder, config)
    return config


def _index(content: bytes) -> object:
    folder = workplace() / "index"
    folder.mkdir(exist_ok=True)
    (folder / names.WEIGHTS).write_bytes(_small_safetensors())
    (folder / f"{names.WEIGHTS}.index.json").write_bytes(content)
    pretrained._check_folder(folder, {})
    return folder


def _read_llama2c_tokenizer(content: bytes) -> object:
    return open_llama2c(written("model.bin", llama2c_valid()), written("tokenizer.bin", content), None)


def _as_tokenizer(name: str) -> Callable[[bytes], object]:
    return lambda content: read_tokenizer(written(name, content))


# --- texts --------------------------------------------------------------------------------------------------------
def _corpus(content: bytes) -> object:
    corpus = text_corpus([written("corpus.txt", content)])
    survey(corpus)
    return train_bpe(corpus.documents(), 260).vocab_size


def _template(content: bytes) -> object:
    return ChatTemplate(content.decode("utf-8", "replace")).render(MESSAGES)


def _calibration(content: bytes) -> object:
    return encode_file(written("calibration.txt", content), TextCodec.from_file(bundle_folder() / names.TOKENIZER))


def _json(value: object) -> Callable[[], bytes]:
    return lambda: json.dumps(value).encode()


_CONFIG = names.TOKENIZER_CONFIG
_STOI = {"stoi": {"a": 0, "b": 1, "c": 2}, "itos": {"0": "a", "1": "b", "2": "c"}}
_PLACE = {"file": "table.bin", "offset": 0, "shape": [6, 4, 8]}

TARGETS: Mapping[str, Target] = {
    "manifest": Target(_in_bundle(names.MANIFEST, _use_manifest), _of_bundle(names.MANIFEST), mutate_json),
    "generation_config": Target(
        _in_bundle(names.GENERATION_CONFIG, sampling_defaults), _of_bundle(names.GENERATION_CONFIG), mutate_json
    ),
    "tokenizer_config": Target(_in_bundle(_CONFIG, _use_template), _of_bundle(_CONFIG), mutate_json),
    "tokenizer": Target(
        _in_bundle(names.TOKENIZER, _use_tokenizer), _of_bundle(names.TOKENIZER), mutate_json, native=True
    ),
    "chat_template": Target(_template, lambda: TEMPLATE.encode(), mutate_text),
    "graph": Target(
        _in_bundle(names.LAST_LOGITS_GRAPH, _use_graph), _of_bundle(names.LAST_LOGITS_GRAPH), mutate_bytes, native=True
    ),
    "external_data": Target(
        _in_bundle(names.LAST_LOGITS_GRAPH, str), _of_bundle(names.LAST_LOGITS_GRAPH), mutate_bytes
    ),
    "embedding_rows": Target(_embedding_rows, _json(_PLACE), mutate_json),
    "session": Target(_session, _session_valid, _mutate_session),
    "zip": Target(_zip, _zip_valid, mutate_bytes),
    "rows": Target(_rows, lambda: b"\n".join(json.dumps(row).encode() for row in _ROWS), mutate_json),
    "journal": Target(_journal, lambda: b'{"id":1,"answer":{}}\n{"id":"a","answer":{"error":"b"}}\n', mutate_bytes),
    "job": Target(
        lambda content: read_record(written("job.json", content)),
        _json(dataclasses.asdict(JobRecord("b", "i", "1/2", {"seed": 0}, 5, False))),
        mutate_json,
    ),
    "golden_logits": Target(_golden, _golden_valid, mutate_bytes),
    "config": Target(_in_checkpoint(names.CONFIG), _of_checkpoint(names.CONFIG), mutate_json),
    "checkpoint_manifest": Target(_in_checkpoint(names.MANIFEST), _of_checkpoint(names.MANIFEST), mutate_json),
    "checkpoint_weights": Target(_in_checkpoint(names.WEIGHTS), _of_checkpoint(names.WEIGHTS), mutate_headed),
    "training_state": Target(_in_checkpoint(STATE), _of_checkpoint(STATE), mutate_headed),
    "training_tokens": Target(_in_checkpoint(TOKENS_TRAIN), _of_checkpoint(TOKENS_TRAIN), mutate_bytes),
    "safetensors": Target(_weights, _small_safetensors, mutate_headed),
    "huggingface_config": Target(
        _huggingface, _json({"hidden_size": 8, "vocab_size": 270, "num_hidden_layers": 1, "eos": None}), mutate_json
    ),
    "weight_map": Target(_index, _json({"weight_map": {"a": names.WEIGHTS, "b": names.WEIGHTS}}), mutate_json),
    "gguf": Target(lambda content: pretrained._check_gguf(written("m.gguf", content)), gguf_valid, mutate_bytes),
    "llama2c": Target(
        lambda content: open_llama2c(written("model.bin", content), None, None), llama2c_valid, mutate_bytes
    ),
    "llama2c_tokenizer": Target(_read_llama2c_tokenizer, llama2c_tokenizer, mutate_bytes),
    "sentencepiece": Target(_as_tokenizer("spiece.model"), sentencepiece, mutate_bytes),
    "source_tokenizer": Target(
        _as_tokenizer("source.json"), lambda: _tokenizer().to_str().encode(), mutate_json, native=True
    ),
    "characters": Target(_as_tokenizer("meta.json"), _json(_STOI), mutate_json),
    "corpus": Target(_corpus, lambda: CORPUS.encode(), mutate_text),
    "calibration": Target(_calibration, lambda: CORPUS.encode(), mutate_text),
    "stories": Target(
        lambda content: read_stories(written("s.jsonl", content)), lambda: b'{"text": "a"}\n{"text": "b"}', mutate_json
    ),
    "messages": Target(
        lambda content: read_messages(written("chat.json", content)), _json({"messages": MESSAGES}), mutate_json
    ),
}  # fmt: skip

warnings.filterwarnings("ignore")  # of libraries, about odd values
