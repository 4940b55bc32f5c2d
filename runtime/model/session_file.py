"""A saved session: its ids, keys and values in one file that only the bundle that wrote it takes back.

    "pastkey session 1"      a line, then the length of the header in bytes, 8 digits and a line end
    header                  JSON: the bundle's files, ids, what is cached, and of each array its shape and type
    arrays                  little-endian, one behind the other, in the order of the graph's inputs
    sha256                  of all before it, 32 bytes

Nothing in it is ever run, and nothing is read before its length was compared with the file's.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.files.durable import whole_file
from pastkey.files.reading import reading, require_regular
from pastkey.values import is_int

from ..engine.engine import Engine

_MAGIC = b"pastkey session 1\n"
_DIGITS = 8
_LONGEST = 64 * 2**20  # bytes of a header; a token's id takes 7 at most
_TYPES = {kind: kind for kind in ("<f4", "<f2")}


def write_session(path: Path, bundle: Bundle, ids: Sequence[int], engine: Engine) -> None:
    """Writes a session beside `path` and renames it there: whole or not at all. Raises InputError or OSError."""
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder: make it, or save the session elsewhere")
    if path.is_dir():
        raise InputError(f"{path} is a folder; the path of a file was expected")
    cached = engine.length if engine.cached_ids else 0  # after a context shift it is computed again
    gone = engine.gone if cached else 0
    rows = [np.ascontiguousarray(row) for row in engine.cache.rows(cached - gone)] if cached else []
    header = json.dumps(
        {
            "bundle": bundle_digest(bundle),
            "ids": list(ids),
            "cached": cached,
            "gone": gone,
            "exact": min(engine.exact_length, cached),
            "arrays": [[list(row.shape), row.dtype.newbyteorder("<").str] for row in rows],
        }
    ).encode()
    with whole_file(path) as out:
        digest = hashlib.sha256()
        parts: list[bytes | memoryview] = [_MAGIC, b"%0*d\n" % (_DIGITS, len(header)), header, *map(_bytes, rows)]
        for part in parts:
            out.write(part)
            digest.update(part)
        out.write(digest.digest())


def read_session(path: Path, bundle: Bundle, engine: Engine) -> list[int]:
    """Fills an empty engine from a file. Returns the session's ids.

    Raises:
        MissingFileError: There is no such file.
        IntegrityError: It was cut or altered, is none, or was saved by another bundle.
    """
    try:
        size = path.stat().st_size if path.is_dir() else require_regular(path).st_size
        with reading(path, "a saved session"), path.open("rb") as file:
            header, start = _read_header(file, path, size)
            ids, cached, gone, exact, shapes = _parse(header, path, bundle, engine)
            expected = start + sum(math.prod(shape) * kind.itemsize for shape, kind in shapes) + 32
            if size != expected:
                raise IntegrityError(
                    f"{path} has {size} bytes, {expected} were expected: it was cut or altered, save it again"
                )
            file.seek(0)
            digest = hashlib.sha256(file.read(start))
            rows = []
            for shape, kind in shapes:
                row = np.empty(shape, kind)
                file.readinto(_bytes(row))
                digest.update(_bytes(row))
                rows.append(row)
            if file.read() != digest.digest():
                raise IntegrityError(f"{path} was altered: its sha256 is another one; save it again")
    except FileNotFoundError:
        raise MissingFileError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; a saved session is a file") from None
    if rows:
        engine.restore(ids[:cached], rows, exact_length=exact, gone=gone)
    return ids


def bundle_digest(bundle: Bundle) -> str:
    """What tells one bundle from another: the hash of its files' hashes."""
    files = sorted((name, record.sha256) for name, record in bundle.manifest.files.items())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _read_header(file: Any, path: Path, size: int) -> tuple[dict[str, Any], int]:
    start = file.read(len(_MAGIC) + _DIGITS + 1)
    digits = start[len(_MAGIC) : -1]
    if not start.startswith(_MAGIC) or len(digits) != _DIGITS or not digits.isdigit():
        raise IntegrityError(f"{path} is no session that this pastkey saved, or was cut: save it again")
    length = int(digits)
    if length > min(_LONGEST, size):
        raise IntegrityError(f"{path} has a header of {length} bytes and {size} in all: it was cut or altered")
    try:
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError):
        raise IntegrityError(f"{path} has no header that can be read: it was cut or altered, save it again") from None
    return header, len(start) + length


def _parse(
    header: dict[str, Any], path: Path, bundle: Bundle, engine: Engine
) -> tuple[list[int], int, int, int, list[tuple[tuple[int, ...], np.dtype[Any]]]]:
    """ids, cached, gone, exact, and shape and type of each array. Raises IntegrityError."""
    if header.get("bundle") != bundle_digest(bundle):
        raise IntegrityError(
            f"{path} was saved by another bundle than {bundle.path}: load it with that one, or compute it again"
        )
    manifest = engine.manifest
    ids, arrays = header.get("ids"), header.get("arrays")
    cached, gone, exact = header.get("cached"), header.get("gone", 0), header.get("exact")
    if not (
        isinstance(ids, list)
        and all(is_int(token, 0, manifest.vocab_size - 1) for token in ids)
        and len(ids) <= manifest.context_length + 1
        and isinstance(cached, int)
        and is_int(cached, 0, len(ids))
        and isinstance(gone, int)
        and is_int(gone, 0, max(0, cached - 1) if engine.graph.droppable_window else 0)
        and isinstance(exact, int)
        and is_int(exact, 0, cached)
    ):
        raise IntegrityError(f"{path} has ids or lengths that cannot be: it was altered, save it again")
    expected = [
        (1, layer.kv_heads, cached - gone, size)
        for layer in manifest.layers
        for size in (layer.key_head_size, layer.value_head_size)
    ]
    states = [(1, state.size) for state in manifest.states]
    try:
        shapes = [tuple(map(operator.index, shape)) for shape, _ in arrays or ()]
        kinds = [np.dtype(_TYPES[kind]) for _, kind in arrays or ()]
    except (TypeError, ValueError, LookupError):
        shapes, kinds = [(0,)], []
    parts = len(expected) if cached else 0
    of_states = [(shape[0], shape[-1]) for shape in shapes[parts:]]
    if shapes[:parts] != expected[:parts] or of_states != (states if cached else []):
        raise IntegrityError(
            f"{path} has arrays of other shapes than this bundle's cache: it was altered, save it again"
        )
    return ids, cached, gone, exact, list(zip(shapes, kinds, strict=True))


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
