"""A model is fetched from a Hub on loopback: only what an export reads, of one commit, and every failure a sentence."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
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

from ...loopback_hub import Files, serving

NAME = "org/tiny"
WEIGHTS = b"weights " * 400_000
SMALL: Files = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "chat_template.jinja": b"{{ 1 }}"}
OTHERS: Files = {
    "README.md": b"#",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"twice",
    "onnx/model.onnx": b"onnx",
    "original/model.safetensors": b"before",
    "modeling_own.py": b"code",
}
BEFORE_1 = version("huggingface_hub").startswith("0.")
constants: Any = library_constants


class Heard(Progress):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.shares: list[tuple[int, int]] = []

    def say(self, sentence: str) -> None:
        self.lines.append(sentence)

    def stage(self, name: str) -> None:
        self.lines.append(name)

    def advance(self, done: int, total: int) -> None:
        self.shares.append((done, total))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub in the place of huggingface.co, and a cache in a folder of the test."""
    with serving() as served:
        monkeypatch.chdir(tmp_path)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1,localhost")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        template = served.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # Releases before 1.0 have a copy there.
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between two attempts of the library
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


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- what is fetched ----------------------------------------------------------------------------------------------
@pytest.mark.oldest
def test_only_what_an_export_reads_is_fetched(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1_000_000)
    repository = hub.add(NAME, {**SMALL, **OTHERS, "model.safetensors": WEIGHTS})
    heard = Heard()
    found = fetched(progress=heard)
    assert names_in(found.folder) == {*SMALL, "model.safetensors"}
    assert (found.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert found.revision == found.folder.name == repository.sha()
    assert heard.lines[0] == f"fetching {NAME} from {hub.address.removeprefix('http://')}"
    assert [line for line in heard.lines if line.startswith("fetch ")][-1] == "fetch 1 file, 3 MB"
    assert heard.shares[-1] == (len(WEIGHTS), len(WEIGHTS))
    if not BEFORE_1:  # which counts files alone
        assert [done for done, total in heard.shares if total == len(WEIGHTS)][:2] == [1_000_000, 2_000_000]


def test_python_files_are_fetched_where_they_may_run(hub):
    hub.add(NAME, {**SMALL, **OTHERS, "model.safetensors": WEIGHTS})
    found = find(NAME, SILENT, network=True)
    found.fetch_small(SILENT, code=True)
    assert names_in(found.folder) == {*SMALL, "modeling_own.py"}


def test_of_a_divided_model_the_listed_files_are_fetched(hub):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    parts: Files = dict.fromkeys(index["weight_map"].values(), WEIGHTS)
    hub.add(NAME, {**SMALL, **OTHERS, **parts, "model.safetensors.index.json": json.dumps(index).encode()})
    assert names_in(fetched().folder) == {*SMALL, *parts, "model.safetensors.index.json"}


def test_what_is_in_the_cache_is_not_fetched_again_nor_needs_the_network(hub):
    hub.add(NAME, {**SMALL, "model.safetensors": WEIGHTS})
    first = fetched()
    hub.asked.clear()
    assert fetched() == first
    assert not [line for line in hub.asked if line.startswith("GET") and "/api/" not in line]
    hub.asked.clear()
    again = fetched(network=False)
    assert (again.folder, again.revision) == (first.folder, first.revision)
    assert hub.asked == []


@pytest.mark.oldest
def test_offline_mode_of_the_library_forbids_to_fetch(hub, monkeypatch):
    hub.add(NAME, {**SMALL, "model.safetensors": WEIGHTS})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "has no model org/tiny, and only `pastkey export` fetches" in refusal(MissingFileError)
    assert hub.asked == []


def test_all_files_are_of_one_commit_though_the_repository_changes(hub):
    """Before the first file, and between the small files and the weights."""
    repository = hub.add(NAME, {**SMALL, "model.safetensors": WEIGHTS})

    def change(asked: str) -> None:
        first = asked.endswith("/config.json") and len(repository.commits) == 1
        if first or (asked.endswith("/model.safetensors") and len(repository.commits) == 2):
            number = str(len(repository.commits)).encode()
            changed = {name: data + b" " * len(repository.commits) for name, data in SMALL.items()}
            repository.commits.append({**changed, "model.safetensors": number * 99})

    hub.before = change
    found = fetched()
    assert len(repository.commits) == 3
    assert found.revision == repository.sha(1)
    assert (found.folder / "model.safetensors").read_bytes() == b"1" * 99
    assert (found.folder / "config.json").read_bytes() == SMALL["config.json"] + b" "
    assert (found.folder / "tokenizer.json").read_bytes() == SMALL["tokenizer.json"] + b" "


def test_a_download_that_breaks_goes_on_where_it_broke(hub, monkeypatch):
    hub.add(NAME, {**SMALL, "model.safetensors": WEIGHTS})
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.breaks = 1
    if BEFORE_1:  # in the next attempt
        assert "try again" in refusal(ResourceError)
    assert (fetched().folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges == ["bytes=1600000-"]


def test_telemetry_is_off(hub):
    hub.add(NAME, {**SMALL, "model.safetensors": WEIGHTS})
    fetched()
    assert hub.agents
    assert not [agent for agent in hub.agents if "torch" in agent or "agent/" in agent]
    assert {line.split("/")[1] for line in hub.asked} <= {"api", "org", "blobs"}
    assert not [line for line in hub.asked if "/api/" in line and NAME not in line]


# --- what is refused ----------------------------------------------------------------------------------------------
def test_a_private_model_is_read_with_its_token(hub, monkeypatch):
    hub.add(NAME, {**SMALL, "model.safetensors": WEIGHTS}, token="hf_right")
    assert "or it is private" in refusal(MissingFileError)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "refused access to org/tiny (401): the token may be wrong" in refusal(InputError)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert fetched().network


def test_a_gated_model_says_how_to_be_let_in(hub):
    hub.add(NAME, {**SMALL, "model.safetensors": WEIGHTS}, gated=True, token="hf_right")
    words = f"accept its conditions at {hub.address}/{NAME}, make a token at {hub.address}/settings/tokens, and set it"
    assert words in refusal(InputError)
    Path("token").write_text("hf_right")  # where `hf auth login` puts it
    assert fetched().network


def failing(number: int) -> Callable[..., NoReturn]:
    def fail(path: Any, *arguments: Any, **options: Any) -> NoReturn:
        raise OSError(number, os.strerror(number), str(path))

    return fail


def patched(place: str, value: Any) -> Callable[[Any, pytest.MonkeyPatch], None]:
    return lambda hub, patch: patch.setattr(place, value)


DISK = type("Usage", (), {"free": 2_000_000})()
REFUSED: dict[str, tuple[Callable[[Any, pytest.MonkeyPatch], object], type[PastkeyError], str]] = {
    "no hub": (
        patched("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9"),
        ResourceError, "could be fetched from 127.0.0.1:9 .* hf download org/tiny --local-dir tiny  elsewhere and copy",
    ),
    "a broken hub": (
        lambda hub, patch: setattr(hub, "status", 503), ResourceError, "answered 503 for org/tiny: try again later$",
    ),
    "a small disk": (
        patched("shutil.disk_usage", lambda path: DISK),
        ResourceError, "^org/tiny takes 3 MB more in .*2 MB are free: make room, or name .* with HF_HOME",
    ),
    "a disk that becomes full": (
        patched("huggingface_hub.file_download.http_get", failing(errno.ENOSPC)),
        ResourceError, "became full while org/tiny was fetched: make room, or name",
    ),
    "a cache that cannot be written": (
        patched("os.makedirs", failing(errno.EROFS)),
        ResourceError, "^the cache of huggingface_hub cannot be written .* name a folder of yours with HF_HOME$",
    ),
    "no library": (
        lambda hub, patch: patch.setitem(sys.modules, "huggingface_hub", None),
        MissingExtraError, r"pip install huggingface-hub  and .* \(pastkey's extras export,huggingface\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("spoilt", REFUSED)
def test_a_model_that_cannot_be_fetched_is_refused(hub, spoilt, monkeypatch):
    spoil, error, word = REFUSED[spoilt]
    hub.add(NAME, {**SMALL, "model.safetensors": WEIGHTS})
    spoil(hub, monkeypatch)
    assert re.search(word, refusal(error))


def test_an_id_that_does_not_exist(hub):
    words = "has no model models/smol, or it is private, and there is no folder 'models' here: correct the id"
    assert words in refusal(MissingFileError, "models/smol")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model-Q4_K_M.gguf": b"GGUF"}, "hf download org/tiny model-Q4_K_M.gguf --local-dir .  and  pastkey export m"),
        ({"config.json": b"{}", "a.gguf": b"GGUF"}, "has no safetensors, but GGUF files"),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "as pytorch_model.bin, a pickle"),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "hf download org/tiny --local-dir tiny  and  pastkey exp"),
        ({"README.md": b""}, "has no model.safetensors: expected a decoder of transformers, or a bundle of pastkey"),
    ],
)
def test_a_repository_without_weights_that_can_be_read(hub, files, words):
    hub.add(NAME, files)
    assert words in refusal(InputError)


