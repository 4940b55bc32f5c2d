"""Models that predict a text: a bundle in the runtime, or a module in torch without a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, Unpack

import numpy as np

from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError, NumericsError, PastkeyError, first_line
from pastkey.runtime import Engine, Generation, Request
from pastkey.runtime.engine.golden import require_golden
from pastkey.runtime.options import PlacementOptions

from ..compare import logits_difference
from .hidden_states import head_input
from .metrics import HiddenStates, Ids, Logits, agreeing_tokens

if TYPE_CHECKING:
    from torch import nn

    from ..graft.probe.observe import Uncached

# Session options of float32 graphs at an export: onnxruntime reads the weights where they are mapped. A packed copy
# needs their size in memory again. Without it, runs last 10 to 50 % longer, and logits differ by 1.4e-6 of the largest.
IN_PLACE = {"session.disable_prepacking": "1"}


class Predictor(Protocol):
    """The interface of bundles and modules. A text is (T,) token ids without a past."""

    @property
    def name(self) -> str: ...  # as the user wrote it

    def logits(self, ids: Ids) -> Logits:
        """Returns the logits (T, V) of a text (T,)."""


class BundlePredictor:
    """Predicts with a bundle: whole texts in one run, continuations token by token."""

    def __init__(self, bundle: Bundle, **placement: Unpack[PlacementOptions]) -> None:
        """`placement`: where it runs, as for `load`. Raises Engine's errors."""
        self.name = str(bundle.path)
        self.engine = Engine(bundle, graph="all_logits", **placement)
        require_golden(self.engine, bundle)

    def logits(self, ids: Ids) -> Logits:
        """Returns the logits (T, V) of a text (T,)."""
        self.engine.reset()
        logits: Logits = self.engine.forward(ids[None])[0]
        return logits

    def greedy(self, prompt: Ids, count: int) -> Iterator[int]:
        """Yields the `count` tokens of its greedy continuation of `prompt` (T,). EOS does not end it."""
        return Generation(self.engine, Request(prompt.tolist(), max_new_tokens=count, prompt_lookup=False))


class RecordedPredictor:
    """Predicts as a float32 bundle does. A recorded text is run once, and the graph is open only meanwhile."""

    def __init__(self, bundle: Bundle) -> None:
        self.name = str(bundle.path)
        self._bundle = bundle
        self._logits: dict[bytes, Logits] = {}

    def logits(self, ids: Ids) -> Logits:
        """Returns the logits (T, V) of a text (T,)."""
        recorded = self._logits.get(ids.tobytes())
        return self._open().logits(ids) if recorded is None else recorded

    def record(self, ids: Ids) -> None:
        """Keeps the logits of a text (T,)."""
        if (text := ids.tobytes()) not in self._logits:
            self._logits[text] = self._open().logits(ids)

    def _open(self) -> BundlePredictor:
        return BundlePredictor(self._bundle, providers="cpu", session_options=IN_PLACE)


def agreeing(predictor: Predictor, prompt: Ids, tokens: Sequence[int]) -> int:
    """Returns how many of `tokens` are the beginning of a predictor's own greedy continuation of `prompt` (T,).

    One run tells: up to the first difference, the tokens are that continuation.
    """
    logits = predictor.logits(np.array([*prompt, *tokens[:-1]], np.int64))[prompt.size - 1 :]
    return agreeing_tokens(logits.argmax(-1).tolist(), tokens)


class ModulePredictor:
    """Predicts with a module as its author wrote it: a Hugging Face decoder uses transformers' own attention."""

    def __init__(self, module: nn.Module, name: str | None = None) -> None:
        """`name` is its name in messages, None for its class."""
        from ..graft.probe.observe import name_of

        self.name = name or name_of(module)
        self._module = module

    def logits(self, ids: Ids) -> Logits:
        """Returns logits (T, V) of (T,). Raises InputError if the module fails on that length, NumericsError on NaN."""
        from ..graft.probe.observe import natively

        try:
            with natively(self._module):
                logits: Logits = _uncached(self._module, ids).logits[0].numpy()
        except PastkeyError:
            raise
        except Exception as error:  # a user's module may raise anything
            from ..graft.attention import failing_line

            where = failing_line(error)
            raise InputError(
                f"{self.name} failed on a window of {ids.size} tokens{f' at {where}' if where else ''} with "
                f"{type(error).__name__}: {first_line(error)}; a module must accept every length up to its context "
                "(eval accepts a smaller --length)"
            ) from error
        if not np.isfinite(logits).all():
            raise NumericsError(f"the logits of {self.name} are not finite (NaN or infinity): its weights are damaged")
        return logits

    def hidden_states(self, ids: Ids) -> HiddenStates:
        """Returns the input (T, H) of its output head for (T,). Raises ContractError if no head is found."""
        from ..graft.probe.observe import natively

        with natively(self._module):
            return head_input(self._module, ids)

    def rounding(self, ids: Ids, *, hidden: bool = False) -> float:
        """Returns max |difference| over the largest between the module in float64 and in float32; 0 if float64 fails.

        Compares its logits, or with `hidden` its last hidden states.
        """
        from ..graft.probe.observe import Opaque
        from ..graft.streamed import computing_in_float64, in_float64

        if isinstance(self._module, Opaque):
            return self._module.rounding(ids)
        try:
            wide = ModulePredictor(in_float64(self._module))
            with computing_in_float64():
                found = wide.hidden_states(ids) if hidden else wide.logits(ids)
        except Exception:  # a user's module may raise anything in a precision that it was not written for
            return 0.0
        return logits_difference(found, self.hidden_states(ids) if hidden else self.logits(ids))


def _uncached(module: nn.Module, ids: Ids) -> Uncached:
    import torch

    from ..graft.probe.observe import run_uncached

    return run_uncached(module, torch.from_numpy(ids[None]))
