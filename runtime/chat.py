"""A conversation: what was said so far, and the next answer from it."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from pastkey.errors import InputError

from .language_model import Chunk, Completion, LanguageModel, completed
from .settings import CHAT_NEW_TOKENS
from .template import ChatTemplate


class Chat:
    """A conversation with a language model, in the form of the bundle's chat template.

    Each question is answered from the whole conversation, rendered anew; its beginning is mostly what the cache holds
    from the turn before, so that little more than the question itself is prefilled. `messages` is the conversation,
    {"role", "content"} each.
    """

    def __init__(self, model: LanguageModel, system: str | None = None) -> None:
        """`system` is told to the model before all else.

        Raises InputError for a bundle without tokenizer or without a chat template that can be used, MissingExtraError
        without jinja2.
        """
        path = model.bundle.path
        if model.tokenizer is None:
            raise InputError(
                f"{path} has no tokenizer, so that its model speaks ids and holds no conversation: use  "
                f"pastkey run {path} --prompt-ids 1,2,3"
            )
        self.model = model
        self.system = system
        self._tokenizer = model.tokenizer
        self._template = ChatTemplate.from_folder(path)
        self.reset()

    def reset(self) -> None:
        """Begins a new conversation under the same system text."""
        self.messages: list[dict[str, str]] = [] if self.system is None else [_message("system", self.system)]

    def ask(self, text: str, **settings: Any) -> Completion:
        """The answer to `text`; takes what `stream` takes."""
        return completed(self.stream(text, **settings))

    def stream(
        self, text: str, *, max_new_tokens: int = CHAT_NEW_TOKENS, **settings: Any
    ) -> Generator[Chunk, None, Completion]:
        """Yields the answer to `text` as it comes and returns it as a Completion; takes what `generate` takes.

        A stream that is left before its end leaves the answer as far as it came in the conversation. Raises InputError,
        before the first chunk and with the conversation as it was, for settings out of range, for a conversation that
        is longer than the context, and for one that the template does not take.
        """
        messages = [*self.messages, _message("user", text)]
        ids = self._tokenizer.encode(self._template.render(messages), add_special_tokens=False)
        context = self.model.manifest.context_length
        if len(ids) > context:
            raise InputError(
                f"with this message the conversation has {len(ids)} tokens; the context is {context}: send a shorter "
                "one, or begin anew with /reset (in Python, chat.reset())"
            )
        answer = self.model.stream(ids, max_new_tokens=max_new_tokens, reuse_prefix=True, **settings)
        return self._stream(messages, answer)

    def _stream(
        self, messages: list[dict[str, str]], answer: Generator[Chunk, None, Completion]
    ) -> Generator[Chunk, None, Completion]:
        said = ""
        while True:
            try:
                chunk = next(answer)
            except StopIteration as end:
                completion: Completion = end.value
                self.messages = [*messages, _message("assistant", completion.text)]
                return completion
            said += chunk.text
            self.messages = [*messages, _message("assistant", said)]
            yield chunk


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
