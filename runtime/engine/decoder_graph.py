"""A bundle's graph, opened once: its session, its weights and its limits, shared by several KV caches."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError, NumericsError
from pastkey.providers import Provider
from pastkey.values import parse_version

from ..options import Choice, PlacementOptions, SessionSettings, require_valid
from ..providers import placement as ep
from ..providers.native import kernels_for
from ..providers.open import checked_threads, open_session
from ..providers.ort import onnxruntime
from ..sampling.native import AllFinite
from .binding import Binding
from .caches.capacity import Windows, bytes_per_token
from .caches.fixed import FixedKVCache
from .caches.kv import KVCache
from .caches.marks import STATE_MARKS, WINDOW_MARKS
from .caches.states import state_bytes
from .caches.static_graphs import StaticGraphs
from .embedding import EmbeddingRows

if TYPE_CHECKING:
    from .lora import Adapter

# Tokens per run of a prefill. Attention scores and activations grow with it; smaller and larger chunks are slower.
PREFILL_CHUNK = 256
NATIVE_CHUNK = 512  # of the native kernels, which convert all weights in each run
# Limit of the scores (tokens * columns) of a run and a head, if attention stores them. From 1,024 columns on, chunks
# shrink by halves, since some devices compile a graph anew for each number of tokens.
SCORES, LEAST_CHUNK = PREFILL_CHUNK * 1024, 16
FLASH_ATTENTION_FROM = (1, 28, 0)  # GroupQueryAttention of 1.27 stores scores on the CPU

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
HiddenStates = npt.NDArray[np.float32]


class GraphOptions(PlacementOptions, total=False):
    """The options of DecoderGraph."""

    graph: Literal["last_logits", "all_logits", "adapters"]


class Bound(Protocol):
    """A cache with bound keys and values, which a run reads and writes."""

    onnx: Any
    binding: Binding
    evicted: Any  # of each sequence, or of all: first tokens that windowed attention calls no longer hold

    def columns(self, mask: Ids) -> Ids:
        """The graph's attention_mask of the `mask` (B, S)."""


