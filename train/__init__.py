"""text -> checkpoint/: a decoder-only transformer, its tokenizer, its data and its training loop.

Names load on first use, so that importing this package (and `pastkey train --help`) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import load_checkpoint as load_checkpoint
    from .loop import train as train
    from .model import Decoder as Decoder
    from .settings import TrainConfig as TrainConfig
    from .stories import check_story as check_story
    from .stories import stories as stories

_HOME = {
    "Checkpoint": "checkpoint",
    "Decoder": "model",
    "TrainConfig": "settings",
    "check_story": "stories",
    "load_checkpoint": "checkpoint",
    "train": "loop",
}

__all__ = ["Checkpoint", "Decoder", "TrainConfig", "check_story", "load_checkpoint", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
