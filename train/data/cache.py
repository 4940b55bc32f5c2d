"""The tokens that training keeps in the user's cache folder, so that a second run on the same data need not.

An entry is a folder named by its key: the content of the files, the tokenizer, and the length of a window. It holds the
tokenizer and the token files. The token files are linked into the checkpoint and not copied, where the file system
allows it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, Final

import tokenizers

from pastkey.contract import names
from pastkey.errors import PastkeyError
from pastkey.files.durable import new_folder, write_json
from pastkey.files.folder import (
    check_hashes,
    check_sizes,
    file_records,
    parse_records,
    read_manifest,
    sha256,
    user_cache_file,
)
from pastkey.typed import parse

from ..checkpoint import TOKENS_TRAIN, TOKENS_VAL
from ..settings import TrainConfig
from ..tokenizer import TextTokenizer
from .sources import Corpus
from .token_files import DataInfo

MOST_BYTES: Final = 20_000_000_000  # of all entries but the newest
_VERSION: Final = 2  # of these modules' results for the same data
_COPIED = (names.TOKENIZER, names.TOKENIZER_CONFIG)  # people edit them
_LINKED = (TOKENS_TRAIN, TOKENS_VAL)
_FILES = _COPIED + _LINKED


def cache_entry(
    corpus: Corpus, config: TrainConfig, tokenizer: TextTokenizer | None, context: int | None
) -> Path | None:
    """Returns the folder of this data's entry, existing or not. None if there is no cache folder or no file to read."""
    cache = user_cache_file("tokens")
    if cache is None or not corpus.sources:
        return None
    if tokenizer is not None:
        kind: list[Any] = [tokenizer.tokenizer.to_str(), tokenizer.begin, tokenizer.end, tokenizer.chat_template]
        kind += [dict(tokenizer.special_tokens)]
    else:
        kind = [config.tokenizer, config.vocab_size]
    sources = [
        ([(file.suffixes, sha256(file)) for file in source.files], source.name if source.weight else "", source.weight)
        for source in corpus.sources
    ]
    key = repr((_VERSION, tokenizers.__version__, kind, context, sources))
    return cache / hashlib.sha256(key.encode()).hexdigest()[:32]


def take(entry: Path | None, folder: Path) -> DataInfo | None:
    """Puts the files of an entry into `folder`. Returns None if there is no entry, or a damaged one."""
    if entry is None or not (entry / names.MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(entry, "tokens", _VERSION)
        records = parse_records(entry, manifest.get("files"))
        if set(records) != set(_FILES):
            return None
        check_sizes(entry, records)
        check_hashes(entry, records)
        info = parse(DataInfo, manifest.get("data"), "data")
        os.utime(entry)  # the most recently used one
    except (PastkeyError, OSError):
        return None
    _link(entry, folder)
    return info


def keep(entry: Path | None, folder: Path, info: DataInfo) -> bool:
    """Keeps the files of `folder`. Returns False if the cache cannot be written; then only time is lost."""
    if entry is None:
        return False
    try:
        with new_folder(entry, force=True) as place:
            _link(folder, place.path)
            write_json(
                place.path / names.MANIFEST,
                {"kind": "tokens", "format_version": _VERSION, "files": file_records(place.path, _FILES)}
                | {"data": info.to_json()},
            )
            place.put()
        _remove_least_used(entry)
    except (OSError, PastkeyError):
        return False
    return True


def _link(source: Path, target: Path) -> None:
    (target / TOKENS_TRAIN).parent.mkdir(exist_ok=True)
    for name in _COPIED:
        shutil.copyfile(source / name, target / name)
    for name in _LINKED:
        try:
            os.link(source / name, target / name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source / name, target / name)


def _remove_least_used(newest: Path) -> None:
    """Removes the least recently used entries beyond MOST_BYTES."""
    states = {entry: entry.stat().st_mtime_ns for entry in newest.parent.iterdir() if entry.is_dir()}
    held = 0
    for entry in sorted(states, key=lambda entry: states[entry], reverse=True):
        held += sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
        if held > MOST_BYTES and entry != newest:
            shutil.rmtree(entry, ignore_errors=True)
