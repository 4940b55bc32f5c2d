"""A vocabulary for llguidance, and the compilation of constraints."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

from pastkey.errors import InputError, missing_extra

from ..text.codec import TextCodec
from ..text.token_bytes import ExactEncoder, token_bytes
from .constraint import Constraint
from .matcher import Matcher, first_sentence, require_uninterrupted

if TYPE_CHECKING:
    from llguidance import LLMatcher

_STACK_BYTES = 128 << 20  # a chain of 2,000 $refs, the longest that `Constraint` accepts, needs less than 64 KB each
_starting = threading.Lock()  # the size of the stack is one for all threads that start
_KEPT = 16  # number of cached compiled constraints
# As json.dumps and most training data write it. With free whitespace a model may write it endlessly, and no token
# between two values would be forced. A schema's own "x-guidance" has precedence.
_JSON = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


class Vocabulary:
    """The bytes of each token and the EOS tokens. Compiles a constraint to a Matcher.

    The end is an extra token with id V for all EOS tokens. So a model may have one, several or none, and an
    EOS token that also occurs in text, such as a line break, still ends the output.
    """

    def __init__(
        self, tokens: Sequence[bytes], special: Collection[int], eos_ids: Collection[int], encode: ExactEncoder
    ) -> None:
        """The first call needs about 10 µs per token.

        Args:
            tokens: The bytes that each id adds to a text, (V,), V as in the logits; for a special token its name.
            special: Ids of special tokens. Only a grammar that names them allows them.
            eos_ids: EOS tokens.
            encode: Splits forced text into tokens.

        Raises:
            MissingExtraError: llguidance is not installed.
        """
        try:
            from llguidance import LLTokenizer
        except ModuleNotFoundError as error:
            raise missing_extra(error) from None
        self.size, self.eos_ids, self._encode = len(tokens), sorted(eos_ids), encode
        self._tokenizer = LLTokenizer(
            _Wrapper([*tokens, b"<end>"], {*special, *eos_ids}, encode),  # type: ignore[arg-type]
            n_vocab=self.size + 1,
            eos_token=self.size,
        )
        self._compiled: dict[Constraint, LLMatcher] = {}

    @classmethod
    def of(cls, codec: TextCodec, size: int, eos_ids: Collection[int]) -> Self:
        """The vocabulary of a bundle's tokenizer. `size`: V of the logits.

        Raises:
            InputError: The text of a token depends on its neighbours.
            MissingExtraError: llguidance is not installed.
        """
        tokens = token_bytes(codec, size)
        encode = ExactEncoder(codec, tokens)
        special = {token: name for name, (token, special) in codec.added_tokens.items() if special and token < size}
        named = [special[token].encode() if token in special else text for token, text in enumerate(tokens)]
        return cls(named, special, eos_ids, encode)

    def matcher(self, constraint: Constraint, end_ids: Collection[int] | None = None) -> Matcher:
        """The matcher of a constraint for a new request. `end_ids` end the output; None for the EOS tokens.

        Raises InputError if the constraint is invalid, if llguidance does not support it or finds it too complex, or
        if no text of this vocabulary can meet it.
        """
        compiled = self._compiled.pop(constraint, None) or self._compile(constraint)
        self._compiled[constraint] = compiled
        for oldest in list(self._compiled)[:-_KEPT]:
            self._compiled.pop(oldest, None)
        return Matcher(compiled, self.size, self.eos_ids if end_ids is None else end_ids)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        """Compiles a constraint in a thread with a large stack: llguidance recurses, and a full stack is a crash."""
        with ThreadPoolExecutor(1) as pool:
            with _starting:
                before = threading.stack_size(_STACK_BYTES)
                try:
                    compiled = pool.submit(self._compiled_here, constraint)
                finally:
                    threading.stack_size(before)
            return compiled.result()

    def _compiled_here(self, constraint: Constraint) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        try:
            compiled = LLMatcher(self._tokenizer, self._grammar(constraint), log_level=0, limits=limits)
            require_uninterrupted(compiled)
            wrong = compiled.get_error()
        except ValueError as error:
            wrong = str(error)
        if wrong:
            raise InputError(
                f"{constraint.kind} cannot be followed: {first_sentence(wrong)}; correct that, or leave it out and "
                "check the text (docs/output.md lists the supported keywords)"
            )
        if not Matcher(compiled, self.size, self.eos_ids).can_begin:
            raise InputError(
                f"no text can meet {constraint.kind}, or none that this model's vocabulary can write: correct it"
            )
        return compiled

    def _grammar(self, constraint: Constraint) -> str:
        from llguidance import LLMatcher, regex_to_lark

        text = constraint.text
        if constraint.kind == "json_schema":
            return LLMatcher.grammar_from_json_schema(text, defaults=_JSON)  # type: ignore[arg-type]
        if constraint.kind == "choices":
            return LLMatcher.grammar_from_lark(
                "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, json.loads(text)))
            )
        if constraint.kind == "regex":
            # \d means 0 to 9: other digits differ between versions of Unicode.
            expression = regex_to_lark(text, "" if "\\D" in text else "d")
            return LLMatcher.grammar_from_lark(f"start: TEXT\nTEXT: /{expression}/")
        return LLMatcher.grammar_from_lark(text)


class _Wrapper:
    """The tokenizer interface that LLTokenizer expects."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: Collection[int], encode: ExactEncoder) -> None:
        self.tokens, self.eos_token_id, self._encode = tokens, len(tokens) - 1, encode
        self.special_token_ids = sorted({*special, self.eos_token_id})

    def __call__(self, text: Any) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode())
