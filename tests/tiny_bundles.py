"""Bundles of random weights that have a tokenizer, and so accept a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from pastkey.contract.bundle import Bundle

from .runtime import tiny_decoder as decoder
from .runtime.constraints import vocabularies


def byte_bundle(
    folder: Path, sizes: Sequence[tuple[int, int]] = ((8, 8),), context: int = 900, **fields: Any
) -> Bundle:
    """One whose tokens are bytes: it reads and writes any text. `fields` are those of `write_bundle`."""
    tokenizer = fields.pop("tokenizer", None) or vocabularies.byte_level()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "V", tokenizer.get_vocab_size())
        tiny = decoder.Tiny.random(sizes, context_length=context)
        return decoder.write_bundle(folder, tiny, "fused", tokenizer=tokenizer, **fields)


def letters_bundle(folder: Path, sizes: Sequence[tuple[int, int]] = ((8, 8),)) -> Bundle:
    """One whose tokens are letters."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(decoder.ALPHABET)}, []))
    tiny = decoder.Tiny.random(sizes, context_length=100)
    return decoder.write_bundle(folder, tiny, "fused", tokenizer=tokenizer)
