"""A conversation: what was said so far, and the next answer from it."""

from __future__ import annotations

import shlex
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from pastkey.errors import InputError

from .completion import Chunk, Completion, completed
from .settings import CHAT_NEW_TOKENS, CHAT_OPTIONS, ChatOptions, require_known
from .text.chat_template import ChatTemplate

if TYPE_CHECKING:
    from .language_model import LanguageModel


class Chat:
    """A conversation with a language model, in the form of a chat template.

    Each question is answered from the whole conversation, rendered anew; its beginning is mostly what the cache holds
    from the turn before, so that little more than the question itself is prefilled. Conversations on one model answer
    in turns, as LanguageModel says; one conversation belongs to one thread at a time.

    Attributes:
        messages: The conversation, {"role", "content"} each.
        model: The model that answers.
        system: What it is told before all else, or None.
    """

    def __init__(self, model: LanguageModel, system: str | None = None, *, template: str | Path | None = None) -> None:
        """See `LanguageModel.chat`."""
        path = model.bundle.path
        if model.tokenizer is None:
            raise InputError(
                f"{path} has no tokenizer and holds no conversation: use  pastkey run {shlex.quote(str(path))} "
                "--prompt-ids 1,2,3"
            )
        self.model = model
        self.system = system if system is None else _checked("system", system)
        self._tokenizer = model.tokenizer
        self._template = ChatTemplate.from_bundle(model.bundle, template)
        self.reset()

    def reset(self) -> None:
        """Begins a new conversation under the same system text."""
        self.messages: list[dict[str, str]] = [] if self.system is None else [_message("system", self.system)]

    def ask(self, text: str, **options: Unpack[ChatOptions]) -> Completion:
        """Answers a message.

        Args:
            text: What the user says.
            **options: Those of `LanguageModel.generate`, which says what they mean, but `reuse_prefix`, which an answer
                does always. `max_new_tokens` is 512.

        Returns:
            The answer, which stands in `messages`, too.

        Raises:
            InputError: The conversation is longer than the context, or one that the template does not take; an option
                is out of range; or this thread holds a stream that is not at its end. The conversation is as it was.
            OptionError: There is no option of that name.
            NumericsError: The model yields NaN or infinity. The conversation is as it was.
        """
        require_known("chat.ask", options, CHAT_OPTIONS)
        return completed(self._answer(text, options))

    def stream(self, text: str, **options: Unpack[ChatOptions]) -> Generator[Chunk, None, Completion]:
        """Answers a message token by token.

        What is wrong with the message or an option is raised by this call. The model is taken at the first `next`.
        A stream that is left before its end leaves the answer as far as it came in the conversation. One that ends
        with an error leaves the conversation as it was.

        Args:
            text: What the user says.
            **options: As in `ask`.

        Yields:
            A Chunk for each new token. Their texts together are the completion's.

        Returns:
            The Completion, as the value of StopIteration, or of `yield from`.

        Raises:
            InputError: As in `ask`, or the stream has lost its turn.
            OptionError: There is no option of that name.
            NumericsError: The model yields NaN or infinity.
        """
        require_known("chat.stream", options, CHAT_OPTIONS)
        return self._answer(text, options)

    def _answer(self, text: str, options: ChatOptions) -> Generator[Chunk, None, Completion]:
        """Checks everything, and gives the generator."""
        messages = [*self.messages, _message("user", _checked("the message", text))]
        ids = self._tokenizer.encode(self._template.render(messages), add_special_tokens=False)
        context = self.model.manifest.context_length
        if len(ids) > context:
            raise InputError(
                f"with this message the conversation has {len(ids)} tokens; the context is {context}: send a shorter "
                "one, or begin anew with /reset (in Python, chat.reset())"
            )
        settings: ChatOptions = {"max_new_tokens": CHAT_NEW_TOKENS, **options}
        return self._chunks(messages, self.model.stream(ids, **settings, reuse_prefix=True))

    def _chunks(
        self, messages: list[dict[str, str]], answer: Generator[Chunk, None, Completion]
    ) -> Generator[Chunk, None, Completion]:
        before, said = self.messages, ""
        try:
            while True:
                chunk = next(answer)
                said += chunk.text
                self.messages = [*messages, _message("assistant", said)]
                yield chunk
        except StopIteration as end:
            completion: Completion = end.value
            self.messages = [*messages, _message("assistant", completion.text)]
            return completion
        except Exception:
            self.messages = before
            raise
        finally:
            answer.close()


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _checked(name: str, text: object) -> str:
    if not isinstance(text, str):
        raise InputError(f"{name} is {text!r:.60}; a text was expected")
    return text
