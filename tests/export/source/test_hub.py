"""A model is fetched from a Hub on loopback: only what an export reads, of one commit, and every failure a sentence."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

from huggingface_hub import constants as library_constants

from pastkey.errors import InputError, MissingExtraError, MissingFileError, PastkeyError, ResourceError
from pastkey.export.progress import SILENT, Progress
from pastkey.export.source.hub import HubModel, find
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Opening

from ...loopback_hub import Files, read_files, serving
from ..commands import Heard

NAME = "org/tiny"
WEIGHTS = b"weights " * 400_000
SMALL: Files = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "chat_template.jinja": b"{{ 1 }}"}
WHOLE: Files = {**SMALL, "model.safetensors": WEIGHTS}
OTHERS: Files = {
    "README.md": b"#", "pytorch_model.bin": b"pickle", "consolidated.safetensors": b"twice", "onnx/model.onnx": b"onnx",
    "original/model.safetensors": b"before", "modeling_own.py": b"code",
}  # fmt: skip
BEFORE_1 = version("huggingface_hub").startswith("0.")
constants: Any = library_constants


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub instead of huggingface.co with a whole model, and a cache in a folder of the test."""
    with serving() as served:
        monkeypatch.chdir(tmp_path)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1,localhost")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        template = served.address + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": served.address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_OFFLINE": False,
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        # Releases before 1.0 have a copy there.
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between two attempts of the library
        served.add(NAME, WHOLE)
        yield served


def fetched(name: str = NAME, progress: Progress = SILENT, *, network: bool = True) -> HubModel:
    found = find(name, progress, network=network)
    found.fetch_small(progress, code=False)
    found.fetch_weights(progress)
    return found


def refusal(kind: type[PastkeyError], name: str = NAME, *, network: bool = True) -> str:
    with pytest.raises(kind) as caught:
        fetched(name, network=network)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is fetched ----------------------------------------------------------------------------------------------
@pytest.mark.oldest
def test_only_what_an_export_reads_is_fetched_without_telemetry(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1_000_000)
    repository = hub.add(NAME, {**WHOLE, **OTHERS})
    heard = Heard()
    found = fetched(progress=heard)
    assert read_files(found.folder) == WHOLE
    assert found.revision == found.folder.name == repository.sha()
    assert heard.said == [f"fetching {NAME} from {hub.address.removeprefix('http://')}"]
    assert heard.stages[-1] == "fetch the weights, 3 MB"
    assert heard.shares[-1] == (len(WEIGHTS), len(WEIGHTS))
    if not BEFORE_1:  # which counts only files
        assert [done for done, total in heard.shares if total == len(WEIGHTS)][:2] == [1_000_000, 2_000_000]
    found.fetch_small(SILENT, code=True)
    assert read_files(found.folder).keys() == {*WHOLE, "modeling_own.py"}
    assert hub.agents
    assert not [agent for agent in hub.agents if "torch" in agent or "agent/" in agent]
    assert {line.split("/")[1] for line in hub.asked} <= {"api", "org", "blobs"}
    assert not [line for line in hub.asked if "/api/" in line and NAME not in line]


