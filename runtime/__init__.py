"""bundle/ -> text, with numpy, onnxruntime and tokenizers: nothing else.

    import pastkey
    lm = pastkey.load("bundle/")
    print(lm.generate("Once upon a time").text)

From the outside in: `dialogue` (a conversation at the terminal), `chat` (a conversation) by `template` (its written
form), `language_model` (text in, text out), `text` (tokens <-> text), `generate` (the loop over ids), `sampling`
(logits -> token) by `settings`, `session` (one onnxruntime session and its cache), `cache` (keys and values),
`providers` (which hardware), `ort` (onnxruntime itself). Everything loads on first use, so that a command's `--help`
does not wait for onnxruntime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import Chat as Chat
    from .generate import Generation as Generation
    from .language_model import Chunk as Chunk
    from .language_model import Completion as Completion
    from .language_model import LanguageModel as LanguageModel
    from .language_model import load as load
    from .session import Session as Session
    from .settings import SamplingConfig as SamplingConfig

_MODULE_OF = {
    "Chat": "chat",
    "Chunk": "language_model",
    "Completion": "language_model",
    "Generation": "generate",
    "LanguageModel": "language_model",
    "SamplingConfig": "settings",
    "Session": "session",
    "load": "language_model",
}

__all__ = ["Chat", "Chunk", "Completion", "Generation", "LanguageModel", "SamplingConfig", "Session", "load"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
