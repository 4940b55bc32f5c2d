"""The loss of training: the cross-entropy of the next token, over the targets that are trained."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .data.batches import NOT_TRAINED, Batch
from .model import positions_like


def next_token_loss(model: nn.Module, batch: Batch, count: int | None = None) -> Tensor:
    """Returns the cross-entropy of next tokens, in nats: its sum over the batch's trained targets, divided by `count`.

    `count` is by default their number, so that the result is their mean.
    """
    inputs, targets = batch
    count = trained_targets(targets) if count is None else count
    logits = model(inputs, positions_like(inputs))  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NOT_TRAINED, reduction="sum") / count


def trained_targets(targets: Tensor) -> int:
    """Returns how many targets are trained."""
    return int((targets != NOT_TRAINED).sum())