def test_a_download_that_breaks_again_and_again_leaves_nothing_half_written(hub):
    hub.add(NAME, {**SMALL, "model.safetensors": WEIGHTS})
    hub.breaks = 1000
    assert "no model of this id could be fetched from" in refusal(ResourceError)
    assert "only in part (model.safetensors is missing)" in refusal(MissingFileError, network=False)
    hub.breaks = 0
    assert (fetched().folder / "model.safetensors").read_bytes() == WEIGHTS


# --- as a source --------------------------------------------------------------------------------------------------
def too_large(weights: int, resident_bytes: int, temporary_bytes: int) -> NoReturn:
    raise ResourceError(f"{weights} weights, {resident_bytes} bytes of them in memory, {temporary_bytes} on disk")


BEFORE_WEIGHTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, {}, "weights of org/tiny are quantized already"),
    "another class": ({"architectures": ["LlamaForSequenceClassification"]}, {}, "which is not a decoder of trans"),
    "code": ({"auto_map": {"AutoConfig": "own.Own"}}, {}, r"org/tiny brings Python code of its own \(own.py\)"),
    "an unknown type": ({"model_type": "no-such-model"}, {}, "cannot load org/tiny: "),
    "no decoder": ({"model_type": "vit", "architectures": None}, {}, "holds a vit, which is not a decoder"),
    "beyond the memory": ({}, {"before_loading": too_large}, "800000 weights, 0 bytes of them in memory, 0 on disk"),
}


