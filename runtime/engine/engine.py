"""A graph with one KV cache: token ids in, logits out."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from pastkey.contract.bundle import Bundle, Manifest
from pastkey.errors import FallbackWarning, InputError, IntegrityError, PastkeyError, ProviderError

from ..options import require_valid
from ..settings import MAX_DRAFT_TOKENS
from .caches.kv import KVCache
from .decoder_graph import DecoderGraph, GraphOptions, HiddenStates, Ids, Logits
from .padding import Padding
from .shift import moved_by, require_shift

MARKED = MAX_DRAFT_TOKENS + 2  # tokens of a run from which the states behind it are marked: no draft


class Engine:
    """A bundle's graph with a KV cache: each call appends its tokens to the cached ones.

    One thread at a time uses it: a scheduler's leader, or its owner. Every call with ids may raise InputError
    (ids outside the vocabulary, or more than the context holds) and NumericsError (logits that are not finite). Both
    leave the cache as the previous runs left it. Any other exception in a call that changes the cache empties it: its
    owner appends the tokens again.

    Attributes:
        graph: The graph, which other engines may share.
        cache: The keys and values.
        resets: How often the cache was emptied or cut to a prefix. A user of the cache sees by it that another used it.
        exact_length: Number of first tokens that a prefill computed, in runs of `DecoderGraph.prefill_tokens` or more
            of one sequence. A token that is decoded alone or in a batch has another kernel path, which differs in
            the last bits.
        marks: Whether to mark the cache where a later prompt may begin: behind each chunk of a prompt.
        branch: Number of tokens that the next prompt shares with another one. The mark behind them stays.
    """

    def __init__(self, bundle: Bundle, **options: Unpack[GraphOptions]) -> None:
        """Opens the graph with the options of DecoderGraph; the cache is empty."""
        require_valid(options)
        self._opened = functools.partial(DecoderGraph, bundle, **options)
        try:
            self._begin(self._opened())
        except IntegrityError as error:  # perhaps of the native graph, which is an extra
            if bundle.native_graph is None or options.get("native") is not None:
                raise
            self.leave_native(str(error))

    @classmethod
    def over(cls, graph: DecoderGraph) -> Engine:
        """An engine over an open graph, with its own empty cache."""
        engine = cls.__new__(cls)
        engine._begin(graph)
        return engine

    def leave_native(self, why: str) -> None:
        """Opens the graph of onnxruntime's kernels instead of the native one, with a FallbackWarning.

        Raises ProviderError if the native kernels were asked for.
        """
        if self._opened.keywords.get("native"):
            raise ProviderError(f"{why}: load the bundle with native=False")
        graph = self._opened(native=False)
        warnings.warn(f"onnxruntime's kernels run the bundle: {why}", FallbackWarning, stacklevel=3)
        self._begin(graph)

    def _begin(self, graph: DecoderGraph) -> None:
        self.graph = graph
        self.cache = graph.new_cache()
        self._ids: list[int] | None = []  # ids of the cached tokens; None if unknown
        self._padding = Padding()
        self.resets = 0
        self.exact_length = self.branch = 0
        self.marks = False

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.graph.manifest

    @property
    def onnx(self) -> Any:
        """The onnxruntime.InferenceSession."""
        return self.graph.onnx

    @property
    def providers(self) -> list[str]:
        """onnxruntime's names of the execution providers in use, in order of preference."""
        return self.graph.providers

    @property
    def length(self) -> int:
        """Tokens per sequence, including padding."""
        return self.cache.length

    @property
    def nbytes(self) -> int:
        """Current size of the cache in bytes."""
        return self.cache.nbytes

    @property
    def cached_ids(self) -> list[int]:
        """The ids of the cached tokens; empty if unknown, as for several sequences."""
        return (self._ids or [])[: self.length]

    def reset(self) -> None:
        """Forgets all tokens."""
        self.empty()
        self.resets += 1

    def empty(self) -> None:
        """Forgets all tokens without counting as a reset: the same sequence follows again."""
        self.cache.reset()
        self._note_empty()

    def drop_cache(self) -> None:
        """Forgets all tokens and frees the memory, which an exception may have left half changed."""
        self.cache = self.graph.new_cache()
        self._note_empty()

    def _note_empty(self) -> None:
        self._padding.mask = None
        self.exact_length = 0
        self._ids = []

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Drops the cache if an exception may have left it half changed."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, PastkeyError):  # raised before anything changes
                self.drop_cache()
            raise

    def keep_prefix(self, ids: Sequence[int], *, exact: bool = False) -> int:
        """Trims the cache to the prefix that it shares with `ids` (T,), without the last tokens.

        These run on the kernel path of a prefill, so the logits equal those of a full prefill.

        Args:
            ids: (T,).
            exact: Whether to keep only tokens that a prefill computed.

        Returns:
            The number of tokens that stay. The caller appends `ids` from there on.
        """
        self.branch = self.common(ids)
        shared = self.cache.nearest(min(self.branch, self.exact_length) if exact else self.branch)
        if not shared:
            self.reset()
        else:
            self.trim(shared)
            self.resets += 1
            self.mark()
        return shared

    def can_trim(self, length: int) -> bool:
        """Whether the cache can be trimmed to `length` tokens and still holds all that the next token sees."""
        return self.cache.nearest(length) == length

    def shared_with(self, ids: Sequence[int], *, exact: bool = False) -> int:
        """The largest length that the cache can be trimmed to, of the prefix that it shares with `ids` (T,).

        `exact`: whether only tokens count that a prefill computed.
        """
        shared = self.common(ids)
        return self.cache.nearest(min(shared, self.exact_length) if exact else shared)

    def common(self, ids: Sequence[int]) -> int:
        """Length of the prefix that the cached tokens share with `ids` (T,), without the last ids: a prefill."""
        require_valid({"ids": ids})
        last = 1 if self.manifest.rows else self.graph.prefill_tokens
        shared = 0
        for mine, theirs in zip(self.cached_ids, ids[: max(0, len(ids) - last)], strict=False):
            if mine != theirs:
                break
            shared += 1
        return shared

    def copy(self, length: int | None = None, room: int = 0) -> Engine:
        """A new engine whose cache holds copies of the first `length` tokens of each sequence, or of all.

        `room`: number of further tokens to allocate for. Raises InputError if the cache has fewer tokens or lacks some
        that the next token sees (see `can_trim`).
        """
        require_valid({} if length is None else {"length": length})
        made = Engine.over(self.graph)
        made.marks = self.marks
        length = self.length if length is None else length
        if length:
            rows = self.cache.rows(length)
            if room and self.graph.fused:
                made.cache.reserve(1, length + room, ahead=True)
            made.cache.fill(rows, length)
            if isinstance(self.cache, KVCache) and isinstance(made.cache, KVCache):
                made.cache.share_marks(self.cache, length)
            made._padding.mask = self._padding.first(length)
            made.exact_length = min(self.exact_length, length)
            made._ids = None if self._ids is None else self._ids[:length]
        return made

    def restore(self, ids: Sequence[int], rows: Sequence[npt.NDArray[Any]], *, exact_length: int) -> None:
        """Fills an empty cache with the keys and values of one sequence `ids` (T,), as `cache.rows` returned them."""
        with self._changing():
            self.cache.fill(rows, len(ids))
            self.exact_length = exact_length
            self._ids = list(ids)

    def trim(self, length: int) -> None:
        """Trims each sequence to its first `length` tokens.

        Raises InputError if the cache has fewer tokens or lacks some that the next token sees (see `can_trim`).
        """
        require_valid({"length": length})
        if not length:
            self.empty()
            return
        with self._changing():
            self.cache.trim(length)
            self._padding.mask = self._padding.first(length)
            self.exact_length = min(self.exact_length, length)
            if self._ids is not None:
                del self._ids[length:]

    def cut(self, length: int) -> None:
        """Forgets the tokens behind the first `length`, and as many before as `trim` would refuse to keep."""
        if self.length > length:
            self.trim(self.cache.nearest(length))

    def shift(self, keep: int, count: int) -> None:
        """Evicts `count` tokens of one sequence behind the first `keep`; later tokens move to their positions.

        The cache is then no prefix of any sequence, since the moved tokens attended to the evicted ones.

        Raises:
            InputError: The bundle's positions do not allow it, or the cache has several sequences or fewer tokens.
        """
        require_shift(self.manifest)
        fits = 0 <= keep <= keep + count <= self.length
        if self.cache.batch > 1 or self._padding.mask is not None or not fits:
            raise InputError(
                f"{count} tokens behind the first {keep} were to leave a cache of {self.cache.batch} rows of "
                f"{self.length} tokens: a shift needs one row without padding, and tokens that are there"
            )
        with self._changing():
            self.cache.drop(keep, keep + count, moved_by(self.manifest, count))
            self.exact_length = min(self.exact_length, keep)
            self._ids = None

    def prefill(self, ids: npt.ArrayLike, chunk_size: int | None = None) -> Logits:
        """Appends the tokens of one sequence in chunks of about `chunk_size`.

        Chunks bound the memory of activations and attention scores, which grow with the tokens of a run. They have even
        sizes, at least two tokens each if the chunk size allows: a run of one token has another kernel path through
        attention, which differs in the last bits.

        Args:
            ids: (T,), at least one.
            chunk_size: Tokens; None for 256, or fewer behind a long prefix if attention stores its scores.

        Returns:
            The last token's logits, (V,).
        """
        ids = self.checked(ids, 1)
        chunks = np.split(ids, np.cumsum(self.chunk_sizes(ids.size, chunk_size))[:-1])
        if len(chunks) > 1:
            self.reserve(ids.size)
        for chunk in chunks:
            logits = self.run(chunk[None])
        return _last(logits)

    def chunk_sizes(self, tokens: int, chunk_size: int | None = None) -> list[int]:
        """The tokens of each run of a prefill. A mark comes before those that a later prompt runs in any case."""
        start, last = self.cache.length, self.graph.prefill_tokens
        marks = self.marks and (self.manifest.states or self.graph.windows)
        if not (marks and tokens - last >= MARKED):
            return self.graph.chunk_sizes(tokens, start, chunk_size)
        before = self.branch - start
        if not MARKED <= before <= tokens - last - MARKED:
            return [*self.graph.chunk_sizes(tokens - last, start, chunk_size), last]
        sizes = self.graph.chunk_sizes(before, start, chunk_size)
        return [*sizes, *self.graph.chunk_sizes(tokens - last - before, start + before, chunk_size), last]

    def reserve(self, tokens: int) -> None:
        """Allocates room for `tokens` more of one sequence at once."""
        with self._changing():
            self.cache.reserve(1, tokens, ahead=True)

    def decode(self, token: int) -> Logits:
        """Appends one token to one sequence; returns its logits (V,)."""
        return _last(self.run(self.checked([token], 1)[None]))

    def append(self, ids: npt.ArrayLike) -> Logits:
        """Appends the tokens `ids` (T,) of one sequence in one run; returns the last one's logits (V,)."""
        return _last(self.run(self.checked(ids, 1)[None]))

    def all_logits(self, ids: npt.ArrayLike) -> Logits:
        """Appends the tokens `ids` (T,) of one sequence as `prefill` does; returns the logits (T, V) of each."""
        ids = self.checked(ids, 1)
        sizes = self.chunk_sizes(ids.size)
        chunks = np.split(ids, np.cumsum(sizes)[:-1])
        return np.concatenate([self.run(chunk[None], keep=chunk.size)[0].copy() for chunk in chunks])

    def forward(self, ids: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> Logits:
        """Appends the tokens of several sequences in one run.

        Shorter sequences are padded on the right. Tokens appended later are after the padding, which no token sees.
        The standard graph supports padding anywhere.

        Args:
            ids: (B, T), at least one.
            mask: (B, T), 1 for a real token and 0 for padding; None for no padding.

        Returns:
            Logits (B, T, V), or (B, 1, V) of the graph "last_logits". Logits at padding are undefined.
        """
        ids = self.checked(ids, 2)
        checked = None if mask is None else self.graph.checked_mask(mask, ids, self.length, every=self.graph.every)
        return self.run(ids, checked).copy()

    def hidden_states(self, ids: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> HiddenStates:
        """Appends tokens as `forward` does; returns the input of the output head, after the last norm.

        Args:
            ids: (B, T), at least one.
            mask: (B, T), 1 for a real token and 0 for padding; None for no padding.

        Returns:
            The last hidden states (B, T, H), undefined at padding. Raises InputError if the bundle was exported
            without them.
        """
        self.graph.require_hidden_states()
        ids = self.checked(ids, 2)
        checked = None if mask is None else self.graph.checked_mask(mask, ids, self.length, every=True)
        return self.run(ids, checked, hidden=True).copy()

    # --- one run --------------------------------------------------------------------------------------------------
    def run(
        self, ids: Ids | int, mask: Ids | None = None, *, keep: int = 1, hidden: bool = False
    ) -> HiddenStates | Logits:
        """Appends checked ids (B, T), or one to one sequence, with their mask. Every method above ends here.

        `keep`: number of last positions with logits. `hidden`: whether to return hidden states instead. The next run
        may overwrite the returned array.
        """
        batch, tokens = (1, 1) if isinstance(ids, int) else ids.shape
        graph = self.graph
        if graph.one_by_one and tokens > 1 and not isinstance(ids, int):
            singly = [self.run(ids[:, i : i + 1], hidden=hidden).copy() for i in range(tokens)]
            return np.concatenate(singly if graph.every or hidden else singly[-keep:], 1)
        start = self.length
        keep = tokens if graph.every else keep
        if graph.fused and batch > 1 and tokens > 1 and start:
            raise InputError(
                f"{tokens} tokens were given to each of {batch} rows that hold {start} already: this bundle's graph "
                "appends several tokens to one row only; append them one by one, or export with --graph standard"
            )
        padded = self._padding.mask is not None or mask is not None
        try:  # inlines `_changing`, which would cost 1 % of a fast step
            cache, total = self.cache, self.cache.length + tokens
            if graph.windows is not None and batch == 1 == cache.batch and not padded and isinstance(cache, KVCache):
                cache.evict(tokens)
            cache.reserve(batch, tokens)
            positions: Ids | int = cache.length
            full_mask, real = None, total
            if tokens > 1 or padded or graph.takes_mask:
                full_mask, positions = self._padding.of_run(cache.length, batch, tokens, mask)
                real = full_mask.sum(1) if padded else total
            found = graph.run(cache, ids, positions, real, total, keep, full_mask, hidden)
            graph.check_finite(found, start, tokens, mask, hidden=hidden)
            cache.advance(tokens)
            self._padding.mask = full_mask if padded else None
            if batch > 1 or padded:
                self._ids = None
            else:
                self._take_in(start, [ids] if isinstance(ids, int) else ids[0].tolist())
            if batch == 1 and tokens >= MARKED:
                self.mark()
        except BaseException as error:
            if not isinstance(error, PastkeyError):
                self.drop_cache()
            raise
        return found

    def _take_in(self, start: int, ids: list[int]) -> None:
        """Records the tokens (T,) of a run behind `start` others of one sequence."""
        if len(ids) >= self.graph.prefill_tokens and self.exact_length == start:
            self.exact_length += len(ids)
        if self._ids is not None:
            self._ids += ids

    def mark(self) -> None:
        """Keeps the parts that a trim to these tokens needs, if the cache is marked."""
        if self.marks and isinstance(self.cache, KVCache):
            self.cache.mark(stays=self.cache.length == self.branch)

    def note_batched(self, token: int) -> None:
        """Records a token that a batched run appended to this engine's cache."""
        if self._ids is not None:
            self._ids.append(token)

    # --- checks ---------------------------------------------------------------------------------------------------
    def checked(self, ids: npt.ArrayLike, ndim: int, *, start: int | None = None) -> Ids:
        """`ids`, of shape (T,) or (B, T), as int64. Raises InputError unless they can be appended now.

        `start`: number of tokens to append to, instead of the cached ones.
        """
        return self.graph.checked(ids, ndim, self.length if start is None else start)


def _last(logits: Logits) -> Logits:
    """A copy (V,) of the last position's logits of one sequence, (1, T, V)."""
    last: Logits = logits[0, -1].copy()
    return last
