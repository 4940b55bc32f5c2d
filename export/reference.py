"""What `pastkey eval` compares a bundle with: another bundle, or a source run in torch without a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from torch import nn

from pastkey import names
from pastkey.bundle import Bundle, open_bundle
from pastkey.errors import (
    ContextLengthError,
    ContractError,
    InputError,
    MissingFileError,
    NumericsError,
    PastkeyError,
    first_line,
)
from pastkey.folder import read_json

from .attention import failing_line
from .evaluate import BundlePredictions, Ids, Logits, Predictions, agreeing_tokens
from .observe import observe
from .optimum import NativeDecoder
from .source import SOURCES, Source, open_source
from .verify import ModuleReference


class ModulePredictions:
    """What a module predicts, in torch and uncached."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        self._reference = ModuleReference(module)

    def logits(self, ids: Ids) -> Logits:
        """(T,) -> (T, V). Raises InputError where the module fails on so many tokens, NumericsError for NaN."""
        try:
            logits = self._reference.logits(ids)
        except PastkeyError:
            raise
        except Exception as error:  # whatever a user's module raises
            where = failing_line(error)
            raise InputError(
                f"{self.name} failed on a window of {ids.size} tokens{f' at {where}' if where else ''} with "
                f"{type(error).__name__}: {first_line(error)}; give a smaller --length"
            ) from error
        if not np.isfinite(logits).all():
            raise NumericsError(f"the logits of {self.name} are not finite (NaN or infinity): its weights are damaged")
        return logits

    def agreeing(self, prompt: Ids, tokens: Sequence[int]) -> int:
        """How many of `tokens` its own greedy continuation of `prompt` (T,) begins with.

        One run over both tells: up to the first difference they are its own continuation.
        """
        logits = self.logits(np.array([*prompt, *tokens[:-1]], np.int64))[prompt.size - 1 :]
        return agreeing_tokens(logits.argmax(-1).tolist(), tokens)


def open_reference(
    path: str,
    bundle: Bundle,
    ids: Sequence[int],
    length: int,
    *,
    threads: int | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Predictions:
    """Opens a bundle folder, or what `open_source` takes, to be given windows of `length` of the bundle's `ids`.

    Raises MissingFileError or InputError for a reference that is neither, that has another vocabulary, or whose context
    is shorter than a window; and what opening it raises. `threads` are the runtime's; torch keeps its own.
    """
    if _is_bundle(Path(path)):
        other = open_bundle(path)
        if length > other.manifest.context_length:
            raise _too_short(path, other.manifest.context_length, length)
        _require_same_size(bundle, path, other.manifest.vocab_size)
        tokenizer = None if other.tokenizer is None else other.tokenizer.read_bytes()
        _require_same_tokens(bundle, path, tokenizer, ids)
        return BundlePredictions(other, threads=threads)
    _require_known(path)
    try:
        source = open_source(path, context_length=length, trust_remote_code=trust_remote_code, say=say)
    except ContextLengthError as error:
        raise _too_short(path, error.longest, length) from None
    found = ModulePredictions(_runnable(source), path)
    _require_same_size(bundle, path, found.logits(np.zeros(2, np.int64)).shape[-1])
    _require_same_tokens(bundle, path, source.tokenizer, ids)
    return found


def _runnable(source: Source) -> nn.Module:
    """The source's module, checked to keep the contract, or its model of transformers as it is."""
    try:
        observe(source.module, source.context_length)
    except ContractError:
        if source.folder is None:
            raise
        return NativeDecoder(source.module)
    return source.module


def _is_bundle(path: Path) -> bool:
    manifest = path / names.MANIFEST  # a checkpoint has one as well
    return manifest.is_file() and read_json(manifest).get("kind") == "bundle"


def _require_known(path: str) -> None:
    """Raises where neither a bundle nor a source can be meant; which source it is, `open_source` finds out."""
    expected = f"expected another bundle, {SOURCES}"
    place = Path(path)
    if place.is_dir() and not any((place / name).is_file() for name in (names.MANIFEST, names.CONFIG)):
        raise InputError(
            f"{path} cannot be a reference, it has neither {names.MANIFEST} nor {names.CONFIG}: {expected}"
        )
    if place.is_file() and place.suffix not in (".bin", ".gguf", ".py"):
        raise InputError(f"{path} cannot be a reference, it is a file of another kind: {expected}")
    if not place.exists() and not path.rpartition(":")[0].endswith(".py"):
        raise MissingFileError(f"no such reference: {path} does not exist; {expected}")


def _too_short(path: str, longest: int, length: int) -> InputError:
    return InputError(
        f"windows of {length} tokens are longer than the context of the reference {path}, {longest} tokens: give "
        f"--length {longest} or less"
    )


def _require_same_size(bundle: Bundle, path: str, vocab_size: int) -> None:
    if vocab_size != bundle.manifest.vocab_size:
        raise InputError(
            f"the reference {path} has a vocabulary of {vocab_size} tokens and {bundle.path} one of "
            f"{bundle.manifest.vocab_size}: predictions can be compared only over the same one"
        )


def _require_same_tokens(bundle: Bundle, path: str, tokenizer: bytes | None, ids: Sequence[int]) -> None:
    """Raises InputError where one of the text's ids stands for something else in the reference's own tokenizer."""
    if tokenizer is None or bundle.tokenizer is None:
        return
    ours, theirs = Tokenizer.from_file(str(bundle.tokenizer)), Tokenizer.from_buffer(tokenizer)
    for token in sorted(set(ids)):
        if ours.id_to_token(token) != theirs.id_to_token(token):
            raise InputError(
                f"token {token} is {theirs.id_to_token(token)!r} in the reference {path} and "
                f"{ours.id_to_token(token)!r} in {bundle.path}: predictions can be compared only over the same "
                "vocabulary"
            )
