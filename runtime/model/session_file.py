"""A saved session: an .npz file with the token ids and the KV cache. Only the bundle that wrote it can load it.

    bundle      the hash of the bundle's file hashes, a text; with an adapter, "+" and the hash of its files
    ids         token ids (T,), int64
    lengths     (2,) int64: tokens in the cache; exact tokens
    arr_0 ...   the cache's arrays, in the order of the graph's inputs; of attention calls whose rows are evicted behind
                a window, the last rows

No code in it is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pastkey.contract.bundle import Bundle
from pastkey.errors import IntegrityError
from pastkey.files.durable import whole_file
from pastkey.files.reading import reading, require_regular

from ..engine.engine import Engine


def write_session(path: Path, bundle: Bundle, ids: Sequence[int], engine: Engine) -> None:
    """Writes a session atomically. Raises OSError."""
    cached = engine.length if engine.cached_ids else 0  # a context shift changes the cache: it is computed again
    rows = engine.cache.rows(cached) if cached else []
    lengths = np.array([cached, min(engine.exact_length, cached)], np.int64)
    with whole_file(path) as out:
        np.savez(out, *rows, bundle=np.array(_digest(bundle, engine)), ids=np.array(ids, np.int64), lengths=lengths)


def read_session(path: Path, bundle: Bundle, engine: Engine) -> list[int]:
    """Fills an empty engine from a file. Returns the session's ids.

    Raises:
        MissingFileError: There is no such file.
        IntegrityError: It was truncated or altered, is not a session, or was saved by another bundle.
        InputError: It is a folder.
    """
    require_regular(path)
    with reading(path, "a saved session"), path.open("rb") as file:
        try:
            found = {**np.load(file)}
        except OSError as error:  # zipfile goes to places that a damaged file tells
            raise ValueError(f"it is not an .npz file ({error})") from None
        digest, ids, lengths = str(found.pop("bundle")), found.pop("ids"), found.pop("lengths")
        if digest != _digest(bundle, engine):
            if digest.partition("+")[0] == bundle_digest(bundle):
                saved = "with an adapter" if "+" in digest else "without an adapter"
                raise IntegrityError(
                    f"{path} was saved {saved}, and not with the one that load_session(path, adapter=NAME) names: give "
                    "the name of the same adapter, or None for none"
                )
            raise IntegrityError(
                f"{path} was saved by another bundle than {bundle.path}: load it with that one, or compute it again"
            )
        cached, exact = lengths.tolist()
        manifest, rows = engine.manifest, list(found.values())
        if not (
            ids.dtype == lengths.dtype == np.int64
            and ids.ndim == 1
            and ids.size <= manifest.context_length + 1
            and ((ids >= 0) & (ids < manifest.vocab_size)).all()
            and 0 <= cached <= ids.size
            and 0 <= exact <= cached
        ):
            raise ValueError("ids or lengths out of range")
        layers, kept, states = (manifest.layers, manifest.rows, manifest.states) if cached else ((), (), ())
        windows = manifest.windows or (0,) * len(layers)
        local = (row.shape[2] for row, seen in zip(rows[::2], windows, strict=False) if seen and row.ndim == 4)
        held = next(local, cached)  # tokens of the calls with a window, which may have evicted others
        if not min(cached, max(windows, default=0) - 1) <= held <= cached:
            held = cached
        expected: list[tuple[int, ...]] = [
            (1, layer.kv_heads, held if seen else cached, size)
            for layer, seen in zip(layers, windows, strict=False)
            for size in (layer.key_head_size, layer.value_head_size)
        ]
        expected += [(1, one.size) for one in kept] + [(1, *state.shape) for state in states]
        of_rows = range(2 * len(layers), 2 * len(layers) + len(kept))  # of any number
        shapes = [(row.shape[0], row.shape[-1]) if place in of_rows else row.shape for place, row in enumerate(rows)]
        if (
            shapes != expected
            or any(row.dtype not in (np.float32, np.float16) for row in rows)
            or any(row.dtype != np.float32 for row in rows[len(rows) - len(states) :])
        ):
            raise ValueError("its arrays do not have the shapes of this bundle's cache")
    ours = held == cached or engine.graph.windows is not None
    if rows and ours and rows[0].dtype == engine.graph.cache_dtype:  # else the ids are computed again
        engine.restore(ids[:cached].tolist(), rows, exact_length=exact)
    return ids.tolist()  # type: ignore[no-any-return]


def _digest(bundle: Bundle, engine: Engine) -> str:
    """Identifies the bundle and the adapter that computed a cache."""
    adapter = engine.graph.adapter
    return bundle_digest(bundle) + ("" if adapter is None else f"+{adapter.digest}")


def bundle_digest(bundle: Bundle) -> str:
    """Identifies a bundle: the hash of its files' hashes."""
    files = sorted((name, record.sha256) for name, record in bundle.manifest.files.items())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
