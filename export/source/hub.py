"""Fetches a model from the Hugging Face Hub into the cache of huggingface_hub, and only the files that an export reads.

All files of a fetch are of one commit, that of the first file: a repository may change meanwhile. The small files come
first, so that a model that cannot be exported is refused before its weights, and a cache with weights has all the rest.
huggingface_hub itself reads HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import inspect
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pastkey.contract import names
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.errors import (
    InputError,
    MissingExtraError,
    MissingFileError,
    PastkeyError,
    ResourceError,
    first_line,
    missing_extra,
)
from pastkey.files.durable import whole_folder
from pastkey.files.folder import parse_records, read_json
from pastkey.files.memory import shown_bytes

from ..progress import SILENT, Progress

_INDEX = "model.safetensors.index.json"
# The files that transformers reads next to the weights, at the top of the repository.
_SMALL = {
    names.CONFIG, names.GENERATION_CONFIG, names.TOKENIZER, names.TOKENIZER_CONFIG, names.CHAT_TEMPLATE, _INDEX,
    "chat_template.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
}  # fmt: skip
_SMALL_ENDINGS = (".model", ".tiktoken")  # SentencePiece's and tiktoken's vocabularies
_OTHER_WEIGHTS = (".gguf", ".onnx", ".bin", ".pt", ".pth", ".ckpt")
_TEMPLATES = "additional_chat_templates/"


@dataclass(frozen=True)
class HubModel:
    """A model on the Hub at one commit. Some of its files are in the cache."""

    name: str  # ORG/NAME
    revision: str  # the commit
    folder: Path  # of the commit in the cache
    files: Mapping[str, int]  # path in the repository -> bytes; without network, those of the cache
    network: bool  # whether more may be fetched

    def __str__(self) -> str:
        return self.name

    @property
    def folder_name(self) -> str:
        """NAME, for a folder."""
        return self.name.partition("/")[2]

    @property
    def is_bundle(self) -> bool:
        """Whether this is a bundle, which needs no export."""
        return names.MANIFEST in self.files

    def fetch_small(self, progress: Progress, *, code: bool) -> None:
        """Fetches the files that transformers reads next to the weights, with `code` also the Python files."""
        wanted = (*_SMALL_ENDINGS, ".py") if code else _SMALL_ENDINGS
        self._fetch(
            [n for n in self.files if n in _SMALL or n.startswith(_TEMPLATES) or ("/" not in n and n.endswith(wanted))],
            progress,
        )

    def weights(self) -> dict[str, int]:
        """The files of weights that transformers reads, with their bytes; call `fetch_small` before.

        Raises InputError or MissingFileError if there are none.
        """
        if names.WEIGHTS in self.files:
            return {names.WEIGHTS: self.files[names.WEIGHTS]}
        if _INDEX not in self.files:
            raise self._without_weights()
        listed = read_json(self.folder / _INDEX).get("weight_map")
        shards = sorted({str(file) for file in listed.values()} if isinstance(listed, dict) else ())
        missing = next((name for name in shards if name not in self.files), None)
        if missing is not None and not self.network:
            raise self._partly(missing)
        return {name: self.files[name] for name in shards if name in self.files}  # `open_folder` names missing ones

    @property
    def has_weights(self) -> bool:
        """Whether the files of `weights` are in the cache."""
        return all((self.folder / name).is_file() for name in self.weights())

    def fetch_weights(self, progress: Progress) -> None:
        """Fetches the files of `weights`."""
        self._fetch(self.weights(), progress, "the weights")

    def fetch_bundle(self, progress: Progress) -> Bundle:
        """Fetches the bundle and checks all its hashes. Raises InputError or IntegrityError."""
        self._fetch([names.MANIFEST], SILENT)
        listed = parse_records(self.folder, read_json(self.folder / names.MANIFEST).get("files"))
        self._fetch([name for name in self.files if name in listed or name == names.SIGNATURE], progress)
        return open_bundle(self.folder, verify=True)

    def write_bundle(self, out: Path, progress: Progress, *, force: bool) -> Bundle:
        """Fetches the bundle and copies it to `out`. Raises as `fetch_bundle` and `whole_folder`."""
        with whole_folder(out, force=force) as folder:
            bundle = self.fetch_bundle(progress)
            for name in (*bundle.manifest.files, names.MANIFEST, names.SIGNATURE):
                if (self.folder / name).is_file():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(self.folder / name, folder / name)
        return open_bundle(out, verify=False)

    def _fetch(self, files: Iterable[str], progress: Progress, what: str = "") -> None:
        missing = [name for name in files if not (self.folder / name).is_file()]
        if not missing:
            return
        if not self.network:
            raise self._partly(missing[0])
        total = sum(self.files[name] for name in missing)
        what = what or f"{len(missing)} {'file' if len(missing) == 1 else 'files'}"
        progress.stage(f"fetch {what}, {shown_bytes(total)}")
        done = 0
        with _sentences(self.name):
            for name in missing:  # one by one and here, where Ctrl-C ends a download at once
                _download(self.name, name, revision=self.revision, bars=_bars(progress, done, total))
                done += self.files[name]
                progress.advance(done, total)

    def _partly(self, missing: str) -> MissingFileError:
        return MissingFileError(
            f"the cache in {_cache()} has {self.name} only in part ({missing} is missing), and fetching is switched "
            "off by --no-network or HF_HUB_OFFLINE: fetch it once without them"
        )

    def _without_weights(self) -> InputError | MissingFileError:
        if not self.network:
            return self._partly(names.WEIGHTS)
        others = sorted(name for name in self.files if name.endswith(_OTHER_WEIGHTS))
        if others:
            return InputError(
                f"{self.name} has no safetensors, but {', '.join(others[:3])}{', ...' if others[3:] else ''}: fetch "
                f"the files that you want with  hf download {self.name} --local-dir {self.folder_name}  and export the "
                "folder, or a .gguf file in it; a pickle can run any code when it is read"
            )
        return InputError(
            f"{self.name} has no {names.WEIGHTS}: expected a decoder of transformers, or a bundle of pastkey"
        )


def find(name: str, progress: Progress, *, network: bool, revision: str = "") -> HubModel:
    """Looks a model up on the Hub, or without `network` in the cache, and fetches its config.json or manifest.

    Raises MissingFileError, InputError, ResourceError, or MissingExtraError without huggingface_hub. `revision` is a
    commit, "" the newest one.
    """
    try:
        library = _library()
    except MissingExtraError as error:
        raise MissingExtraError(
            f"no path {name} exists, and fetching a model by its id needs more packages (a bundle only "
            f"huggingface-hub): {error}"
        ) from None
    if not network or library.constants.HF_HUB_OFFLINE:
        return _in_cache(name, revision)
    progress.say(f"fetching {name} from {_host()}")
    with _sentences(name):
        about = library.HfApi().model_info(name, files_metadata=True)  # fails at once where there is no network
        first = next((file for file in (names.MANIFEST, names.CONFIG) if file in _sizes(about)), None)
        if first is not None:
            folder = _download(name, first).parent
            if folder.name != about.sha:  # changed between the two
                about = library.HfApi().model_info(name, revision=folder.name, files_metadata=True)
    found = HubModel(name, about.sha, folder if first is not None else _cache(), _sizes(about), network=True)
    if first is None:
        raise found._without_weights()
    return found


def _in_cache(name: str, revision: str) -> HubModel:
    for first in (names.MANIFEST, names.CONFIG):
        path = _library().try_to_load_from_cache(name, first, revision=revision or None)
        if isinstance(path, str):
            folder = Path(path).parent
            files = {
                file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()
            }
            return HubModel(name, folder.name, folder, files, network=False)
    at = f" at commit {revision[:12]}" if revision else ""
    raise MissingFileError(
        f"no path {name} exists, the cache in {_cache()} has no model {name}{at}, and only `pastkey export` fetches, "
        f"without --no-network and HF_HUB_OFFLINE: correct the path, or fetch it with  pastkey export {name} --out "
        f"{name.partition('/')[2]}"
    )


def _sizes(about: Any) -> dict[str, int]:
    return {file.rfilename: file.size or 0 for file in about.siblings or ()}


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.utils
    except ModuleNotFoundError as error:
        raise missing_extra(error, "export", "huggingface") from None
    library: Any = huggingface_hub
    library.constants.HF_HUB_DISABLE_TELEMETRY = True
    library.utils.logging.set_verbosity_error()  # its warnings become error messages, or the file is fetched again
    return library


def _cache() -> Path:
    return Path(_library().constants.HF_HUB_CACHE)


def _host() -> str:
    return urlsplit(str(_library().constants.ENDPOINT)).netloc.rpartition("@")[2]


def _download(name: str, file: str, *, bars: Any = None, **options: Any) -> Path:
    """Fetches a file into the cache, unless it is there. Returns its path."""
    library = _library()
    if bars is not None and "tqdm_class" in inspect.signature(library.hf_hub_download).parameters:
        options["tqdm_class"] = bars
    else:  # before 1.0
        library.utils.disable_progress_bars()
    return Path(library.hf_hub_download(name, file, **options))


def _bars(progress: Progress, done: int, total: int) -> Any:
    """Returns a class in tqdm's place, whose bars report the bytes of one file, after `done` of `total`."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # tqdm ships without types
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})
            self.counted = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.counted += int(n or 0)
            progress.advance(min(done + self.counted, total), total)
            return None

    return Bar


