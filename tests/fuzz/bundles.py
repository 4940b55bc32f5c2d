"""The files in a bundle, or written from one: the manifest, the graph, the tokenizer, sessions; and people's texts."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.export.measure.texts import encode_file
from pastkey.files.folder import FileRecord
from pastkey.runtime import Engine
from pastkey.runtime.bulk.job import Job
from pastkey.runtime.bulk.rows import answered_line, error_of, parse_request, read_rows
from pastkey.runtime.engine.embedding import EmbeddingRows
from pastkey.runtime.engine.golden import Golden
from pastkey.runtime.model.generation_config import sampling_defaults
from pastkey.runtime.model.session_file import read_session, write_session
from pastkey.runtime.model.unpack import unpack
from pastkey.runtime.text.chat_template import ChatTemplate, read_template
from pastkey.runtime.text.codec import TextCodec
from pastkey.runtime.text.messages import read_messages
from pastkey.train.data.sources import open_corpus, survey
from pastkey.train.stories.__main__ import read_stories
from pastkey.train.tokenizer import train_bpe

from ..runtime.tiny_decoder import Tiny, write_bundle
from .mutations import Mutation, mutate_bytes, mutate_json, mutate_text
from .reader import Target, alone, json_bytes, within, workplace, written
from .samples import CORPUS, MESSAGES, TEMPLATE, word_tokenizer


@functools.cache
def bundle_folder() -> Path:
    folder = workplace() / "bundle"
    write_bundle(
        folder,
        Tiny.random([(8, 8)], context_length=24),
        "standard",
        data_file="model.onnx_data",
        tokenizer=word_tokenizer(),
        tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE},
        generation_config={"do_sample": True, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.1},
        parity={"fp32": {"ok": True, "kl_divergence": 0.5, "checks": {"a": {"value": 1.0}}}},
        operators={"MatMul": 5},
    )
    return folder


def _use_manifest(bundle: Any) -> str:
    manifest = bundle.manifest
    return json.dumps(manifest.to_json(), default=str)


def _use_template(bundle: Any) -> object:
    return ChatTemplate.from_bundle(bundle).render(MESSAGES)


def _use_tokenizer(bundle: Any) -> object:
    codec = TextCodec.from_file(bundle.tokenizer)
    ids = codec.encode("the inn, there. aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab")
    return codec.decode(ids), codec.decode(ids, keep_special_tokens=True), codec.added_tokens


def _use_graph(bundle: Any) -> object:
    engine = Engine(bundle, threads=1)
    engine.prefill([1, 2, 3])
    return engine.decode(4)


@functools.cache
def _opened() -> Any:
    bundle = open_bundle(bundle_folder(), verify=True)
    return bundle, Engine(bundle, threads=1)


def _session_engine() -> Any:
    _opened()[1].reset()
    return _opened()


def _session_valid() -> bytes:
    bundle, engine = _session_engine()
    engine.prefill([1, 2, 3])
    write_session(workplace() / "valid.session", bundle, [1, 2, 3, 4], engine)
    return (workplace() / "valid.session").read_bytes()


def _session(content: bytes) -> object:
    return read_session(written("a.session", content), *_session_engine())


def _mutate_session(rng: Any, content: bytes) -> bytes:
    """Its bytes, or those of one of its arrays, whose checksum is right."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(made, "w") as altered:
        chosen = rng.choice(archive.namelist())
        for name in archive.namelist():
            inner = archive.read(name)
            altered.writestr(name, mutate_bytes(rng, inner) if name == chosen else inner)
    return made.getvalue()


@functools.cache
def _zip_valid() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(bundle_folder().rglob("*")):
            if file.is_file() and file.stat().st_size < 3000:
                archive.write(file, f"b/{file.relative_to(bundle_folder())}")
    return packed.getvalue()


def _zip(content: bytes) -> object:
    folder = workplace() / "unpacked"
    shutil.rmtree(folder, ignore_errors=True)
    return unpack(io.BytesIO(content), "x.zip", folder)


def _golden_valid() -> bytes:
    packed = io.BytesIO()
    np.savez(packed, ids=np.arange(9) % 3, ends=np.array([4, 9]), logits=np.zeros((2, 37), np.float32), limit=0.5)
    return packed.getvalue()


