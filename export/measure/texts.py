"""Texts to measure and to calibrate on: a file's tokens, cut into windows, and text that a bundle generates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pastkey.contract.bundle import Bundle, Manifest
from pastkey.errors import InputError
from pastkey.files.folder import read_text
from pastkey.runtime import Engine
from pastkey.runtime.text.codec import TextCodec

from ..progress import SILENT, Progress
from .metrics import Ids


# --- of a file ----------------------------------------------------------------------------------------------------
def read_tokens(file: str | Path, bundle: Bundle) -> list[int]:
    """Returns the token ids of a UTF-8 text file, at least two, encoded as a whole by the bundle's tokenizer.

    Raises:
        MissingFileError: The file does not exist.
        InputError: The file has no such text, or the bundle has no tokenizer.
    """
    if bundle.tokenizer is None:
        raise InputError(
            f"{bundle.path} has no tokenizer, so it cannot read a text: export it again with --tokenizer FILE"
        )
    ids = encode_file(file, TextCodec.from_file(bundle.tokenizer))
    if len(ids) < 2:
        raise InputError(f"{file} is too short, 1 token: at least 2 are needed, one to predict the other from")
    return ids


def encode_file(file: str | Path, codec: TextCodec, least: int = 2) -> list[int]:
    """Returns the token ids of a text file. Raises InputError for an empty one, saying that `least` are expected."""
    text = read_text(Path(file))
    if not text.strip():
        raise InputError(f"{file} is empty: a text of at least {least} tokens was expected")
    return codec.encode(text)


def cut_windows(ids: Sequence[int], length: int, most: int) -> list[Ids]:
    """Returns the first `most` windows of `length` tokens each, one after another from the beginning.

    The last one may be shorter, but has at least 2 tokens. Windows are plain cuts of the whole text's tokens: only the
    first has the BOS token that a tokenizer adds.
    """
    cuts = (np.array(ids[start : start + length], np.int64) for start in range(0, len(ids), length))
    return [cut for cut in itertools.islice(cuts, most) if cut.size >= 2]


# --- of the model itself ------------------------------------------------------------------------------------------
def start_token(manifest: Manifest) -> int:
    """Returns the token that begins a generated text: BOS, or else EOS, or else token 0."""
    known = [token for token in (manifest.bos_token_id, *manifest.eos_token_ids) if token is not None]
    return min(known[0] if known else 0, manifest.vocab_size - 1)


def self_generated_texts(
    engine: Engine,
    beginning: int | Sequence[int],
    count: int,
    length: int,
    progress: Progress = SILENT,
    *,
    batch: int = 32,
    seed: int = 0,
) -> list[Ids]:
    """Returns `count` windows (length,): the ids of `beginning` and the model's continuation at temperature 1.

    Generated text matches the model's domain, unlike random ids, and needs no input from the user. `batch` windows are
    generated side by side.
    """
    first_ids = np.atleast_1d(np.asarray(beginning, np.int64))
    rng, texts = np.random.default_rng(seed), np.empty((count, length), np.int64)
    texts[:, : first_ids.size] = first_ids
    for first in range(0, count, batch):
        rows = texts[first : first + batch]
        engine.reset()
        fed = 0
        for place in range(first_ids.size, length):
            logits = engine.forward(rows[:, fed:place])[:, -1]  # (rows, V)
            # The Gumbel-max trick: the argmax of logits plus Gumbel noise is a sample of the softmax.
            rows[:, place] = (logits + rng.gumbel(size=logits.shape)).argmax(-1)
            fed = place
            progress.advance(first * length + (place + 1) * len(rows), count * length)
    return list(texts)
