"""One onnxruntime session and its cache: token ids in, logits out."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from pastkey import names
from pastkey.bundle import Bundle, Manifest
from pastkey.errors import InputError, IntegrityError, MissingExtraError, NumericsError, first_line

from . import providers as ep
from .cache import KVCache
from .embedding import EmbeddingRows
from .int8_cache import LONG_CONTEXT, MIN_ONNXRUNTIME, Int8Cache
from .lookahead import GUESSES
from .ort import OrtError, onnxruntime, parse_version

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

# Tokens per run of a prefill. Attention scores and activations of a run grow with it; fewer and more are slower.
PREFILL_CHUNK = 256
# Tokens of a run that still counts as decoding.
MOST_TRIED = GUESSES + 1


P = ParamSpec("P")
Result = TypeVar("Result")


def _one_at_a_time(
    method: Callable[Concatenate[Session, P], Result],
) -> Callable[Concatenate[Session, P], Result]:
    """Lets a second thread wait while one is inside: both would write into the same cache."""

    @wraps(method)
    def locked(self: Session, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        with self.lock:
            return method(self, *args, **kwargs)

    return locked


class Session:
    """A bundle's graph with a cache: each call appends its tokens to those before.

    `graph="last"` gives the logits of the last positions only, which is what generation needs; `graph="common"` gives
    those of every position. `length` counts the tokens in the cache. Calls from several threads take turns; who needs
    several calls to belong together holds `lock`.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        graph: Literal["last", "common"] = "last",
        providers: ep.Choice | Sequence[ep.Choice] | None = None,
        threads: int | None = None,
        profile_prefix: Path | None = None,
        int8_cache_from: int | None = LONG_CONTEXT,
    ) -> None:
        """Opens the graph and checks it against the manifest.

        `threads` is the number of threads within an operator, None for the physical cores this process may use. After
        `int8_cache_from` tokens, one row is decoded with an int8 cache, where the bundle has a graph for that and
        onnxruntime an operator; the first such token loads the weights once more. None: never.
        With `profile_prefix`, onnxruntime records where each operator ran, in a file whose name starts with it.
        Raises ProviderError, IntegrityError, or InputError for an impossible number of threads.
        """
        most = max(256, os.cpu_count() or 1)  # some thousands of threads take all memory before they do anything
        if threads is not None and not 1 <= threads <= most:
            raise InputError(f"threads is {threads}; it must be 1 to {most}, and the physical cores are the fastest")
        self.threads = default_threads() if threads is None else threads
        path = {"last": bundle.last_graph, "common": bundle.common_graph}[graph]
        self.lock = threading.RLock()
        self.manifest = bundle.manifest
        self.onnx = _open(path, bundle.manifest, providers, self.threads, profile_prefix)
        self.providers: list[str] = self.onnx.get_providers()
        _cross_check(self.onnx, bundle.manifest, path)
        self._last_only = graph == "last"
        # Without this input, which bundles of pastkey 0.1's first days lack, the last graph knows one position.
        self._keeps = any(value.name == names.LOGITS_TO_KEEP for value in self.onnx.get_inputs())
        place = self.onnx.get_modelmeta().custom_metadata_map.get(names.EMBEDDING_ROWS)
        self._embedding = None if place is None else EmbeddingRows(path.parent, place)
        self._fused = bundle.manifest.graph == "fused"
        self.cache = KVCache(
            self.onnx,
            bundle.manifest.layers,
            shared=self._fused,
            context_length=bundle.manifest.context_length,
            device=ep.cache_device(self.providers),
        )
        able = graph == "last" and self._fused and ep.cache_device(self.providers) == "cpu" and profile_prefix is None
        new = parse_version(onnxruntime.__version__) >= parse_version(MIN_ONNXRUNTIME)
        # Opened later, wherever the process has gone by then.
        self._long_graph = bundle.long_graph.absolute() if able and new and bundle.long_graph is not None else None
        self._int8_from = math.inf if int8_cache_from is None or self._long_graph is None else int8_cache_from
        self._choice = providers
        self._int8: Int8Cache | None = None
        self._mask: Ids | None = None  # (B, length) once a row has padding, else None: all ones
        self._ones = np.ones(0, np.int64)
        self._held: list[int] | None = []  # the ids in the cache; None for several rows or padding, or while unsure
        self.resets = 0  # how often the cache was emptied: whoever fills it can tell when another took it over

    @property
    def length(self) -> int:
        """Tokens in the cache, per row, padding included."""
        return max(self.cache.length, 0 if self._int8 is None else self._int8.cache.length)

    @_one_at_a_time
    def reset(self) -> None:
        """Forgets all tokens."""
        self.cache.reset()
        if self._int8 is not None:
            self._int8.cache.reset()
        self._mask = None
        self._held = []
        self.resets += 1

    @_one_at_a_time
    def rewind(self, ids: Sequence[int]) -> int:
        """Forgets all but what the cache shares with the beginning of `ids` (T,), and at most all of them but one.

        Returns the number of tokens that stay: `ids` from there on remain to be appended.
        """
        shared = 0
        for held, token in zip(self._held or (), ids[:-1], strict=False):
            if held != token:
                break
            shared += 1
        if not shared:
            self.reset()
        else:
            self.trim(shared)
            self.resets += 1
        return shared

    @_one_at_a_time
    def trim(self, length: int) -> None:
        """Forgets all but the first `length` tokens of each row."""
        held, self._held = self._held, None  # an interrupt may come at any time
        caches = [self.cache] if self._int8 is None else [self.cache, self._int8.cache]
        longest = max(caches, key=lambda cache: cache.length)
        longest.trim(length)  # refuses what cannot be
        for cache in caches:
            cache.trim(min(length, cache.length))
        self._mask = None if self._mask is None or not length else self._mask[:, :length]
        self._held = None if held is None else held[:length]

    @_one_at_a_time
    def prefill(self, ids: npt.ArrayLike, chunk_size: int | None = None) -> Logits:
        """Appends the tokens `ids` (T,) of one row, in runs of about `chunk_size`; returns the last one's logits (V,).

        The chunks bound the memory of activations and attention scores, which grow with the tokens of a run. They are
        of even size, and of two tokens at least where the chunk size allows: a run of one token takes another path
        through the attention operator, which differs in the last bits.
        """
        ids = self.checked(ids, 1)
        size = PREFILL_CHUNK if chunk_size is None else chunk_size
        if size < 1:
            raise InputError(f"chunk_size is {chunk_size}; it must be at least 1")
        count = math.ceil(ids.size / size)
        if size > 1:
            count = min(count, max(1, ids.size // 2))
        if count == 1:
            return _last(self._run(ids[None]))
        held, self._held = self._held, None
        self._settle()
        self.cache.reserve(1, ids.size)  # one growth for all chunks
        self._held = held
        for chunk in np.array_split(ids, count):
            logits = self._run(chunk[None])
        return _last(logits)

    @_one_at_a_time
    def decode(self, token: int) -> Logits:
        """Appends one token to one row; returns its logits (V,)."""
        return _last(self._run(self.checked([token], 1)[None]))

    @property
    def can_try(self) -> bool:
        """Whether `extend` can append several tokens, and `trim` forget some of them without moving the others."""
        return self._fused and (self._keeps or not self._last_only)

    @_one_at_a_time
    def extend(self, ids: npt.ArrayLike) -> Logits:
        """Appends the tokens `ids` (T,) of one row in one run; returns the logits (T, V) of each.

        Needs `can_try` for more than one.
        """
        ids = self.checked(ids, 1)
        assert ids.size == 1 or self.can_try, "this graph gives one position's logits"
        logits: Logits = self._run(ids[None], keep=ids.size)[0]
        return logits

    @_one_at_a_time
    def forward(self, ids: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> Logits:
        """Appends the tokens `ids` (B, T) in one run; returns logits (B, T, V), or (B, 1, V) of the "last" graph.

        `mask` (B, T) is 1 for a real token and 0 for padding, None for no padding. Rows of different lengths are
        padded at their right end; tokens appended later stand after the padding, which no token ever sees. The
        standard graph takes padding anywhere. Logits at padding mean nothing.
        """
        ids = self.checked(ids, 2)
        return self._run(ids, None if mask is None else self._checked_mask(mask, ids))

    # --- one run --------------------------------------------------------------------------------------------------
    def _run(self, ids: Ids, mask: Ids | None = None, *, keep: int = 1) -> Logits:
        """Appends checked ids (B, T); `keep`: positions of the last graph's logits. The one place where it is run."""
        batch, tokens = ids.shape
        start = self.length
        if self._fused and batch > 1 and tokens > 1 and start:
            raise InputError(
                f"{tokens} tokens were given to each of {batch} rows that hold {start} already: this bundle's graph "
                "appends several tokens to one row only; append them one by one, or export with --graph standard"
            )
        held, self._held = self._held, None
        cache = self._cache_for(ids, mask)
        cache.reserve(batch, tokens)
        full_mask, positions = self._mask_and_positions(batch, tokens, mask)
        kept = np.array([keep], np.int64)  # a bound value is no copy: its array must outlive the run
        # A fresh array each run: the caller may keep it.
        logits = np.empty((batch, keep if self._last_only else tokens, self.manifest.vocab_size), np.float32)
        binding = cache.binding
        bind, value = binding.bind_ortvalue_input, onnxruntime.OrtValue.ortvalue_from_numpy
        bind(names.INPUT_IDS, value(ids))
        bind(names.ATTENTION_MASK, value(full_mask))
        bind(names.POSITION_IDS, value(positions))
        if self._keeps:
            bind(names.LOGITS_TO_KEEP, value(kept))
        if self._embedding is not None:
            rows = self._embedding[ids]
            bind(names.EMBEDDING_ROWS, value(rows))
        binding.bind_ortvalue_output(names.LOGITS, value(logits))
        cache.onnx.run_with_iobinding(binding)
        self._check_finite(logits, start, tokens, mask)
        cache.advance(tokens)
        self._mask = None if self._mask is None and mask is None else full_mask
        if held is not None and batch == 1 and self._mask is None:
            held += ids[0].tolist()
            self._held = held
        return logits

    def _cache_for(self, ids: Ids, mask: Ids | None) -> KVCache:
        """The cache that a run of `ids` (B, T) goes through, brought up to what the other one holds."""
        one_row = self.cache.batch == 1 and self._mask is None and mask is None
        if ids.size > MOST_TRIED or len(ids) > 1 or not one_row or self.length < self._int8_from:
            self._settle()
            return self.cache
        if self._int8 is None:
            assert self._long_graph is not None
            onnx = _open(self._long_graph, self.manifest, self._choice, self.threads, None)
            self._int8 = Int8Cache(onnx, self.manifest)
        self._int8.take_over(self.cache)
        return self._int8.cache

    def _settle(self) -> None:
        """Brings the float32 cache up to what was decoded with int8."""
        if self._int8 is not None:
            self._int8.give_back(self.cache)

    def _mask_and_positions(self, batch: int, tokens: int, mask: Ids | None) -> tuple[Ids, Ids]:
        """attention_mask (B, S) and position_ids (B, T): a token's position is the number of real tokens before it."""
        total = self.length + tokens
        if self._mask is None and mask is None:
            if self._ones.size < batch * total:
                self._ones = np.ones(2 * batch * total, np.int64)
            positions = np.arange(self.length, total, dtype=np.int64)[None].repeat(batch, axis=0)
            return self._ones[: batch * total].reshape(batch, total), positions
        past = np.ones((batch, self.length), np.int64) if self._mask is None else self._mask
        new = np.ones((batch, tokens), np.int64) if mask is None else mask
        full = np.concatenate([past, new], axis=1)
        positions = np.maximum(np.cumsum(full, axis=1) - 1, 0)[:, self.length :]
        return full, np.ascontiguousarray(positions)

    # --- checks ---------------------------------------------------------------------------------------------------
    def checked(self, ids: npt.ArrayLike, ndim: int) -> Ids:
        """`ids`, of shape (T,) or (B, T), as int64. Raises InputError unless they can be appended now."""
        array = np.asarray(ids)
        if array.ndim != ndim or not array.size or array.dtype.kind not in "iu":
            raise InputError(
                f"token ids are whole numbers of shape {'(T,)' if ndim == 1 else '(B, T)'}, at least one; "
                f"found {array.dtype} of shape {array.shape}"
            )
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.manifest.vocab_size:
            wrong = low if low < 0 else high
            raise InputError(
                f"token id {wrong} is out of range: this model's ids are 0 to {self.manifest.vocab_size - 1}"
            )
        tokens, context = array.shape[-1], self.manifest.context_length
        if self.length + tokens > context:
            found = f"the prompt has {tokens} tokens"
            if self.length:
                found = f"{self.length} tokens are in the cache and {tokens} more were given"
            raise InputError(f"{found}; the context is {context}: shorten the text, or export with a larger --context")
        return np.ascontiguousarray(array, np.int64)

    def _checked_mask(self, mask: npt.ArrayLike, ids: Ids) -> Ids | None:
        """`mask` as int64, or None when nothing is padded."""
        array = np.asarray(mask).astype(np.int64)
        if not self.manifest.padding and not array.all():
            raise InputError(
                "this bundle takes no padding, since its positions count every column of the cache: give rows of equal "
                "length, or each row alone"
            )
        if array.shape != ids.shape or not np.isin(array, (0, 1)).all():
            raise InputError(f"the mask has shape {array.shape}; ones and zeros of shape {ids.shape} were expected")
        if array.all():
            return None
        if self._last_only and not array[:, -1].all():
            raise InputError('a row ends in padding, and this graph gives the last position only: open graph="common"')
        if self._fused and (self.length or (np.diff(array, axis=1) > 0).any() or not array[:, 0].all()):
            raise InputError(
                "this bundle's graph takes padding only in the first run and only at the right end of a row: "
                "pad there, or export with --graph standard"
            )
        return array

    def _check_finite(self, logits: Logits, start: int, tokens: int, mask: Ids | None) -> None:
        # A sum is finite only where every number is, and takes a third of the time of looking at each.
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(logits.sum())
        if math.isfinite(total) or np.isfinite(logits).all():
            return
        finite = np.isfinite(logits).all(axis=-1)  # (B, T), or (B, keep)
        if mask is not None and not self._last_only:
            finite |= mask == 0
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            position = start + tokens - logits.shape[1] + int(column)
            raise NumericsError(
                f"the logits at position {position} of row {row} are not finite (NaN or infinity): the weights are "
                "damaged or overflow at this precision; export again, and see `pastkey verify`"
            )


def _last(logits: Logits) -> Logits:
    """Logits (V,) of the last position of one row's (1, T, V)."""
    last: Logits = logits[0, -1]
    return last


def default_threads() -> int:
    """The physical cores this process may use; 0, which leaves it to onnxruntime, where that cannot be known."""
    if not hasattr(os, "sched_getaffinity"):
        return 0
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return len(cores)


def _open(
    path: Path,
    manifest: Manifest,
    providers: ep.Choice | Sequence[ep.Choice] | None,
    threads: int,
    profile_prefix: Path | None,
) -> Any:
    """An onnxruntime.InferenceSession whose providers are those asked for."""
    if parse_version(onnxruntime.__version__) < parse_version(manifest.min_onnxruntime):
        raise MissingExtraError(
            f"this bundle needs onnxruntime {manifest.min_onnxruntime} and {onnxruntime.__version__} is installed: "
            "type  pip install --upgrade 'pastkey[cpu]'  and try again"
        )
    wanted = ep.resolve(providers, manifest.target)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # a decoder is a chain: nothing runs beside it
    options.log_severity_level = 3  # errors; warnings about shapes of the shared buffer mean nothing here
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
        # A weight that was packed for its kernel would be reported as no bytes.
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
    except OrtError as error:
        reason = first_line(error)
        raise IntegrityError(f"onnxruntime {onnxruntime.__version__} cannot load {path}: {reason}") from error
    ep.require_active(wanted, session.get_providers())
    return session


def _cross_check(session: Any, manifest: Manifest, path: Path) -> None:
    """Raises IntegrityError naming a tensor that the graph and the manifest see differently, and both shapes."""
    found = {value.name: list(value.shape) for value in [*session.get_inputs(), *session.get_outputs()]}
    expected: dict[str, list[int | str]] = {
        names.INPUT_IDS: [names.BATCH, names.SEQUENCE],
        names.ATTENTION_MASK: [names.BATCH, names.TOTAL],
        names.POSITION_IDS: [names.BATCH, names.SEQUENCE],
    }
    for i, layer in enumerate(manifest.layers):
        for kind, past, present in (
            (layer.key_head_size, names.past_key(i), names.present_key(i)),
            (layer.value_head_size, names.past_value(i), names.present_value(i)),
        ):
            expected[past] = [names.BATCH, layer.kv_heads, names.PAST, kind]
            expected[present] = [names.BATCH, layer.kv_heads, names.TOTAL, kind]
    expected[names.LOGITS] = [names.BATCH, names.SEQUENCE, manifest.vocab_size]
    if names.LOGITS_TO_KEEP in found:
        expected[names.LOGITS_TO_KEEP] = [1]
    if names.EMBEDDING_ROWS in found:
        expected[names.EMBEDDING_ROWS] = [names.BATCH, names.SEQUENCE, *found[names.EMBEDDING_ROWS][2:]]
    for name, shape in expected.items():
        if name not in found:
            raise IntegrityError(f"{path} has no tensor {name!r}, which the manifest speaks of: export it again")
        # Sizes must agree; what a free axis is called does not matter here.
        same_rank = len(found[name]) == len(shape)
        if not same_rank or any(isinstance(b, int) and a != b for a, b in zip(found[name], shape, strict=True)):
            raise IntegrityError(
                f"{name!r} is {_show(found[name])} in {path} and {_show(shape)} in the manifest: export it again"
            )
    for name in sorted(set(found) - set(expected)):
        raise IntegrityError(f"{path} has the tensor {name!r}, which the manifest does not speak of: export it again")


def _show(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
