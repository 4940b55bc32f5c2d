"""`load`, for `await`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import pastkey

if TYPE_CHECKING:
    from .loading import LoadSettings
    from .model.language_model import LanguageModel


async def aload(path: str | Path | bytes, **settings: Unpack[LoadSettings]) -> LanguageModel:
    """As `load`, for `await`. A thread imports the runtime and loads the bundle while the event loop runs.

    Reading tokenizer.json and each library's start hold the GIL; docs/python.md says how long. Cancelling the task
    does not stop the load; its model is discarded. Raises the errors of `load`.
    """
    import asyncio  # see decoding/asynchronous.py

    # The name `load` is looked up in the thread, since that imports onnxruntime, tokenizers and numpy.
    return await asyncio.to_thread(lambda: pastkey.load(path, **settings))
