"""Shows an example with its loss mask, so that a person sees it before hours are spent on it."""

from __future__ import annotations

import os
import sys
from itertools import groupby
from pathlib import Path

import numpy as np

from pastkey.command import say, without_control

from ..checkpoint import TOKENS_TRAIN
from ..tokenizer import TextTokenizer
from .token_files import DataInfo

_TOKENS = 400  # shown of the example
_TRAINED, _OTHER, _PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def show_example(folder: Path, info: DataInfo, tokenizer: TextTokenizer) -> None:
    """Prints the first example of the training file, and how much of the file is trained, on standard error."""
    ids = np.fromfile(folder / TOKENS_TRAIN, info.dtype, min(info.first_example, _TOKENS)).astype(np.int64)
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    text = marked(ids.tolist(), tokenizer, coloured=coloured) + (" …" if info.first_example > _TOKENS else "")
    end = tokenizer.tokenizer.id_to_token(info.end)
    trained = info.trained_tokens or 0
    share = f"{trained:,} of {info.train_tokens:,} tokens ({trained / info.train_tokens:.0%})"
    cut = f"; {info.cut:,} examples are longer than a window, and their ends are left out" if info.cut else ""
    say(f"trained: {share} of the windows, padding included; answers end with {end}{cut}")
    say(f"an example, of which {'the green text' if coloured else 'the text in [[ ]]'} is trained:")
    print(text, file=sys.stderr, flush=True)


def marked(tokens: list[int], tokenizer: TextTokenizer, *, coloured: bool) -> str:
    """Returns the text of tokens as in a token file, with the trained ones in green, or between [[ and ]]."""
    pieces = []
    for trained, group in groupby(tokens, lambda token: token >= 0):
        ids = [token if token >= 0 else ~token for token in group]
        text = without_control(tokenizer.tokenizer.decode(ids, skip_special_tokens=False))
        if coloured:
            pieces.append(f"{_TRAINED if trained else _OTHER}{text}{_PLAIN}")
        else:
            pieces.append(f"[[{text}]]" if trained else text)
    return "".join(pieces)