@contextlib.contextmanager
def _sentences(name: str) -> Iterator[None]:
    """Turns the errors of huggingface_hub about a model, and of the libraries below it, into sentences."""
    try:
        yield
    except PastkeyError:
        raise
    except Exception as error:  # of huggingface_hub, requests or httpx, the disk
        raise _sentence(name, error) from error


def _sentence(name: str, error: Exception) -> PastkeyError:
    from huggingface_hub import errors

    host, endpoint = _host(), _library().constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{name} is gated, and {host} gave no access: accept its conditions at {endpoint}/{name}, "
            f"make a token at {endpoint}/settings/tokens, and set it as HF_TOKEN or type  hf auth login"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        folder = name.partition("/")[0]
        return MissingFileError(
            f"{host} has no model {name}, or it is private, and there is no folder {folder!r} here: correct the id or "
            "the path; for a private model set HF_TOKEN to a token that may read it"
        )
    causes = [*_causes(error)]
    status = next((r.status_code for c in causes if (r := getattr(c, "response", None)) is not None), None)
    if status in (401, 403):
        return InputError(
            f"{host} refused access to {name} ({status}): the token may be wrong, or may not allow this: make another "
            f"at {endpoint}/settings/tokens and set it as HF_TOKEN"
        )
    if status is not None:
        return ResourceError(f"{host} answered {status} for {name}: try again later")
    folder = name.partition("/")[2]
    return ResourceError(
        f"no path {name} exists, and no model of this id could be fetched from {host} ({first_line(causes[-1])}): try "
        "again, which fetches only the files that are missing; for a machine without network type  hf download "
        f"{name} --local-dir {folder}  elsewhere and copy that folder"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
