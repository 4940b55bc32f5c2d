"""A dress rehearsal in torch, before anything is traced: does decoding with a grafted cache give the uncached result?

It separates what is wrong with a module (state beside attention's, positions of its own) from what could be wrong
with a graph, and can name the submodule, which a graph no longer knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pastkey.errors import ContractError, first_line

from .attention import failing_line
from .observe import Observation, name_of, path_in, random_ids, run_cached, run_uncached

# Relative to the largest logit. Loose: torch's own kernels differ by shape; a module with state is far beyond.
_TOLERANCE = 1e-3


def rehearse(module: nn.Module, observation: Observation, context_length: int) -> None:
    """Runs the end of a text alone with the cached keys and values of its beginning. Raises ContractError."""
    try:
        _rehearse(module, observation, context_length)
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(
            f"{name_of(module)} fails on tokens that do not begin at position 0, at {failing_line(error)} with "
            f"{type(error).__name__}: {first_line(error)}; take position_ids as they are and every length from "
            "tensor.shape"
        ) from error


def _rehearse(module: nn.Module, observation: Observation, context_length: int) -> None:
    length = min(12, context_length)
    past = length // 2
    ids = random_ids(2, length, observation.vocab_size, seed=1)
    whole = _Outputs(module)
    with whole:
        expected = run_uncached(module, ids)
    beginning = run_uncached(module, ids[:, :past])
    part = _Outputs(module)
    with part:
        found = run_cached(module, beginning, ids[:, past:])
    if _close(expected.logits[:, past:], found) and _close(expected.logits[:, :past], beginning.logits):
        return
    name = name_of(module)
    if not _close(expected.logits, run_uncached(module, ids).logits):
        raise ContractError(
            f"{name} gives other logits each time it is run: leave out what is random outside training (F.dropout "
            "needs training=self.training; noise has no place in a decoder)"
        )
    if not _close(expected.logits[:, :past], beginning.logits):
        raise ContractError(
            f"{name} gives earlier tokens other logits when later tokens are present: it looks ahead somewhere outside "
            "its attention calls (a normalisation, pooling or convolution over the sequence), and cannot be decoded "
            "token by token"
        )
    if _ignores_positions(module, ids, expected.logits):
        raise ContractError(
            f"{name} ignores position_ids, so a token decoded alone would stand at position 0: use position_ids for "
            "the position encoding, e.g. self.position_embedding(position_ids), not torch.arange(T)"
        )
    culprit = _first_difference(whole.outputs, part.outputs, past)
    raise ContractError(
        f"{culprit or name} gives new tokens other values when they come alone than within the whole text: it keeps "
        "state across positions outside attention (a convolution, recurrence or running sum), or takes positions from "
        "elsewhere than position_ids; only the keys and values of F.scaled_dot_product_attention can be cached"
    )


def _close(expected: Tensor, found: Tensor) -> bool:
    return bool((expected - found).abs().max() <= _TOLERANCE * expected.abs().max().clamp_min(1e-12))


def _ignores_positions(module: nn.Module, ids: Tensor, logits: Tensor) -> bool:
    spread = torch.arange(ids.shape[1]).flip(0).expand_as(ids).contiguous()
    return torch.equal(run_uncached(module, ids, spread).logits, logits)


class _Outputs:
    """While open, keeps the tensor that each submodule call returns, in order of completion: innermost first."""

    def __init__(self, module: nn.Module) -> None:
        self.outputs: list[tuple[str, Tensor]] = []
        self._module = module
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for path, child in self._module.named_modules():
            if path:
                self._handles.append(
                    child.register_forward_hook(self._keep(f"{path_in(self._module, path)} ({type(child).__name__})"))
                )

    def _keep(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) and output else output
            if isinstance(output, Tensor) and output.is_floating_point():
                self.outputs.append((name, output.detach()))

        return hook

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _first_difference(whole: list[tuple[str, Tensor]], part: list[tuple[str, Tensor]], past: int) -> str | None:
    """The first submodule whose output for the new tokens differs; whichever axis is longer is the sequence."""
    for (name, expected), (other, found) in zip(whole, part, strict=False):
        if name != other or expected.dim() != found.dim():
            return name
        axes = [axis for axis in range(expected.dim()) if expected.shape[axis] != found.shape[axis]]
        if not axes:
            continue
        if len(axes) > 1 or expected.shape[axes[0]] - past != found.shape[axes[0]]:
            return name
        if not _close(expected.narrow(axes[0], past, found.shape[axes[0]]), found):
            return name
    return None
