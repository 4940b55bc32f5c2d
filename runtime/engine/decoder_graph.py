"""A bundle's graph, opened once: the weights, and all that several caches over them share."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from pastkey import names
from pastkey.bundle import Bundle
from pastkey.errors import InputError, NumericsError

from ..providers import placement as ep
from ..providers.open import checked_threads, open_session
from ..providers.ort import onnxruntime
from ..settings import Choice, PlacementOptions
from .embedding import EmbeddingRows
from .int8_kv import INT8_KV_FROM, CachePair
from .static_graphs import StaticGraphs

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class GraphOptions(PlacementOptions, total=False):
    """How a graph is opened, as DecoderGraph takes it."""

    graph: Literal["last_logits", "all_logits"]
    profile_prefix: Path | None
    int8_kv_from: int | None


class Bound(Protocol):
    """A cache whose keys and values are bound: a run goes through it."""

    onnx: Any
    binding: Any

    def columns(self, mask: Ids) -> Ids:
        """The graph's attention_mask of the `mask` (B, S)."""


class DecoderGraph:
    """One onnxruntime session over a bundle's weights, without any token of its own.

    `run` may be called by several threads, each with a cache of its own.

    Attributes:
        manifest: The bundle's.
        onnx: The onnxruntime.InferenceSession; of a static bundle, that of the chunk's graph.
        sessions: All that are open from the beginning: the graph's file -> its onnxruntime.InferenceSession.
        providers: onnxruntime's names of the execution providers in use, in order of preference.
        threads: Threads within an operator; 0 where onnxruntime chooses.
        one_by_one: Whether several new tokens are run one after another, on a device that computes them right alone.
        asked: The providers and session entries that were given.
        every: Whether it gives the logits of every position.
        fused: Whether its cache is a shared buffer.
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
        self.manifest = manifest = bundle.manifest
        self.every = graph == "all_logits"
        self.fused = manifest.graph == "fused"
        # Other programs' graph counts a mask, which a device leaves to the processor; ours gives all logits as well.
        elsewhere = ep.resolve(providers, manifest.target).providers[0][0] != ep.CPU
        own = not self.every or (self.fused and elsewhere)
        path = bundle.last_logits_graph if own else bundle.all_logits_graph
        open_graph = functools.partial(
            open_session,
            manifest=manifest,
            providers=providers,
            threads=self.threads,
            allow_fallback=allow_fallback,
            session_entries=session_entries,
            profile_prefix=profile_prefix,
        )
        if manifest.static is not None:
            path = bundle.static_graphs[1]
        self.onnx = open_graph(path)
        self.sessions = {path: self.onnx}
        self.providers: list[str] = self.onnx.get_providers()
        self._on_processor = self.providers[0] == ep.CPU
        self._inputs = {value.name for value in self.onnx.get_inputs()}
        self._folder = path.parent.absolute()
        self._static_decode: Any = None
        if manifest.static is not None:
            self._static_decode = self.onnx
            if manifest.static.chunk > 1:
                self._static_decode = self.sessions[bundle.static_graphs[0]] = open_graph(bundle.static_graphs[0])
        place = self.onnx.get_modelmeta().custom_metadata_map.get(names.EMBEDDING_ROWS)
        self._embedding = None if place is None else EmbeddingRows(path.parent, place)
        int8 = bundle.int8_kv_graph if not self.every and profile_prefix is None else None
        # Opened later, wherever the process has gone by then.
        self._open_int8 = None if int8 is None else functools.partial(open_graph, int8.absolute())
        self._int8: Any = None
        self._opening = threading.Lock()
        self.int8_kv_from = int8_kv_from
        self.one_by_one = False
        self.asked = (providers, dict(session_entries or {}))

    def new_cache(self) -> CachePair | StaticGraphs:
        """An empty cache over this graph."""
        if self._static_decode is not None:
            return StaticGraphs(self._static_decode, self.onnx, self.manifest, self._folder)
        return CachePair(
            self.onnx,
            self.manifest,
            device=ep.cache_device(self.providers),
            device_id=int(self.onnx.get_provider_options().get(self.providers[0], {}).get("device_id", 0)),
            fixed_shapes=ep.prefers_fixed_shapes(self.providers),
            open_int8=None if self._open_int8 is None else self._int8_graph,
            int8_from=self.int8_kv_from,
        )

    def _int8_graph(self) -> Any:
        """The session of the int8-KV graph, one for all caches."""
        with self._opening:
            if self._int8 is None:
                assert self._open_int8 is not None
                self._int8 = self._open_int8()
            return self._int8

    @property
    def takes_padding(self) -> bool:
        """Whether rows of different lengths may be run together."""
        fused_elsewhere = self.fused and (self.one_by_one or ep.misses_keys(self.providers))
        return self.manifest.padding and self._static_decode is None and not fused_elsewhere

    @property
    def supports_drafts(self) -> bool:
        """Whether several tokens can be appended, and some of them forgotten without moving the others."""
        return self.fused and not self.one_by_one

    @property
    def batches(self) -> bool:
        """Whether rows of caches of their own can be decoded in one run: by lengths for each, in the same memory."""
        return (
            self.supports_drafts
            and self.takes_padding
            and not self.every
            and names.SEQLENS_K in self._inputs
            and names.ATTENTION_MASK not in self._inputs
            and self.manifest.precision != "fp16"
            and ep.cache_device(self.providers) == "cpu"
        )

    @property
    def copies(self) -> bool:
        """Whether a part of a cache can be copied: it is in the processor's memory, and tells its parts apart."""
        return ep.cache_device(self.providers) == "cpu" and not self.manifest.states

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the cache takes for one token of one row, in float32, or in float16 with such weights."""
        size = 2 if self.manifest.precision == "fp16" else 4
        layers = self.manifest.layers
        return sum(size * layer.kv_heads * (layer.key_head_size + layer.value_head_size) for layer in layers)

    # --- one run --------------------------------------------------------------------------------------------------
    def run(self, cache: Bound, ids: Ids, positions: Ids, real: npt.NDArray[Any], total: int, keep: int,
            mask: Ids | None = None) -> Logits:  # fmt: skip
        """Runs the new tokens `ids` (B, T) at `positions` (B, T) through a cache. The one place where it is run.

        Args:
            cache: Its buffers hold the tokens before.
            ids: Checked.
            positions: The number of real tokens before each.
            real: Real tokens of each row with the new ones, (B,).
            total: Tokens of the longest row with the new ones, padding included.
            keep: How many last positions have logits.
            mask: (B, total), 1 for a real token; None for a graph that takes none.

        Returns:
            Logits (B, keep, V), in an array of their own.
        """
        feeds: dict[str, npt.NDArray[Any]] = {names.INPUT_IDS: ids, names.POSITION_IDS: positions}
        if names.SEQLENS_K in self._inputs:
            feeds[names.SEQLENS_K] = (real - 1).astype(np.int32)
            feeds[names.TOTAL_SEQUENCE_LENGTH] = np.array(total, np.int32)
        if names.ATTENTION_MASK in self._inputs:
            assert mask is not None
            feeds[names.ATTENTION_MASK] = cache.columns(mask)
        if names.LOGITS_START in self._inputs:
            feeds[names.LOGITS_START] = np.array([-keep], np.int64)
        elif names.LOGITS_TO_KEEP in self._inputs:
            feeds[names.LOGITS_TO_KEEP] = np.array([keep], np.int64)
        if self._embedding is not None:
            feeds[names.EMBEDDING_ROWS] = self._embedding[ids]
        logits = np.empty((len(ids), keep, self.manifest.vocab_size), np.float32)
        binding, value = cache.binding, onnxruntime.OrtValue.ortvalue_from_numpy
        # Binding a value takes 10 us. On the processor it is its array, which the next run of these shapes writes into.
        bound: dict[str, npt.NDArray[Any]] = vars(binding).setdefault("held", {}) if self._on_processor else {}
        for name, array in feeds.items():
            before = bound.get(name)
            if before is not None and before.shape == array.shape:
                before[...] = array
            else:
                bound[name] = np.array(array)
                binding.bind_ortvalue_input(name, value(bound[name]))
        binding.bind_ortvalue_output(names.LOGITS, value(logits))
        cache.onnx.run_with_iobinding(binding)
        return logits

    # --- checks ---------------------------------------------------------------------------------------------------
    def checked(self, ids: npt.ArrayLike, ndim: int, start: int) -> Ids:
        """`ids`, of shape (T,) or (B, T), as int64. Raises InputError unless they can be appended to `start` tokens."""
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
        if start + tokens > context:
            found = f"the prompt has {tokens} tokens"
            if start:
                found = f"{start} tokens are in the cache and {tokens} more were given"
            raise InputError(f"{found}; the context is {context}: shorten the text, or export with a larger --context")
        return np.ascontiguousarray(array, np.int64)

    def checked_mask(self, mask: npt.ArrayLike, ids: Ids, start: int) -> Ids | None:
        """`mask` as int64, or None when nothing is padded. Raises InputError where it cannot be taken."""
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
        if not self.every and not array[:, -1].all():
            raise InputError(
                'a row ends in padding, and this graph gives the last position only: open graph="all_logits"'
            )
        if self.fused and (self.one_by_one or ep.misses_keys(self.providers)):
            name = ep.short_name(self.providers[0])
            raise InputError(
                f"on the execution provider {name!r} rows of different lengths cannot be run together, since it leaves "
                "out keys there: give each row alone"
            )
        if self.fused and (start or (np.diff(array, axis=1) > 0).any() or not array[:, 0].all()):
            raise InputError(
                "this bundle's graph takes padding only in the first run and only at the right end of a row: "
                "pad there, or export with --graph standard"
            )
        return array

    def check_finite(self, logits: Logits, start: int, tokens: int, mask: Ids | None = None) -> None:
        """Raises NumericsError unless all `logits` (B, keep, V), of the last of `tokens` after `start`, are finite."""
        finite = np.isfinite(logits).all(axis=-1)  # (B, T), or (B, keep)
        if mask is not None and self.every:
            finite |= mask == 0
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            position = start + tokens - logits.shape[1] + int(column)
            raise NumericsError(
                f"the logits at position {position} of row {row} are not finite (NaN or infinity): the weights are "
                "damaged or overflow at this precision; export with --precision fp32, and see `pastkey verify`"
            )
