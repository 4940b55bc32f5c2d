"""bundle/ -> text, with numpy, onnxruntime and tokenizers: nothing else.

    import pastkey
    lm = pastkey.load("bundle/")
    print(lm.generate("Once upon a time").text)

The rooms; each imports only those above it:

- `options`: the table of all options, with their checks. `settings`: their types, for mypy and editors.
- `text/`: tokens <-> text, and a conversation as one text. `sampling/`: from logits to a token. `providers/`: which
  hardware runs a graph, and how onnxruntime opens a session there.
- `engine/`: an opened graph and its caches: token ids in, logits out. `constraints/`: which tokens a schema allows.
- `speculation/`: drafts of the next tokens, and whether they pay.
- `decoding/`: a request becomes a generation, its steps a stream, its end a completion. `decoding/batching/` decodes
  generations that run at the same time together.
- `model/`: a bundle as a language model: sessions, chat, scores, embeddings.
- `sandbox/`: a bundle in a child process with limits.
- `loading`: `pastkey.load`, and `async_loading` for `await`.
- `bulk/`: many rows in one job.
- `commands/`: the commands, one module each.

Everything loads on first use, so that a command's `--help` does not wait for onnxruntime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pastkey.lazy import lazy_names

if TYPE_CHECKING:
    from . import sandbox as sandbox
    from .async_loading import aload as aload
    from .bulk.generator import Generator as Generator
    from .decoding.asynchronous import AsyncStream as AsyncStream
    from .decoding.asynchronous import AsyncStreamMany as AsyncStreamMany
    from .decoding.batching.activity import Activity as Activity
    from .decoding.completion import Chunk as Chunk
    from .decoding.completion import Completion as Completion
    from .decoding.completion import ToolCall as ToolCall
    from .decoding.generation import Generation as Generation
    from .decoding.request import Request as Request
    from .decoding.stream import Stream as Stream
    from .engine.engine import Engine as Engine
    from .loading import load as load
    from .model.chat.chat import Chat as Chat
    from .model.chat.chat_stream import ChatStream as ChatStream
    from .model.chat.prompt import AnswerOptions as AnswerOptions
    from .model.chat.prompt import ChatPrompt as ChatPrompt
    from .model.chat.prompt import ConversationOptions as ConversationOptions
    from .model.language_model import LanguageModel as LanguageModel
    from .model.parts import TextPrompt as TextPrompt
    from .model.scoring import Score as Score
    from .model.session import Session as Session
    from .sampling.log_probs import TokenLogprob as TokenLogprob
    from .sandbox.limits import Limits as Limits
    from .settings import ChatOptions as ChatOptions
    from .settings import GenerateOptions as GenerateOptions
    from .settings import SamplingConfig as SamplingConfig
    from .settings import SamplingOptions as SamplingOptions
    from .text.tool_call_stream import ToolCallDelta as ToolCallDelta
else:
    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            ".async_loading": ["aload"],
            ".bulk.generator": ["Generator"],
            ".decoding.asynchronous": ["AsyncStream", "AsyncStreamMany"],
            ".decoding.batching.activity": ["Activity"],
            ".decoding.completion": ["Chunk", "Completion", "ToolCall"],
            ".decoding.generation": ["Generation"],
            ".decoding.request": ["Request"],
            ".decoding.stream": ["Stream"],
            ".engine.engine": ["Engine"],
            ".loading": ["load"],
            ".model.chat.chat": ["Chat"],
            ".model.chat.chat_stream": ["ChatStream"],
            ".model.chat.prompt": ["AnswerOptions", "ChatPrompt", "ConversationOptions"],
            ".model.language_model": ["LanguageModel"],
            ".model.parts": ["TextPrompt"],
            ".model.scoring": ["Score"],
            ".model.session": ["Session"],
            ".sampling.log_probs": ["TokenLogprob"],
            ".sandbox": ["sandbox"],
            ".sandbox.limits": ["Limits"],
            ".settings": ["ChatOptions", "GenerateOptions", "SamplingConfig", "SamplingOptions"],
            ".text.tool_call_stream": ["ToolCallDelta"],
        },
    )