def test_of_a_divided_model_the_listed_files_are_fetched(hub):
    parts: Files = dict.fromkeys(("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), WEIGHTS)
    index = json.dumps({"weight_map": dict(zip("ab", parts, strict=True))}).encode()
    listed = {**SMALL, **parts, "model.safetensors.index.json": index}
    hub.add(NAME, {**OTHERS, **listed})
    assert read_files(fetched().folder) == listed


def test_what_is_in_the_cache_is_not_fetched_again_nor_needs_the_network(hub, monkeypatch):
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "has no model org/tiny, and only `pastkey export` fetches" in refusal(MissingFileError)
        assert hub.asked == []
    first = fetched()
    hub.asked.clear()
    assert fetched() == first
    assert not [line for line in hub.asked if line.startswith("GET") and "/api/" not in line]
    hub.asked.clear()
    again = fetched(network=False)
    assert (again.folder, again.revision) == (first.folder, first.revision)
    assert hub.asked == []


def test_all_files_are_of_one_commit_though_the_repository_changes(hub):
    """Before the first file, and between the small files and the weights."""
    repository = hub.repositories[NAME]

    def change(asked: str) -> None:
        number = len(repository.commits)
        if (number == 1 and asked.endswith("/config.json")) or (number == 2 and asked.endswith("/model.safetensors")):
            repository.commits.append({name: data[:99] + b" " * number for name, data in WHOLE.items()})

    hub.before = change
    found = fetched()
    assert len(repository.commits) == 3
    assert found.revision == repository.sha(1)
    assert read_files(found.folder) == repository.commits[1]


def test_a_download_that_breaks_goes_on_where_it_broke(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.breaks = 1
    if BEFORE_1:  # in the next attempt
        assert "try again" in refusal(ResourceError)
    assert read_files(fetched().folder) == WHOLE
    assert hub.ranges == ["bytes=1600000-"]


# --- what is refused ----------------------------------------------------------------------------------------------
def test_a_private_model_is_read_with_its_token(hub, monkeypatch):
    hub.add(NAME, WHOLE, token="hf_right")
    assert "has no model org/tiny, or it is private, and there is no folder 'org'" in refusal(MissingFileError)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "refused access to org/tiny (401)" in refusal(InputError)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert fetched().network


def test_a_gated_model_says_how_to_be_let_in(hub):
    hub.add(NAME, WHOLE, gated=True, token="hf_right")
    assert f"accept its conditions at {hub.address}/{NAME}, make a token" in refusal(InputError)
    Path("token").write_text("hf_right")  # where `hf auth login` puts it
    assert fetched().network


def full(path: Any, *arguments: Any, **options: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


# The content of each place.
REFUSED: dict[str, tuple[str, object, str]] = {
    "no hub": (
        "huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9",
        "no model of this id could be fetched from 127.0.0.1:9 .* hf download org/tiny --local-dir tiny  elsewhere",
    ),
    "a disk that becomes full": (
        "huggingface_hub.file_download.http_get", full, "^no path org/tiny exists, .*No space left on device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("spoilt", REFUSED)
def test_a_model_that_cannot_be_fetched_is_refused(hub, spoilt, monkeypatch):
    place, content, word = REFUSED[spoilt]
    monkeypatch.setattr(place, content)
    assert re.search(word, refusal(ResourceError))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"model-Q4_K_M.gguf": b"GGUF"},
            "has no safetensors, but model-Q4_K_M.gguf: fetch the files that you want with  hf",
        ),
        (
            {"config.json": b"{}", "pytorch_model.bin": b""},
            "hf download org/tiny --local-dir tiny  and export the folde",
        ),
        ({"README.md": b""}, "has no model.safetensors: expected a decoder of transformers, or a bundle of pastkey"),
    ],
)
def test_a_repository_without_weights_that_can_be_read(hub, files, words):
    hub.add(NAME, files)
    assert words in refusal(InputError)


def test_a_hub_that_is_broken_or_breaks_each_download_leaves_nothing_half_written(hub):
    hub.status = 503
    assert "answered 503 for org/tiny" in refusal(ResourceError)
    hub.status, hub.breaks = None, 1000
    assert "no model of this id could be fetched from" in refusal(ResourceError)
    assert "only in part (model.safetensors is missing)" in refusal(MissingFileError, network=False)
    hub.breaks = 0
    assert read_files(fetched().folder) == WHOLE


# --- as a source --------------------------------------------------------------------------------------------------
def too_large(weights: int, resident_bytes: int, temporary_bytes: int) -> NoReturn:
    raise ResourceError(f"{weights} weights, {resident_bytes} bytes of them in memory, {temporary_bytes} on disk")


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, {}, "which is not a decoder of transformers"),
        ({"model_type": "vit"}, {}, "holds a vit, which is not a decoder"),
        ({}, {"before_loading": too_large}, "800000 weights, 0 bytes of them in memory, 0 on disk"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_its_weights_are_fetched(hub, config, options, words):
    pytest.importorskip("transformers", reason="transformers is not installed")
    hub.add(NAME, {**WHOLE, "config.json": json.dumps({"model_type": "llama"} | config).encode()})
    with pytest.raises(PastkeyError, match=words):
        open_source(NAME, Opening(network=True, **options))
    assert not [line for line in hub.asked if "safetensors" in line]


def test_a_path_is_no_id_and_a_bundle_is_not_exported_again(hub):
    with pytest.raises(MissingFileError, match="no such source: org/tiny does not exist"):
        open_source(Path(NAME), Opening(network=True))
    assert hub.asked == []
    hub.add(NAME, {"pastkey.json": b"{}", **SMALL})
    with pytest.raises(InputError, match="org/tiny is a bundle"):
        open_source(NAME, Opening(network=True))


def test_a_bundle_is_fetched_by_its_id_without_torch_and_the_library_is_asked_for(hub, monkeypatch):
    code = "import sys, pastkey.export.source.hub; print({'torch', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install '.[huggingface]'" in refusal(MissingExtraError)
