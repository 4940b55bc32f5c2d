"""What is in a bundle, or was written of one: the manifest, the graph, the tokenizer, sessions."""

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
from pastkey.files.folder import FileRecord
from pastkey.runtime import Engine
from pastkey.runtime.engine.embedding import EmbeddingRows
from pastkey.runtime.engine.golden import Golden
from pastkey.runtime.model.generation_config import sampling_defaults
from pastkey.runtime.model.session_file import read_session, write_session
from pastkey.runtime.model.unpack import unpack
from pastkey.runtime.text.chat_template import ChatTemplate
from pastkey.runtime.text.codec import TextCodec

from ..runtime.conftest import Tiny, write_bundle
from .mutations import mutate_bytes, mutate_json
from .reader import Target, changed, json_bytes, workplace, written
from .samples import MESSAGES, TEMPLATE, word_tokenizer


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


def _in_bundle(file: str, use: Callable[[Any], object]) -> Callable[[bytes], object]:
    def read(content: bytes) -> object:
        with changed(bundle_folder(), file, content):
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
    unpack(io.BytesIO(content), "x.zip", folder)
    return folder


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


_CONFIG = names.TOKENIZER_CONFIG
_PLACE = {"file": "table.bin", "offset": 0, "shape": [6, 4, 8]}

BUNDLES: Mapping[str, Target] = {
    "manifest": Target(_in_bundle(names.MANIFEST, _use_manifest), _of_bundle(names.MANIFEST), mutate_json),
    "generation_config": Target(
        _in_bundle(names.GENERATION_CONFIG, sampling_defaults), _of_bundle(names.GENERATION_CONFIG), mutate_json
    ),
    "tokenizer_config": Target(_in_bundle(_CONFIG, _use_template), _of_bundle(_CONFIG), mutate_json),
    "tokenizer": Target(
        _in_bundle(names.TOKENIZER, _use_tokenizer), _of_bundle(names.TOKENIZER), mutate_json, native=True
    ),
    "graph": Target(
        _in_bundle(names.LAST_LOGITS_GRAPH, _use_graph), _of_bundle(names.LAST_LOGITS_GRAPH), mutate_bytes, native=True
    ),
    "external_data": Target(
        _in_bundle(names.LAST_LOGITS_GRAPH, str), _of_bundle(names.LAST_LOGITS_GRAPH), mutate_bytes
    ),
    "embedding_rows": Target(_embedding_rows, json_bytes(_PLACE), mutate_json),
    "session": Target(_session, _session_valid, _mutate_session),
    "zip": Target(_zip, _zip_valid, mutate_bytes),
    "golden_logits": Target(_golden, _golden_valid, mutate_bytes),
}  # fmt: skip
