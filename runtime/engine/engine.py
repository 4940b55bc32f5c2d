"""One onnxruntime session and its cache: token ids in, logits out."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from pastkey import names
from pastkey.bundle import Bundle
from pastkey.errors import InputError, NumericsError

from ..providers import placement as ep
from ..providers.open import checked_threads, open_session
from ..providers.ort import onnxruntime
from ..settings import Choice
from .cached_ids import CachedIds
from .embedding import EmbeddingRows
from .int8_kv import INT8_KV_FROM, CachePair
from .static_graphs import StaticGraphs

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

# Tokens per run of a prefill. Attention scores and activations of a run grow with it; fewer and more are slower.
PREFILL_CHUNK = 256


P = ParamSpec("P")
Result = TypeVar("Result")


def _one_at_a_time(
    method: Callable[Concatenate[Engine, P], Result],
) -> Callable[Concatenate[Engine, P], Result]:
    """Lets a second thread wait while one is inside: both would write into the same cache."""

    @functools.wraps(method)
    def locked(self: Engine, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        with self.lock:
            return method(self, *args, **kwargs)

    return locked


class Engine:
    """A bundle's graph with a cache: each call appends its tokens to those before.

    Calls from several threads take turns; who needs several calls to belong together holds `lock`. Every call that is
    given ids may raise InputError (ids that are none of the model's, or more than the context has room for) and
    NumericsError (logits that are not finite). After a call that an error or an interrupt ended, `keep_prefix` keeps
    nothing, and everything else goes on from the runs that had ended.

    Attributes:
        manifest: The bundle's.
        onnx: The onnxruntime.InferenceSession; of a static bundle, that of the chunk's graph.
        sessions: All that are open from the beginning: the graph's file -> its onnxruntime.InferenceSession.
        providers: onnxruntime's names of the execution providers in use, in order of preference.
        threads: Threads within an operator; 0 where onnxruntime chooses.
        lock: Held by whoever is inside a call.
        one_by_one: Whether several new tokens are run one after another, on a device that computes them right alone.
        asked: The providers and session entries that were given.
        resets: How often the cache was emptied, or cut to a prefix: whoever fills it can tell when another took it.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        graph: Literal["last_logits", "all_logits"] = "last_logits",
        providers: Choice | Sequence[Choice] | None = None,
        threads: int | None = None,
        allow_fallback: bool = False,
        session_entries: Mapping[str, str] | None = None,
        profile_prefix: Path | None = None,
        int8_kv_from: int | None = INT8_KV_FROM,
    ) -> None:
        """Opens the graph and checks it against the manifest.

        Args:
            bundle: An opened bundle.
            graph: "last_logits" gives the logits of the last positions, which is what generation needs; "all_logits"
                those of every position.
            providers: Execution providers in order of preference, by short names ("cuda") or onnxruntime's, each alone
                or in a pair with its options; None for the one the bundle was made for.
            threads: Threads within an operator; None for the physical cores this process may use.
            allow_fallback: Whether the processor may run what a provider that was asked for leaves; without it, one
                that was seen to run a whole graph runs all of it or is refused.
            session_entries: Settings of onnxruntime's sessions: {"session.use_env_allocators": "1"}, say.
            profile_prefix: Where given, onnxruntime records where each operator ran, in a file per graph whose name
                starts with it.
            int8_kv_from: Tokens in the cache from which on one row is decoded with an int8 cache, where the bundle has
                a graph for that and onnxruntime an operator; the first such token loads the weights once more. None
                for never.

        Raises:
            ProviderError: A provider is not here, did not start, is not given this graph, or leaves some of it.
            IntegrityError: The graph cannot be loaded, or it and the manifest differ.
            MissingExtraError: The bundle needs a newer onnxruntime.
            InputError: An impossible number of threads.
        """
        self.threads = checked_threads(threads)
        self.lock = threading.RLock()
        self.manifest = bundle.manifest
        self._every = graph == "all_logits"
        self._fused = bundle.manifest.graph == "fused"
        # Other programs' graph counts a mask, which a device leaves to the processor; ours gives all logits as well.
        elsewhere = ep.resolve(providers, bundle.manifest.target).providers[0][0] != ep.CPU
        own = not self._every or (self._fused and elsewhere)
        path = bundle.last_logits_graph if own else bundle.all_logits_graph
        open_graph = functools.partial(
            open_session,
            manifest=bundle.manifest,
            providers=providers,
            threads=self.threads,
            allow_fallback=allow_fallback,
            session_entries=session_entries,
            profile_prefix=profile_prefix,
        )
        static = bundle.manifest.static
        if static is not None:
            path = bundle.static_graphs[1]
        self.onnx = open_graph(path)
        self.sessions = {path: self.onnx}
        self.providers: list[str] = self.onnx.get_providers()
        self._inputs = {value.name for value in self.onnx.get_inputs()}
        self._static: StaticGraphs | None = None
        if static is not None:
            decode = self.onnx
            if static.chunk > 1:
                decode = self.sessions[bundle.static_graphs[0]] = open_graph(bundle.static_graphs[0])
            self._static = StaticGraphs(decode, self.onnx, bundle.manifest, path.parent)
        place = self.onnx.get_modelmeta().custom_metadata_map.get(names.EMBEDDING_ROWS)
        self._embedding = None if place is None else EmbeddingRows(path.parent, place)
        int8 = bundle.int8_kv_graph if not self._every and profile_prefix is None else None
        self.cache: CachePair | StaticGraphs = self._static or CachePair(
            self.onnx,
            bundle.manifest,
            device=ep.cache_device(self.providers),
            device_id=int(self.onnx.get_provider_options().get(self.providers[0], {}).get("device_id", 0)),
            fixed_shapes=ep.prefers_fixed_shapes(self.providers),
            # Opened later, wherever the process has gone by then.
            open_int8=None if int8 is None else functools.partial(open_graph, int8.absolute()),
            int8_from=int8_kv_from,
        )
        self._cached_ids = CachedIds()
        self._mask: Ids | None = None  # (B, length) once a row has padding, else None: all ones
        self._ones = np.ones(0, np.int64)
        self.resets = 0
        self.one_by_one = False
        self.asked = (providers, dict(session_entries or {}))

    @property
    def length(self) -> int:
        """Tokens in the cache, per row, padding included."""
        return self.cache.length

    @_one_at_a_time
    def reset(self) -> None:
        """Forgets all tokens."""
        self._cached_ids.forget()
        self.cache.reset()
        self._mask = None
        self._cached_ids.clear()
        self.resets += 1

    @_one_at_a_time
    def keep_prefix(self, ids: Sequence[int]) -> int:
        """Forgets all but what the cache shares with the beginning of `ids` (T,), and at most all of them but one.

        Returns:
            The number of tokens that stay: `ids` from there on remain to be appended.
        """
        shared = self._cached_ids.shared_with(ids[:-1])
        if shared < self.length and self.manifest.states:
            shared = 0
        if not shared:
            self.reset()
        else:
            self.trim(shared)
            self.resets += 1
        return shared

    @_one_at_a_time
    def trim(self, length: int) -> None:
        """Forgets all but the first `length` tokens of each row. Raises InputError where there are fewer."""
        with self._cached_ids.changing() as cached:
            self.cache.trim(length)
            self._mask = None if self._mask is None or not length else self._mask[:, :length]
            del cached[length:]

    @_one_at_a_time
    def prefill(self, ids: npt.ArrayLike, chunk_size: int | None = None) -> Logits:
        """Appends the tokens of one row in runs of about `chunk_size`.

        The chunks bound the memory of activations and attention scores, which grow with the tokens of a run. They are
        of even size, and of two tokens at least where the chunk size allows: a run of one token takes another path
        through the attention operator, which differs in the last bits.

        Args:
            ids: (T,), at least one.
            chunk_size: Tokens; None for PREFILL_CHUNK.

        Returns:
            The last one's logits, (V,).
        """
        ids = self.checked(ids, 1)
        size = (PREFILL_CHUNK if self._static is None else ids.size) if chunk_size is None else chunk_size
        if size < 1:
            raise InputError(f"chunk_size is {chunk_size}; it must be at least 1")
        count = math.ceil(ids.size / size)
        if size > 1:
            count = min(count, max(1, ids.size // 2))
        if count > 1:
            with self._cached_ids.changing():
                self.cache.reserve(1, ids.size)  # one growth for all chunks
        for chunk in np.array_split(ids, count):
            logits = self._run(chunk[None])
        return _last(logits)

    @_one_at_a_time
    def decode(self, token: int) -> Logits:
        """Appends one token to one row; returns its logits (V,)."""
        return _last(self._run(self.checked([token], 1)[None]))

    @property
    def takes_padding(self) -> bool:
        """Whether rows of different lengths may be run together."""
        fused_elsewhere = self._fused and (self.one_by_one or ep.misses_keys(self.providers))
        return self.manifest.padding and self._static is None and not fused_elsewhere

    @property
    def supports_drafts(self) -> bool:
        """Whether `extend` can append several tokens, and `trim` forget some of them without moving the others."""
        return self._fused and not self.one_by_one

    @_one_at_a_time
    def extend(self, ids: npt.ArrayLike) -> Logits:
        """Appends the tokens `ids` (T,) of one row in one run; returns the logits (T, V) of each.

        Needs `supports_drafts` for more than one.
        """
        ids = self.checked(ids, 1)
        assert ids.size == 1 or self.supports_drafts, "the standard graph's cache would be copied to be trimmed"
        logits: Logits = self._run(ids[None], keep=ids.size)[0]
        return logits

    @_one_at_a_time
    def forward(self, ids: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> Logits:
        """Appends the tokens of several rows in one run.

        Rows of different lengths are padded at their right end; tokens appended later stand after the padding, which
        no token ever sees. The standard graph takes padding anywhere.

        Args:
            ids: (B, T), at least one.
            mask: (B, T), 1 for a real token and 0 for padding; None for no padding.

        Returns:
            Logits (B, T, V), or (B, 1, V) of the graph "last_logits". Those at padding mean nothing.
        """
        ids = self.checked(ids, 2)
        return self._run(ids, None if mask is None else self._checked_mask(mask, ids))

    # --- one run --------------------------------------------------------------------------------------------------
    def _run(self, ids: Ids, mask: Ids | None = None, *, keep: int = 1) -> Logits:
        """Appends checked ids (B, T); `keep`: how many last positions have logits. The one place where it is run."""
        batch, tokens = ids.shape
        if self.one_by_one and tokens > 1:
            singly = [self._run(ids[:, i : i + 1]) for i in range(tokens)]
            return np.concatenate(singly if self._every else singly[-keep:], 1)
        start = self.length
        keep = tokens if self._every else keep
        if self._fused and batch > 1 and tokens > 1 and start:
            raise InputError(
                f"{tokens} tokens were given to each of {batch} rows that hold {start} already: this bundle's graph "
                "appends several tokens to one row only; append them one by one, or export with --graph standard"
            )
        if self._static is not None:
            return self._run_static(self._static, ids, mask, keep=keep)
        padded = self._mask is not None or mask is not None
        with self._cached_ids.changing(known=batch == 1 and not padded) as cached:
            assert isinstance(self.cache, CachePair)
            cache = self.cache.for_run(batch, tokens, padded=padded)
            full_mask, positions = self._mask_and_positions(batch, tokens, mask)
            # A bound value is no copy: these arrays must outlive the run.
            feeds: dict[str, npt.NDArray[Any]] = {names.INPUT_IDS: ids, names.POSITION_IDS: positions}
            if names.SEQLENS_K in self._inputs:
                real = full_mask.sum(1) if padded else np.full(batch, start + tokens)
                feeds[names.SEQLENS_K] = (real - 1).astype(np.int32)
                feeds[names.TOTAL_SEQUENCE_LENGTH] = np.array(start + tokens, np.int32)
            if names.ATTENTION_MASK in self._inputs:
                feeds[names.ATTENTION_MASK] = cache.columns(full_mask)
            if names.LOGITS_START in self._inputs:
                feeds[names.LOGITS_START] = np.array([-keep], np.int64)
            elif names.LOGITS_TO_KEEP in self._inputs:
                feeds[names.LOGITS_TO_KEEP] = np.array([keep], np.int64)
            if self._embedding is not None:
                feeds[names.EMBEDDING_ROWS] = self._embedding[ids]
            # A fresh array each run: the caller may keep it.
            logits = np.empty((batch, keep, self.manifest.vocab_size), np.float32)
            binding, value = cache.binding, onnxruntime.OrtValue.ortvalue_from_numpy
            for name, array in feeds.items():
                binding.bind_ortvalue_input(name, value(array))
            binding.bind_ortvalue_output(names.LOGITS, value(logits))
            cache.onnx.run_with_iobinding(binding)
            self._check_finite(logits, start, tokens, mask)
            cache.advance(tokens)
            self._mask = full_mask if padded else None
            cached += ids[0].tolist()
        return logits

    def _run_static(self, static: StaticGraphs, ids: Ids, mask: Ids | None, *, keep: int) -> Logits:
        """As `_run`, by the static graphs."""
        batch, tokens = ids.shape
        if mask is not None:
            raise InputError("this bundle's static graph takes no padding: give each row alone, without it")
        with self._cached_ids.changing() as cached:
            static.reserve(batch, tokens)
            logits = static.run(ids[0], keep)
            self._check_finite(logits, self.length, tokens, None)
            static.advance(tokens)
            cached += ids[0].tolist()
        return logits

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
    def checked(self, ids: npt.ArrayLike, ndim: int, *, start: int | None = None) -> Ids:
        """`ids`, of shape (T,) or (B, T), as int64. Raises InputError unless they can be appended now.

        `start`: unless they can be appended to so many tokens.
        """
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
        start = self.length if start is None else start
        if start + tokens > context:
            found = f"the prompt has {tokens} tokens"
            if start:
                found = f"{start} tokens are in the cache and {tokens} more were given"
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
        if not self._every and not array[:, -1].all():
            raise InputError(
                'a row ends in padding, and this graph gives the last position only: open graph="all_logits"'
            )
        if self._fused and (self.one_by_one or ep.misses_keys(self.providers)):
            name = ep.short_name(self.providers[0])
            raise InputError(
                f"on the execution provider {name!r} rows of different lengths cannot be run together, since it leaves "
                "out keys there: give each row alone"
            )
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
        if mask is not None and self._every:
            finite |= mask == 0
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            position = start + tokens - logits.shape[1] + int(column)
            raise NumericsError(
                f"the logits at position {position} of row {row} are not finite (NaN or infinity): the weights are "
                "damaged or overflow at this precision; export with --precision fp32, and see `pastkey verify`"
            )


def _last(logits: Logits) -> Logits:
    """Logits (V,) of the last position of one row's (1, T, V)."""
    last: Logits = logits[0, -1]
    return last
