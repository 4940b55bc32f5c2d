"""The examples for phones as programs of a PC: a line of JSON goes in for each call, and one comes out."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pastkey.files.folder import file_records, read_json, write_json

from ..runtime.sampling.vectors import sampling_vectors
from ..shared import ran
from .generations import library

Program = Sequence[str | Path]  # the command; its arguments are an address, a folder and a hash


@dataclass
class Served:
    """A folder on loopback."""

    url: str
    asked: list[str] = field(default_factory=list)  # for these paths


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Served]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            served.asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    served = Served(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answers(
    program: Program, url: str, folder: Path, calls: Sequence[dict[str, Any]] = (), sha256: str = ""
) -> list[dict[str, Any]]:
    given = "".join(json.dumps(call) + "\n" for call in calls)
    own = os.environ | {"ONNXRUNTIME": str(library()), "DJL_CACHE_DIR": str(folder.parent)}
    done = ran(*program, url, folder, sha256, input=given, env=own, timeout=300)
    return [json.loads(line) for line in done.stdout.splitlines()]


def call(prompt: str, **changes: Any) -> dict[str, Any]:
    """A call of both programs, by the names of Python's options."""
    settings = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "seed": 0}
    return {"prompt": prompt, "max_new_tokens": 24, **settings, **changes}


def with_old_merges(bundle: Path, folder: Path) -> Path:
    """A copy whose tokenizer.json has its merges as tokenizers before 0.20 wrote them, which DJL 0.28 has.

    The application's DJL 0.33 has a later one, and reads both.
    """
    shutil.copytree(bundle, folder)
    tokenizer, manifest = (read_json(folder / name) for name in ("tokenizer.json", "pastkey.json"))
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    write_json(folder / "tokenizer.json", tokenizer)
    manifest["files"] |= file_records(folder, ["tokenizer.json"])
    write_json(folder / "pastkey.json", manifest)
    return folder


SAMPLED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 2**62 + 5},
]


def check_vectors(program: Program, url: str, folder: Path) -> None:
    """The program draws the tokens of the sampling vectors."""
    vectors = [vector for vector in sampling_vectors() if vector.generates]
    logits = [np.maximum(vector.logits, -1e30).tolist() for vector in vectors]
    drawn = [{**vector.settings, "seed": vector.seed, "ids": vector.ids} for vector in vectors]
    calls = [call("", **given, logits=one) for given, one in zip(drawn, logits, strict=True)]
    assert [found["token"] for found in answers(program, url, folder, calls)] == [each.expected for each in vectors]


def check_download(program: Program, bundle: Path, folder: Path) -> None:
    """A folder is whole or has no pastkey.json; a file that is right already is not fetched again."""
    sha256 = hashlib.sha256((bundle / "pastkey.json").read_bytes()).hexdigest()
    with serving(bundle) as served:
        (refused,) = answers(program, served.url, folder, sha256="0" * 64)
        assert "another SHA-256" in refused["error"]
        assert not (folder / "pastkey.json").exists()
        assert answers(program, served.url, folder, sha256=sha256) == []
        brought = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        assert brought >= {"pastkey.json", "tokenizer.json", "onnx/model.onnx", "onnx/model.onnx_data"}
        assert brought <= {*read_json(bundle / "pastkey.json")["files"], "pastkey.json"}
        (folder / "tokenizer.json").write_text("{}")
        (folder / "pastkey.json").unlink()
        served.asked.clear()
        assert answers(program, served.url, folder) == []
        assert sorted(served.asked) == ["/pastkey.json", "/tokenizer.json"]
        for name in brought:
            assert (folder / name).read_bytes() == (bundle / name).read_bytes()
        (refused,) = answers(program, f"{served.url}/elsewhere", folder / "other")
        assert "404" in refused["error"]


def check_altered(program: Program, bundle: Path, folder: Path) -> None:
    """`bundle`: one with an altered tokenizer.json."""
    with serving(bundle) as served:
        (refused,) = answers(program, served.url, folder)
    assert "tokenizer.json has another SHA-256 than pastkey.json says" in refused["error"]
    assert not (folder / "pastkey.json").exists()
    assert not (folder / "tokenizer.json").exists()