@pytest.mark.parametrize("spoilt", BEFORE_WEIGHTS)
def test_what_cannot_be_exported_is_refused_before_its_weights_are_fetched(hub, spoilt):
    pytest.importorskip("transformers", reason="transformers is not installed")
    changed, options, words = BEFORE_WEIGHTS[spoilt]
    config = {**json.loads(SMALL["config.json"])} | changed
    hub.add(NAME, {**SMALL, "config.json": json.dumps(config).encode(), "model.safetensors": WEIGHTS})
    with pytest.raises(PastkeyError, match=words):
        open_source(NAME, Opening(network=True, **options))
    assert not [line for line in hub.asked if "safetensors" in line]


def test_a_path_is_no_id_and_a_bundle_is_not_exported_again(hub):
    with pytest.raises(MissingFileError, match="no such source: org/tiny does not exist; expected"):
        open_source(Path(NAME), Opening(network=True))
    assert hub.asked == []
    hub.add(NAME, {"pastkey.json": b"{}", **SMALL})
    with pytest.raises(InputError, match="org/tiny is a bundle"):
        open_source(NAME, Opening(network=True))


def test_the_module_imports_neither_torch_nor_the_library():
    """A bundle is fetched by its id without torch."""
    code = "import sys, pastkey.export.source.hub; print({'torch', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