class DecoderGraph:
    """The onnxruntime session of a bundle's graph. It holds no tokens.

    Several threads may call `run`, each with its own cache.

    Attributes:
        manifest: The bundle's manifest.
        onnx: The onnxruntime.InferenceSession; of a static bundle, that of the chunk's graph.
        sessions: All sessions opened at first: the graph's file -> its onnxruntime.InferenceSession.
        providers: onnxruntime's names of the execution providers in use, in order of preference.
        threads: Threads within an operator; 0 if onnxruntime chooses.
        one_by_one: Whether tokens are run one by one, on a device that computes only single tokens right.
        asked: The given providers and session options.
        native: The kernel library that runs the graph, or None if onnxruntime's own kernels do.
        cache_dtype: The type of cached keys and values: float16 in the native graph, and with weights in float16.
        all_finite: Says whether the results of a run are finite.
        every: Whether the graph returns the logits of every position.
        fused: Whether the KV cache is a shared buffer.
        takes_mask: Whether the graph reads an attention mask rather than lengths.
        adapter: The LoRA adapter, or None. Once it is `unloaded`, no cache over this graph is stored.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        graph: Literal["last_logits", "all_logits", "adapters"] = "last_logits",
        providers: Choice | Sequence[Choice] | None = None,
        threads: int | None = None,
        allow_fallback: bool = False,
        session_options: SessionSettings | None = None,
        native: bool | None = None,
    ) -> None:
        """Opens the graph and checks it against the manifest.

        Args:
            bundle: An opened bundle.
            graph: "last_logits" returns the logits of the last positions, as generation needs; "all_logits" those of
                every position; "adapters" is as the first, with LoRA matrices as inputs.
            providers: Execution providers in order of preference, by short names ("cuda") or onnxruntime's, each alone
                or in a pair with its options; None for the provider that the bundle was exported for.
            threads: Threads within an operator; None for the physical cores that this process may use.
            allow_fallback: Whether the CPU may run operators that a requested provider does not support. Without it, a
                provider that is known to run whole graphs must run all of this one.
            session_options: See `load`.
            native: See `load`.

        Raises:
            ProviderError: A provider is missing, fails to start, may not run this graph, or leaves operators to others.
            IntegrityError: The graph cannot be loaded or contradicts the manifest.
            MissingExtraError: The bundle needs a newer onnxruntime.
            InputError: The number of threads is out of range.
        """
        self.threads = checked_threads(threads)
        self.manifest = manifest = bundle.manifest
        self.every = graph == "all_logits"
        self.fused = manifest.graph == "fused"
        # The graph for other programs sums a mask, which a device leaves to the CPU; ours returns all logits as well.
        first = ep.for_bundle(manifest, providers).providers[0][0]
        self.native = None if graph == "adapters" else kernels_for(bundle, first, native)
        own = not self.every or (self.fused and first != ep.CPU)
        path = bundle.last_logits_graph if own else bundle.all_logits_graph
        if self.native is not None and bundle.native_graph is not None:
            path = bundle.native_graph  # of every position as well
        if graph == "adapters" and bundle.adapter_graph is not None:
            path = bundle.adapter_graph
        open_graph = functools.partial(
            open_session,
            manifest=manifest,
            providers=providers,
            threads=self.threads,
            allow_fallback=allow_fallback,
            session_options=session_options,
            library="" if self.native is None else self.native.library,
        )
        if manifest.static is not None:
            path = bundle.static_graphs[1]
        self.onnx = open_graph(path)
        self.sessions = {path: self.onnx}
        kinds = {value.type for value in self.onnx.get_inputs() if value.name.startswith(names.PAST_PREFIX)}
        self.cache_dtype: type[np.generic] = np.float16 if "tensor(float16)" in kinds else np.float32
        self.providers: list[str] = self.onnx.get_providers()
        self._inputs = {value.name for value in self.onnx.get_inputs()}
        self.takes_mask = names.ATTENTION_MASK in self._inputs
        self._outputs = {value.name for value in self.onnx.get_outputs()}
        self._folder = path.parent.absolute()
        self._static_decode: Any = None
        if manifest.static is not None:
            self._static_decode = self.onnx
            if manifest.static.chunk > 1:
                self._static_decode = self.sessions[bundle.static_graphs[0]] = open_graph(bundle.static_graphs[0])
        place = self.onnx.get_modelmeta().custom_metadata_map.get(names.EMBEDDING_ROWS)
        self._embedding = None if place is None else EmbeddingRows(path.parent, place)
        self.all_finite = AllFinite("" if self.native is None else self.native.library)
        self.one_by_one = False
        # Whether a run stores the scores of all its tokens and columns.
        old = self.native is None and parse_version(onnxruntime.__version__) < FLASH_ATTENTION_FROM
        self._stores_scores = not self.fused or old
        self.asked = (providers, {name: str(value) for name, value in (session_options or {}).items()})
        self.adapter: Adapter | None = None
        self.unloaded = False

    def new_cache(self) -> KVCache | FixedKVCache | StaticGraphs:
        """An empty cache over this graph."""
        manifest, context = self.manifest, self.manifest.context_length
        if self._static_decode is not None:
            return StaticGraphs(self._static_decode, self.onnx, manifest, self._folder)
        # Only where a hole is padding.
        if self.provider.fixed_shapes and not self.fused and manifest.padding and not manifest.rows:
            return FixedKVCache(self.onnx, manifest.layers, context_length=context, dtype=self.cache_dtype)
        return KVCache(
            self.onnx,
            manifest.layers,
            shared=self.fused,
            context_length=context,
            provider=self.provider,
            device_id=int(self.onnx.get_provider_options().get(self.providers[0], {}).get("device_id", 0)),
            dtype=self.cache_dtype,
            rows=manifest.rows,
            states=manifest.states,
            windows=self.windows,
        )

    @property
    def kernels(self) -> str:
        """The kernels that run the graph: pastkey's library with its level, or onnxruntime."""
        return f"onnxruntime {onnxruntime.__version__}" if self.native is None else str(self.native)

    @property
    def provider(self) -> Provider:
        """The row of the first execution provider in use."""
        return ep.row_of(self.providers[0])

    @functools.cached_property
    def prefill_tokens(self) -> int:
        """The fewest tokens of one sequence that run on the kernels of a prefill. Fewer differ in the last bits."""
        return 9 if self.native is not None and self.native.level == "amx" else 2

    @property
    def takes_padding(self) -> bool:
        """Whether sequences of different lengths may be run together."""
        fused_elsewhere = self.fused and (self.one_by_one or self.provider.misses_keys)
        return self.manifest.padding and self._static_decode is None and not fused_elsewhere

    @property
    def supports_drafts(self) -> bool:
        """Whether several tokens can be appended in a run and some of them trimmed without moving the others."""
        return self.fused and not self.one_by_one

    @property
    def batches(self) -> bool:
        """Whether sequences with separate caches can be decoded in one run: a shared buffer and a length for each."""
        return (
            self.supports_drafts
            and (self.takes_padding or bool(self.manifest.states))
            and not self.every
            and names.SEQLENS_K in self._inputs
            and not self.takes_mask
            and (self.native is not None or self.cache_dtype is not np.float16)
            and self.provider.device == "cpu"
        )

    @property
    def copies(self) -> bool:
        """Whether a prefix of a cache can be copied: the cache is in CPU memory and has no rows of convolutions."""
        return self.provider.device == "cpu" and not self.manifest.rows

    @functools.cached_property
    def windows(self) -> Windows | None:
        """The attention calls whose caches let rows go that no window sees any more.

        In the fused graph on the CPU, those with a window; in the standard graph all, if all have one.
        """
        manifest = self.manifest
        if self.fused:
            there = names.EVICTED in self._inputs and self.provider.device == "cpu"
        else:
            every = manifest.window is not None and manifest.padding
            there = every and self._static_decode is None and not self.provider.fixed_shapes
        return Windows.of(manifest, self._chunk) if there else None

    @property
    def _chunk(self) -> int:
        return PREFILL_CHUNK if self.native is None else NATIVE_CHUNK

    @property
    def window_rows(self) -> int:
        """Rows of a buffer of an attention call whose rows are evicted."""
        return self.manifest.context_length if self.windows is None else self.windows.room

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the cache per token of one sequence."""
        return sum(self._bytes_per_token)

    @property
    def _bytes_per_token(self) -> tuple[int, int]:
        return bytes_per_token(self.manifest.layers, self.windows, np.dtype(self.cache_dtype).itemsize)

    def cache_bytes(self, tokens: int) -> int:
        """Largest size in bytes of the cache of one sequence of `tokens`.

        A static graph allocates the whole context at once. A run of the standard graph holds the cache twice, as past
        and as present.
        """
        manifest, (plain, local) = self.manifest, self._bytes_per_token
        tokens = manifest.context_length if manifest.static is not None else min(tokens, manifest.context_length)
        size = plain * tokens + local * min(tokens, self.window_rows)
        marks = STATE_MARKS if manifest.states else WINDOW_MARKS
        marked = 0 if self.windows is None else local * min(tokens, self.windows.widest)
        kept = (2 + marks) * state_bytes(manifest.states) + marks * marked
        return (2 * size if manifest.graph == "standard" else size) + kept

    def chunk_sizes(self, tokens: int, length: int = 0, chunk_size: int | None = None) -> list[int]:
        """The tokens of each run of a prefill of `tokens` behind `length` cached ones.

        Raises InputError for a `chunk_size` below 1.
        """
        require_valid({"chunk_size": chunk_size})
        if chunk_size is None and self.manifest.static is not None:
            return [tokens]
        if chunk_size is not None or not self._stores_scores:
            return _evenly(tokens, chunk_size or self._chunk)
        sizes = list[int]()
        columns, chunk = SCORES // PREFILL_CHUNK, PREFILL_CHUNK
        while tokens:
            while length >= columns:
                columns, chunk = 2 * columns, max(LEAST_CHUNK, chunk // 2)
            part = min(tokens, max(2, columns - length))
            part += tokens - part == 1  # a run of one token has another path
            sizes += _evenly(part, chunk)
            length, tokens = length + part, tokens - part
        return sizes

    # --- one run --------------------------------------------------------------------------------------------------
    def run(self, cache: Bound | StaticGraphs, ids: Ids | int, positions: Ids | int, real: npt.NDArray[Any] | int,
            total: int, keep: int, mask: Ids | None = None, hidden: bool = False) -> HiddenStates | Logits:  # fmt: skip
        """Runs the new tokens `ids` (B, T) at `positions` (B, T) over a cache. All inference goes through here.

        Args:
            cache: Holds the keys and values of the tokens before.
            ids: Checked token ids; an int is one of one sequence, and spares numpy's time.
            positions: Number of real tokens before each new one; one int for all.
            real: Real tokens of each sequence including the new ones, (B,); one int for all.
            total: Length of the longest sequence including the new tokens and padding.
            keep: Number of last positions with logits.
            mask: (B, total), 1 for a real token; None if the graph reads no mask.
            hidden: Whether to return the last hidden states of all new tokens.

        Returns:
            Logits (B, keep, V), or last hidden states (B, T, H), in an array that the next run may overwrite.
        """
        if isinstance(cache, StaticGraphs):
            return cache.run(np.atleast_2d(ids)[0], keep)
        binding, shape = cache.binding, (1, 1) if isinstance(ids, int) else ids.shape
        binding.feed(names.INPUT_IDS, ids, shape)
        binding.feed(names.POSITION_IDS, positions, shape)
        if names.SEQLENS_K in self._inputs:
            binding.feed(names.SEQLENS_K, real - 1, shape[:1], np.int32)
            binding.feed(names.TOTAL_SEQUENCE_LENGTH, total, (), np.int32)
        if names.EVICTED in self._inputs:
            binding.feed(names.EVICTED, cache.evicted, shape[:1], np.int32)
        if self.takes_mask:
            assert mask is not None
            binding.feed(names.ATTENTION_MASK, cache.columns(mask))
        if names.LOGITS_START in self._inputs:
            binding.feed(names.LOGITS_START, -keep, (1,))
        if self._embedding is not None:
            table, fill = self._embedding, functools.partial(self._embedding.fill, ids)
            binding.feed(names.EMBEDDING_ROWS, fill, (*shape, *table.row_shape), table.dtype)
        found = binding.result(names.LOGITS, (shape[0], keep, self.manifest.vocab_size))
        if self.manifest.hidden_size is not None and names.LAST_HIDDEN_STATE in self._outputs:
            states = binding.result(names.LAST_HIDDEN_STATE, (*shape, self.manifest.hidden_size))  # always bound
            found = states if hidden else found
        cache.onnx.run_with_iobinding(binding)
        return found

    # --- checks ---------------------------------------------------------------------------------------------------
    def checked(self, ids: npt.ArrayLike, ndim: int, start: int) -> Ids:
        """`ids`, of shape (T,) or (B, T), as int64. Raises InputError unless they can be appended to `start` tokens."""
        array = as_array(ids)
        if array.ndim != ndim or not array.size or array.dtype.kind not in "iu":
            raise InputError(
                f"token ids are whole numbers of shape {'(T,)' if ndim == 1 else '(B, T)'}, at least one; "
                f"found {array.dtype} of shape {array.shape}"
            )
        low = int(array.min())
        high = low if array.size == 1 else int(array.max())
        if low < 0 or high >= self.manifest.vocab_size:
            wrong = low if low < 0 else high
            raise InputError(
                f"token id {wrong} is out of range: this model's ids are 0 to {self.manifest.vocab_size - 1}"
            )
        tokens, context = array.shape[-1], self.manifest.context_length
        if start + tokens > context:
            found = f"the prompt has {tokens} tokens"
            if start:
                found = f"{start} tokens are in the cache and {tokens} more were given"
            raise InputError(f"{found}; the context is {context}: shorten the text, or export with a larger --context")
        return np.ascontiguousarray(array, np.int64)

    def require_hidden_states(self) -> None:
        """Raises InputError unless the graph returns the last hidden states."""
        if names.LAST_HIDDEN_STATE not in self._outputs:
            again = "export it again with  pastkey export SOURCE --out BUNDLE --hidden-states"
            if self.manifest.hidden_size is not None:
                again = 'open graph="last_logits"'
            elif self.manifest.static is not None:
                again = f"{again}, and for a target without static graphs, such as cpu"
            raise InputError(f"this bundle's graph gives logits and no hidden states: {again}")

    def checked_mask(self, mask: npt.ArrayLike, ids: Ids, start: int, *, every: bool) -> Ids | None:
        """`mask` as int64, or None without padding. Raises InputError if the graph does not support it.

        `every`: whether the run returns values for every position.
        """
        array = as_array(mask)
        if array.shape != ids.shape or array.dtype.kind not in "iubf" or not np.isin(array, (0, 1)).all():
            raise InputError(f"the mask has shape {array.shape}; ones and zeros of shape {ids.shape} were expected")
        array = array.astype(np.int64)
        if self._static_decode is not None and not array.all():
            raise InputError("this bundle's static graph does not support padding: give each row separately")
        if not self.manifest.padding and not array.all():
            raise InputError(
                "this bundle does not support padding: positions count every column of the cache; give rows of equal "
                "length, or each row separately"
            )
        if array.all():
            return None
        if not every and not array[:, -1].all():
            raise InputError(
                'a row ends in padding, and this graph gives the last position only: open graph="all_logits"'
            )
        if self.fused and (self.one_by_one or self.provider.misses_keys):
            name = ep.short_name(self.providers[0])
            raise InputError(
                f"on the execution provider {name!r} rows of different lengths cannot be run together, since it leaves "
                "out keys there: give each row separately"
            )
        if self.fused and (start or (np.diff(array, axis=1) > 0).any() or not array[:, 0].all()):
            raise InputError(
                "this bundle's graph supports padding only in the first run and only at the right end of a row: "
                "pad there, or export with --graph standard"
            )
        return array

    def check_finite(
        self, found: HiddenStates | Logits, start: int, tokens: int, mask: Ids | None = None, *, hidden: bool = False
    ) -> None:
        """Raises NumericsError unless all results of a run are finite.

        `found` are logits (B, keep, V) of the last of `tokens` after `start`, or hidden states (B, T, H).
        """
        if self.all_finite(found):
            return
        finite = np.isfinite(found).all(axis=-1)  # (B, T), or (B, keep)
        if mask is not None and (self.every or hidden):
            finite |= mask == 0
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            position = start + tokens - found.shape[1] + int(column)
            what = "hidden states" if hidden else "logits"
            why = "the weights overflow at this precision: export with --precision fp32"
            if self.manifest.precision == "fp32":
                why = "the source itself computes them: its weights are damaged or too large"
            raise NumericsError(
                f"the {what} at position {position} of row {row} are not finite (NaN or infinity): {why}"
            )


def as_array(given: npt.ArrayLike) -> npt.NDArray[Any]:
    """`given` as an array; an array without dimensions if its rows have different lengths or it is not an array."""
    try:
        return np.asarray(given)
    except (ValueError, RecursionError):
        return np.array(None)


def _evenly(tokens: int, chunk_size: int) -> list[int]:
    """Chunks of even size, each of at least two tokens if the chunk size allows."""
    count = math.ceil(tokens / chunk_size)
    if chunk_size > 1:
        count = min(count, max(1, tokens // 2))
    return [tokens // count + (number < tokens % count) for number in range(count)]
