"""bundle/ -> text, with numpy, onnxruntime and tokenizers: nothing else.

    import pastkey
    lm = pastkey.load("bundle/")
    print(lm.generate("Once upon a time").text)

From the outside in: `terminal` (questions and answers), `chat` (a conversation) by `chat_template` (its written form),
`language_model` (text in, text out), `turns` (whose turn it is), `text` (tokens <-> text), `generate` (the loop over
ids) by `prompt_lookup` (draft tokens), `sampling` (logits -> token) by `settings`, `engine` (the opened graph and its
cache), `int8_kv` and `cache` (keys and values, in float32 and int8), `cached_ids` (of which tokens), `open` (the
session), `providers` (which hardware), `ort` (onnxruntime itself). Everything loads on first use, so that a command's
`--help` does not wait for onnxruntime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pastkey.lazy import lazy_names

if TYPE_CHECKING:
    from .chat import Chat as Chat
    from .completion import Chunk as Chunk
    from .completion import Completion as Completion
    from .engine import Engine as Engine
    from .generate import Generation as Generation
    from .language_model import LanguageModel as LanguageModel
    from .language_model import load as load
    from .settings import ChatOptions as ChatOptions
    from .settings import GenerateOptions as GenerateOptions
    from .settings import SamplingConfig as SamplingConfig
else:
    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            ".chat": ["Chat"],
            ".completion": ["Chunk", "Completion"],
            ".engine": ["Engine"],
            ".generate": ["Generation"],
            ".language_model": ["LanguageModel", "load"],
            ".settings": ["ChatOptions", "GenerateOptions", "SamplingConfig"],
        },
    )