def _golden(file: Path) -> object:
    bundle = open_bundle(bundle_folder(), verify=False)
    files = {**bundle.manifest.files, names.GOLDEN: FileRecord(file.stat().st_size, "0" * 64)}
    listed = dataclasses.replace(bundle.manifest, files=files)
    return Golden.of(dataclasses.replace(bundle, path=file.parent, manifest=listed))


def _embedding_rows(content: bytes) -> object:
    written("table.bin", bytes(4 * 6 * 8))
    return EmbeddingRows(workplace(), content.decode("utf-8", "replace"))[np.array([[0, 3, 5]])]


def _of_bundle(file: str, use: Callable[[Any], object], mutate: Mutation) -> Target:
    return within(bundle_folder, file, lambda folder: use(open_bundle(folder, verify=True)), mutate)


_PLACE = json_bytes({"file": "table.bin", "offset": 0, "shape": [6, 4, 8]})

BUNDLES: Mapping[str, Target] = {
    "manifest": _of_bundle(names.MANIFEST, _use_manifest, mutate_json),
    "generation_config": _of_bundle(names.GENERATION_CONFIG, sampling_defaults, mutate_json),
    "tokenizer_config": _of_bundle(names.TOKENIZER_CONFIG, _use_template, mutate_json),
    "tokenizer": _of_bundle(names.TOKENIZER, _use_tokenizer, mutate_json),
    "graph": _of_bundle(names.LAST_LOGITS_GRAPH, _use_graph, mutate_bytes),
    "external_data": _of_bundle(names.LAST_LOGITS_GRAPH, str, mutate_bytes),
    "embedding_rows": Target(_embedding_rows, lambda: _PLACE, mutate_json),
    "session": Target(_session, _session_valid, _mutate_session),
    "zip": Target(_zip, _zip_valid, mutate_bytes),
    "golden_logits": alone(f"golden/{names.GOLDEN}", _golden, _golden_valid(), mutate_bytes),
}


# --- what people write: templates, conversations, corpora; and the rows of a job --------------------------------------
def _corpus(file: Path) -> object:
    corpus = open_corpus([file])
    survey(corpus)
    return train_bpe((text for document in corpus.documents() for text in document.texts()), 260).vocab_size


def _calibration(file: Path) -> object:
    return encode_file(file, TextCodec.from_file(bundle_folder() / names.TOKENIZER))


_ROWS = [{"id": 1, "prompt": "a", "stop": ["b"], "logit_bias": {"3": 1}}, {"id": "x", "messages": MESSAGES}]


def _requests(file: Path) -> object:
    rows = [*read_rows(file)]
    for row in rows:
        assert json.loads(answered_line(row, error_of("no")))["id"] == row.id
    return [parse_request(row.content) for row in rows if isinstance(row.content, dict)]


def _output(out: Path) -> object:
    with out.open("ab", buffering=0) as file:
        assert isinstance(file, io.FileIO)
        job = Job(out, out, file, {1, "a"})
        job.resume()
        return job.done


TEXTS: Mapping[str, Target] = {
    "chat_template": alone(
        "t.jinja", lambda file: ChatTemplate(read_template(file)).render(MESSAGES), TEMPLATE.encode(), mutate_text
    ),
    "corpus": alone("corpus.txt", _corpus, CORPUS.encode(), mutate_text),
    "rows": alone(
        "rows.jsonl",
        lambda file: survey(open_corpus([file])).documents,
        json_bytes({"messages": MESSAGES}),
        mutate_json,
    ),
    "calibration": alone("calibration.txt", _calibration, CORPUS.encode(), mutate_text),
    "stories": alone("s.jsonl", read_stories, b'{"text": "a"}\n{"text": "b"}', mutate_json),
    "requests": alone("rows.jsonl", _requests, b"\n".join(map(json_bytes, _ROWS)), mutate_json),
    "output": alone("output.jsonl", _output, b'{"id":1,"text":"x"}\n{"id":"a","error":"b"}\n', mutate_bytes),
    "messages": alone("chat.json", read_messages, json_bytes({"messages": MESSAGES}), mutate_json),
}
