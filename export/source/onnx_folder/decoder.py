"""The ONNX graph of a decoder that another program exported, as a module of the contract: onnxruntime runs the file."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from torch import Tensor

from pastkey.contract import names
from pastkey.errors import ContractError, InputError, first_line
from pastkey.runtime.providers.ort import OrtError, onnxruntime

from ...compare import LOGITS, relative_difference
from ...graft.probe.observe import CacheLayer, Observation, Opaque, Uncached, random_ids
from ...graph.session import cpu_session
from ...graph.simplify import simplify
from .attention import MatchedAttention, UnrecognisedError, fuse_attention, recognise
from .given import EXPORT_COMMAND, GivenGraph, standard_form

# Keys and values of a run, or of the tokens before it, in the order of `GivenGraph.past`.
Cache = Sequence[npt.NDArray[Any]]

_TOKENS = 64  # of the sequence that shows whether past may have holes, if no window is longer
_BEYOND_WINDOW = 16
_LONGEST = 1024 + _BEYOND_WINDOW  # tokens of that sequence
_HOLES = 3


class GivenDecoder(Opaque):
    """forward(input_ids, position_ids) -> logits (B, T, V), by a session of the file as it is, with an empty past."""

    def __init__(self, given: GivenGraph, heads: int, window: int | None) -> None:
        """`heads` (H) and `window` (tokens, of the layers that have one) are the configuration's.

        Raises InputError if onnxruntime cannot open the file.
        """
        super().__init__()
        self.given = given
        self.takes_positions = names.POSITION_IDS in given.inputs  # `observed` finds out
        self._heads, self._window = heads, window
        self._fused: ir.Model | None = None
        # For `parameters`, which counts the weights that an export holds in memory.
        self.register_buffer("weights", torch.zeros(()).expand(given.weights), persistent=False)
        try:
            self._session = cpu_session(given.path)
        except OrtError as error:
            raise InputError(
                f"onnxruntime {onnxruntime.__version__} cannot open {given.path} ({first_line(error)}): install the "
                f"newest onnxruntime, or export the model again with  {EXPORT_COMMAND}"
            ) from error

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Returns the logits (B, T, V) of ids (B, T)."""
        return self.uncached(input_ids, position_ids).logits

    def uncached(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Uncached:
        """Runs ids (B, T) with an empty past."""
        positions = None if position_ids is None else position_ids.numpy()
        logits, cache = self.run(input_ids.numpy(), positions)
        arrays = [torch.from_numpy(array) for array in cache]
        return Uncached(torch.from_numpy(logits), input_ids.shape[1], arrays[::2], arrays[1::2])

    def run(
        self,
        ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64] | None = None,
        mask: npt.NDArray[np.int64] | None = None,
        past: Cache | None = None,
    ) -> tuple[npt.NDArray[np.float32], Cache]:
        """Runs the file on ids (B, T) over a past of P tokens.

        Args:
            ids: (B, T).
            positions: (B, T); None for P, P + 1 and so on.
            mask: (B, P + T); None for ones.
            past: (B, K, P, D) each; None for an empty one.

        Returns:
            Logits (B, T, V), and the present (B, K, P + T, D) each.
        """
        given = self.given
        batch, tokens = ids.shape
        if past is None:
            past = [np.zeros((batch, heads, 0, size), np.float32) for heads, size in given.past.values()]
        length = past[0].shape[2]
        if positions is None:
            positions = np.broadcast_to(np.arange(length, length + tokens), ids.shape)
        if mask is None:
            mask = np.ones((batch, length + tokens), np.int64)
        known = {names.INPUT_IDS: ids, names.ATTENTION_MASK: mask, names.POSITION_IDS: positions}
        feeds = dict(zip(given.past, past, strict=True))
        for value in self._session.get_inputs():
            if value.name not in feeds:  # the number of logits to keep is 0, for all
                kind = np.int32 if given.inputs[value.name] is ir.DataType.INT32 else np.int64
                array = known.get(value.name, np.zeros([1] * len(value.shape)))
                feeds[value.name] = np.ascontiguousarray(array, kind)
        try:
            logits, *present = self._session.run([names.LOGITS, *given.present], feeds)
        except OrtError as error:
            raise InputError(
                f"{given.path} does not run on {tokens} tokens after {length} ({first_line(error)}): export the model "
                f"again, with  {EXPORT_COMMAND}"
            ) from error
        return logits, present

    # --- its computation -----------------------------------------------------------------------------------------
    def observed(self, context_length: int) -> Observation:
        """Runs the graph.

        Raises InputError if it does not return the logits of every token, forgets its past, or lacks positions.
        """
        ids = random_ids(2, min(4, context_length), 2).numpy()
        logits, present = self.run(ids)
        if logits.ndim != 3 or logits.shape[:2] != ids.shape or logits.dtype != np.float32:
            raise InputError(
                f"{self.given.path} returns logits of {logits.dtype} {logits.shape} for ids {ids.shape}: expected "
                f"float32 (batch, tokens, vocabulary), export the model again with  {EXPORT_COMMAND}"
            )
        self._require_positions(ids[:1, :1], context_length)
        # One row: GroupQueryAttention supports no more than that with a past.
        lengths = {array.shape[2] for array in self.run(ids[:1, 1:], past=[p[:1, :, :1] for p in present])[1]}
        if lengths != {ids.shape[1]}:
            raise InputError(
                f"{self.given.path} returns {min(lengths)} keys after {ids.shape[1]} tokens: expected those of all "
                f"tokens, export the model again with  {EXPORT_COMMAND}"
            )
        self.takes_positions = names.POSITION_IDS in self.given.inputs and self._turns_by_positions(ids[:1], present)
        vocab_size = logits.shape[2]
        calls, special = self._fuse(context_length)
        windows = [call.window for call in calls if call is not None and call.window is not None]
        window = max(windows, default=None) if special is None and not self.given.fused else self._window
        padding = self.given.fused or self._takes_holes(context_length, vocab_size, window)
        layers = tuple(
            CacheLayer(
                geometry,
                (call.heads if call is not None else None) or self._heads,
                self.given.path.name,
                window=None if call is None else call.window,
                special=special,
                padding=padding,
                attributes=() if call is None or call.softcap is None else ("softcap",),
            )
            for geometry, call in zip(self.given.layers, calls, strict=True)
        )
        return Observation(layers, vocab_size)

    def _require_positions(self, ids: npt.NDArray[np.int64], context_length: int) -> None:
        """Raises InputError if a table of positions is shorter than the context."""

        def fails(position: int) -> bool:
            try:
                self.run(ids, np.array([[position]]))
            except InputError:
                return True
            return False

        if fails(context_length - 1) and not fails(0):
            longest = bisect.bisect_left(range(context_length), True, key=fails)
            raise InputError(
                f"{self.given.path} has positions for {longest} tokens, and the context is {context_length}: export it "
                f"with --context {longest}"
            )

    def _turns_by_positions(self, ids: npt.NDArray[np.int64], past: Cache) -> bool:
        """Whether keys and values of the first layer are the same at the same position, wherever their column is.

        They are not if the graph counts positions itself, as GroupQueryAttention does where it rotates.
        """
        past = [array[:1] for array in past]
        _, alone = self.run(ids)
        _, after = self.run(ids, np.arange(ids.shape[1])[None], past=past)
        pairs = zip(alone[:2], after[:2], strict=True)
        return all(relative_difference(a, b[:, :, -ids.shape[1] :]) <= LOGITS for a, b in pairs)

    @functools.cached_property
    def _standard(self) -> ir.Model:
        return standard_form(self.given)

    def _fuse(self, context_length: int) -> tuple[Sequence[MatchedAttention | None], str | None]:
        """Makes the fused graph. Returns the attention of each layer, or why GroupQueryAttention cannot replace it."""
        nothing = [None] * len(self.given.layers)
        if self.given.fused:
            self._fused = self._standard
            return nothing, None
        try:
            fused = self._standard.clone()
            calls = recognise(fused, self.given.layers, context_length)
            fuse_attention(fused, calls, self.given.layers, self._heads)
        except UnrecognisedError as error:
            return nothing, f"the attention of {self.given.path.name}: {error}"
        simplify(fused)
        common.ShapeInferencePass()(fused)
        self._fused = fused
        return calls, None

    def _takes_holes(self, context_length: int, vocab_size: int, window: int | None) -> bool:
        """Whether columns of past that the mask hides change nothing, so that rows of a batch may differ in length.

        A window counts them where a graph counts columns. So the sequence is longer than the window.
        """
        if names.ATTENTION_MASK not in self.given.inputs:
            return False
        longest = max(_TOKENS, (window or 0) + _BEYOND_WINDOW)
        tokens = min(longest, context_length - _HOLES)
        if tokens < 4 or longest > _LONGEST:
            return False
        ids = random_ids(1, tokens, vocab_size, seed=3).numpy()
        first = tokens // 2
        expected, _ = self.run(ids)
        padded = np.pad(ids[:, :first], ((0, 0), (0, _HOLES)))
        hidden = np.pad(np.ones((1, first), np.int64), ((0, 0), (0, _HOLES)))
        _, past = self.run(padded, np.pad(np.arange(first), (0, _HOLES))[None], hidden)
        mask = np.concatenate([hidden, np.ones((1, tokens - first), np.int64)], 1)
        found, _ = self.run(ids[:, first:], np.arange(first, tokens)[None], mask, past)
        return relative_difference(expected[:, first:], found) <= LOGITS

    def rounding(self, ids: npt.NDArray[np.int64]) -> float:
        """Returns max |difference| over the largest between logits of (T,) in one run and token by token."""
        whole, past = self.run(ids[None])[0], None
        steps = []
        for token in ids:
            logits, past = self.run(token[None, None], past=past)
            steps.append(logits)
        return relative_difference(whole, np.concatenate(steps, 1))

    # --- the graph ------------------------------------------------------------------------------------------------
    def graph(self, form: str, observation: Observation) -> tuple[ir.Model, Observation]:
        """Returns the "fused" or "standard" graph, and its observation.

        Raises ContractError for a standard graph of a file whose attention is GroupQueryAttention.
        """
        if form != "fused":
            if self.given.fused:
                raise ContractError(
                    f"the attention of {self.given.path} is GroupQueryAttention, which a {form} graph does not have: "
                    "export with --graph fused, and for a target that supports it, such as cpu"
                )
            return self._standard, observation
        assert self._fused is not None
        # Rows of its cache have no holes, and each has its own positions.
        layers = tuple(dataclasses.replace(layer, padding=True) for layer in observation.layers)
        return self._fused, dataclasses.replace(observation, layers=layers)
