"""text -> checkpoint/: a decoder-only transformer, its tokenizer, its data and its training loop.

To change the model: write it in `model.py`, under Hugging Face's names where transformers shall load it. A size or a
choice of it is a field of `ModelConfig` (`pastkey/contract/config.py`), which is checked there and written in
config.json; `TrainConfig.model_config` sets it, by a preset or an option. Checkpoint and export support whatever
parameters the module has: the checkpoint compares names and shapes with the module, and the export traces it.

To change the optimizer: `make_optimizers` in `optimizer.py` makes one or several, by `TrainConfig.optimizer`, and
`moment_names` names the tensors that each keeps of a parameter; a checkpoint stores them. The rate of each step is
`schedule`'s.

Names load on first use, so that importing this package (and `pastkey train --help`) does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pastkey.lazy import lazy_names

if TYPE_CHECKING:
    from . import stories as stories
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import load_checkpoint as load_checkpoint
    from .loop import train as train
    from .model import Decoder as Decoder
    from .settings import TrainConfig as TrainConfig
    from .stories import check_story as check_story
else:
    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            ".checkpoint": ["Checkpoint", "load_checkpoint"],
            ".loop": ["train"],
            ".model": ["Decoder"],
            ".settings": ["TrainConfig"],
            ".stories": ["check_story", "stories"],
        },
    )
