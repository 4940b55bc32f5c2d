"""bundle/ -> text, with numpy, onnxruntime and tokenizers: nothing else.

    import pastkey
    lm = pastkey.load("bundle/")
    print(lm.generate("Once upon a time").text)

A reader's way in: `loading` opens a bundle, and `signature` says whose it is; `language_model` (text in, text out),
`session` (a text that stays) and `chat` (a conversation) over its `parts` make a `request` and a `generate` (the steps
over ids, of which `kept_tokens` says what is in the context) with the options of `settings`, read it as a `stream`, and
give a `completion`; `many` and `asynchronous` read several, and in an event loop. The rooms that they stand on:

- `providers/`: which hardware runs a graph, and how onnxruntime opens a session there.
- `engine/`: an opened graph and its cache: token ids in, logits out.
- `batching/`: who runs a step, and for whom: where rows meet, and which caches stay.
- `sampling/`: from logits to a token, and drafts of the next ones from the text itself.
- `speculation/`: drafts of the next ones, by a draft model too, and whether these pay.
- `text/`: tokens <-> text, and a conversation as one text.

Above it all stand `sandbox/`: a bundle in a child process with limits; `bulk/`: many
rows in one job; and `commands/`: what `cli` runs beyond the library.

Everything loads on first use, so that a command's `--help` does not wait for onnxruntime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pastkey.lazy import lazy_names

if TYPE_CHECKING:
    from .asynchronous import AsyncStream as AsyncStream
    from .bulk.generator import Generator as Generator
    from .chat import Chat as Chat
    from .completion import Chunk as Chunk
    from .completion import Completion as Completion
    from .completion import ToolCall as ToolCall
    from .engine.engine import Engine as Engine
    from .generate import Generation as Generation
    from .language_model import LanguageModel as LanguageModel
    from .loading import load as load
    from .request import Request as Request
    from .sampling.log_probs import TokenLogprob as TokenLogprob
    from .sandbox.limits import Limits as Limits
    from .sandbox.limits import LimitsInForce as LimitsInForce
    from .sandbox.model import SandboxedModel as SandboxedModel
    from .sandbox.stream import SandboxedStream as SandboxedStream
    from .scoring import Score as Score
    from .session import Session as Session
    from .settings import ChatOptions as ChatOptions
    from .settings import GenerateOptions as GenerateOptions
    from .settings import SamplingConfig as SamplingConfig
    from .settings import SamplingOptions as SamplingOptions
    from .stream import Stream as Stream
else:
    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            ".asynchronous": ["AsyncStream"],
            ".bulk.generator": ["Generator"],
            ".chat": ["Chat"],
            ".completion": ["Chunk", "Completion", "ToolCall"],
            ".engine.engine": ["Engine"],
            ".generate": ["Generation"],
            ".request": ["Request"],
            ".language_model": ["LanguageModel"],
            ".loading": ["load"],
            ".sampling.log_probs": ["TokenLogprob"],
            ".scoring": ["Score"],
            ".session": ["Session"],
            ".stream": ["Stream"],
            ".sandbox.limits": ["Limits", "LimitsInForce"],
            ".sandbox.model": ["SandboxedModel"],
            ".sandbox.stream": ["SandboxedStream"],
            ".settings": ["ChatOptions", "GenerateOptions", "SamplingConfig", "SamplingOptions"],
        },
    )
