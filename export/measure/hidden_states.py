"""The last hidden states, the input of the output head: captured from a module in torch, and computed by a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pastkey.errors import ContractError
from pastkey.runtime import Engine
from pastkey.runtime.engine.engine import HiddenStates

from .metrics import Ids

if TYPE_CHECKING:
    from torch import nn

_CHUNK = 64  # tokens


def head_input(module: nn.Module, ids: Ids) -> HiddenStates:
    """Returns the input (T, H) of the output head of a module of the contract on a text (T,), without a cache.

    The head is the last matrix multiplication that has a row for each token and a column for each token of the
    vocabulary. Raises ContractError if there is none.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from ..graft.probe.observe import name_of, run_uncached

    aten = torch.ops.aten
    left = {aten.mm: 0, aten.bmm: 0, aten.linear: 0, aten.matmul: 0, aten.addmm: 1, aten.baddbmm: 1}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # of stored weights: graft/streamed.py
        left[torch.ops.mkldnn._linear_pointwise] = 0
    seen: list[tuple[torch.Tensor, torch.Size]] = []

    class ProductsWatch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            del types
            made = func(*args, **(kwargs or {}))
            place = left.get(func.overloadpacket)
            if place is not None and args[place].numel() == ids.size * args[place].shape[-1]:
                seen.append((args[place], made.shape))
            return made

    with ProductsWatch():  # type: ignore[no-untyped-call]  # torch has no types there
        logits = run_uncached(module, torch.from_numpy(ids[None])).logits
    for hidden, shape in reversed(seen):
        if shape[-1] == logits.shape[-1] and shape.numel() == logits.numel():
            return hidden.reshape(ids.size, -1).float().numpy()
    raise ContractError(
        f"the multiplication that makes the logits of {name_of(module)} was not seen in torch, so that its last hidden "
        "states cannot be compared: export without --hidden-states"
    )


def by_every_path(
    engine: Engine, ids: Ids, lengths: list[int], alone: Callable[[Ids], HiddenStates]
) -> Iterator[tuple[HiddenStates, HiddenStates]]:
    """Yields pairs (T, H) of expected states and the bundle's: in one run, in chunks, and as rows of a batch.

    Args:
        engine: Over the last-logits graph.
        ids: The text, (T,).
        lengths: Tokens of the rows of the batch, each a beginning of the text rotated by some tokens.
        alone: Returns the expected states of one text.
    """
    expected = alone(ids)
    yield expected, one_run(engine, ids)
    engine.reset()
    chunks = np.array_split(ids, -(-ids.size // _CHUNK))
    yield expected, np.concatenate([engine.hidden_states(chunk[None])[0] for chunk in chunks])
    texts = [np.roll(ids, -row)[:length] for row, length in enumerate(lengths)]
    if not engine.graph.takes_padding:
        texts = [text[: min(lengths)] for text in texts]
    rows = np.zeros((len(texts), max(map(len, texts))), np.int64)
    mask = np.zeros_like(rows)
    for row, text in enumerate(texts):
        rows[row, : text.size], mask[row, : text.size] = text, 1
    engine.reset()
    together = engine.hidden_states(rows, mask)
    for text, found in zip(texts, together, strict=True):
        yield alone(text), found[: text.size]


def one_run(engine: Engine, ids: Ids) -> HiddenStates:
    """Returns (T, H) of a text (T,), from an empty cache."""
    engine.reset()
    states: HiddenStates = engine.hidden_states(ids[None])[0]
    return states
