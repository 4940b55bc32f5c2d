"""The parts of a loaded model, which sessions, streams, scores, embeddings and draft models share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pastkey.contract.bundle import Bundle, Manifest
from pastkey.errors import InputError
from pastkey.values import shown

from ..constraints.lazy import LazyVocabulary
from ..decoding.batching.cache_budget import CacheMemory
from ..decoding.batching.scheduler import Scheduler
from ..decoding.many import token_ids
from ..engine.engine import Engine
from ..speculation.drafter import Drafter
from ..text.codec import TextCodec


class Drafts(Protocol):
    """The interface of a draft model to a request."""

    def drafter(self, memory: CacheMemory) -> Drafter | None:
        """A drafter for a new request; None if the draft model is closed."""


@dataclass(frozen=True)
class TextPrompt:
    """A prompt that was encoded once, for the calls of a LanguageModel with several.

    Attributes:
        ids: The token ids.
        text: The text that they encode, or None.
    """

    ids: list[int]
    text: str | None = None


@dataclass(frozen=True)
class ModelParts:
    """The parts of one loaded model.

    Attributes:
        bundle: The bundle, with its absolute path.
        tokenizer: The bundle's tokenizer, or None.
        vocabulary: The tokenizer's vocabulary, for constraints.
        engine: An engine over the graph, for its properties.
        scheduler: Runs the steps.
        memory: The memory limit of the caches.
        draft: The draft model, or None.
        adapters: Name -> the parts with a loaded LoRA adapter, whose graph and caches are of this adapter only.
        renderers: The compiled chat templates of the stateless calls.
        adapter_ends: The EOS tokens of an adapter; they end its texts as the bundle's do.
    """

    bundle: Bundle
    tokenizer: TextCodec | None
    vocabulary: LazyVocabulary
    engine: Engine
    scheduler: Scheduler
    memory: CacheMemory
    draft: Drafts | None
    adapters: dict[str, ModelParts] = field(default_factory=dict)
    adapter_ends: tuple[int, ...] = ()
    renderers: dict[Any, Any] = field(default_factory=dict)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    def require_open(self) -> Engine:
        """The engine. Raises InputError if the model is closed."""
        if self.scheduler.closed:
            raise InputError("this model is closed: load it again with pastkey.load()")
        return self.engine

    def adapted(self, name: str | None) -> ModelParts:
        """The parts with the adapter of this name, or these for None. Raises InputError for an unknown one."""
        if name is None:
            return self
        if (found := self.adapters.get(name)) is None:
            known = f"loaded are {', '.join(map(repr, self.adapters))}" if self.adapters else "none is loaded"
            raise InputError(
                f"there is no adapter {shown(name)}, {known}: load it with model.load_adapter(NAME, FOLDER)"
            )
        return found

    def new_engine(self) -> Engine:
        """An engine with an empty cache over the model's graph."""
        return Engine.over(self.require_open().graph)

    def prompt_ids(self, prompt: str | Sequence[int], name: str = "prompt") -> list[int]:
        """See `LanguageModel.prompt_ids`. `name`: the argument's."""
        if not isinstance(prompt, str):
            return token_ids(prompt, self.manifest.vocab_size, name)
        if self.tokenizer is None:
            raise InputError("this bundle has no tokenizer: give the prompt as token ids (--prompt-ids 1,2,3)")
        return self.tokenizer.encode(prompt)
