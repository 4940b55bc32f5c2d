"""Texts to measure and to calibrate on: a file's tokens, cut into windows, and what a bundle itself writes."""

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
    """The token ids of a UTF-8 text file, at least two, as the bundle's tokenizer reads it as a whole.

    Raises:
        MissingFileError: There is no such file.
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
    """The token ids of a text file that is not empty; `least` is how many of them its refusal says are expected."""
    text = read_text(Path(file))
    if not text.strip():
        raise InputError(f"{file} is empty: a text of at least {least} tokens was expected")
    return codec.encode(text)


def cut_windows(ids: Sequence[int], length: int, most: int) -> list[Ids]:
    """The first `most` windows of `length` tokens each, one after another from the beginning.

    The last one may be shorter, but has at least 2 tokens. They are plain cuts of the whole text's tokens: a BOS token
    that the tokenizer adds stands in the first one only.
    """
    cuts = (np.array(ids[start : start + length], np.int64) for start in range(0, len(ids), length))
    return [cut for cut in itertools.islice(cuts, most) if cut.size >= 2]


# --- of the model itself ------------------------------------------------------------------------------------------
def start_token(manifest: Manifest) -> int:
    """What a text of the model's begins with: BOS, or else EOS, or else the first token of all."""
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
    """`count` windows (length,): the ids of `beginning`, and what the model writes after them at temperature 1.

    Its own text is of its kind, where random ids would be of none, and nobody has to be asked for some. `batch` windows
    are written side by side.
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
            # The Gumbel-max trick: the largest of logits and such noise is drawn with the softmax's probabilities.
            rows[:, place] = (logits + rng.gumbel(size=logits.shape)).argmax(-1)
            fed = place
            progress.advance(first * length + (place + 1) * len(rows), count * length)
    return list(texts)
