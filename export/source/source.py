"""An opened source: a module, its context, its tokenizer and its configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from pastkey.errors import ContextLengthError, InputError, MissingFileError
from pastkey.files.folder import leads_out, read_text
from pastkey.files.reading import reading
from pastkey.values import is_int

from ..graft.streamed import resident_bytes
from ..progress import SILENT, Progress
from .packed.file_matrix import FileMatrix


@dataclass(frozen=True)
class Source:
    """A module and the facts that a bundle stores about it."""

    module: nn.Module
    name: str  # its name in the manifest
    context_length: int  # tokens
    tokenizer: bytes | None = None  # the content of tokenizer.json
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # config.json, if the source has one
    generation: dict[str, Any] = field(default_factory=dict)  # its authors' sampling settings: generation_config.json
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    revision: str = ""  # the commit on the Hub
    call: str = ""  # how the author calls the module, if that is not the contract
    proved: int = 0  # tokens of the longest text on which a cached run was compared with the author's call
    warnings: tuple[str, ...] = ()  # sentences for the user
    packed: tuple[FileMatrix, ...] = ()  # the matrices of its file that are quantized already

    @property
    def resident_bytes(self) -> int:
        """The bytes of the module's parameters and buffers that are in memory; the others stay in their file."""
        return resident_bytes(self.module)


# Receives the number of weights in a file, how many bytes of them will be in memory, and how many in a temporary file.
# May refuse to load so many.
BeforeLoading = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Opening:
    """How a source is opened: the user's options, and who is told.

    Attributes:
        tokenizer: Replaces the source's own.
        chat_template: A file whose template replaces the tokenizer's own.
        context_length: In tokens. Required for a module, which has none; may shorten that of others.
        weights: A file with a module's state dict.
        eos: Ids or names that replace the source's own ids.
        trust_remote_code: Runs the Python code in a Hugging Face folder; `say` is called first.
        network: Whether ORG/NAME on the Hub may be fetched; otherwise it is read from the cache.
        revision: The commit there, or "" for the newest.
        say: Receives sentences.
        progress: Receives the stages of a fetch.
        before_loading: May refuse to load the weights of a file.
        in_memory: Loads all weights, so that they can change.
    """

    tokenizer: str | Path | None = None
    chat_template: str | Path | None = None
    context_length: int | None = None
    weights: str | Path | None = None
    eos: Sequence[int | str] = ()
    trust_remote_code: bool = False
    network: bool = False
    revision: str = ""
    say: Callable[[str], None] = lambda sentence: None
    progress: Progress = SILENT
    before_loading: BeforeLoading = lambda weights, resident_bytes, temporary_bytes: None
    in_memory: bool = False


def context_of(name: object, longest: int, asked: int | None) -> int:
    """Returns the context length in tokens: the trained length, or less if less was asked for."""
    if asked is not None and asked > longest:
        raise ContextLengthError(
            f"--context {asked} is more than the {longest} tokens that {name} was trained for", longest
        )
    return checked_context(asked or longest)


def checked_context(length: int) -> int:
    """Returns the context length in tokens. Raises InputError unless it is a whole number from 2."""
    if not is_int(length, 2):
        raise InputError(f"the context length is {length!r}; it must be a whole number of tokens from 2")
    return length


SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p")  # which have no effect without the first


def special_ids(*configurations: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a Source's fields for BOS and EOS: of each, that of the first configuration that has it."""
    fields: dict[str, Any] = {}
    for key, field_name in (("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_ids")):
        found = next((v for content in configurations if (v := content.get(key)) is not None), None)
        ids = tuple(token for token in (found if isinstance(found, list | tuple) else [found]) if is_int(token, 0))
        if ids:
            fields[field_name] = ids[0] if key == field_name else ids
    return fields


def sampling_of(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a generation_config.json that pastkey has."""
    wanted = ("repetition_penalty", *(SAMPLING if stated.get("do_sample") is True else ()))
    return {name: stated[name] for name in wanted if stated.get(name) is not None}


# --- tokenizer ----------------------------------------------------------------------------------------------------
def read_template(file: str | Path) -> str:
    """Reads a chat template. Raises MissingFileError or InputError."""
    return read_text(Path(file)).replace("\r\n", "\n")


def with_template(source: Source, template: str) -> Source:
    """Puts this chat template into tokenizer_config.json, the only place where transformers.js reads it."""
    if source.tokenizer is None:
        raise InputError(f"{source.name} has no tokenizer, which a chat template needs: give one with --tokenizer FILE")
    return dataclasses.replace(source, tokenizer_config=source.tokenizer_config | {"chat_template": template})


def refuse_links(folder: Path, files: Iterable[Path]) -> None:
    """Raises InputError for a link out of the folder, except the hub cache's links to its own store.

    A broken link is a MissingFileError. A bundle's files may be published, and a link can point to any file of the
    user's.
    """
    for file in files:
        if file.is_symlink() and not file.exists():
            raise MissingFileError(f"{file} is a link to a file that is not there: fetch or copy that file again")
        if file.exists() and leads_out(file, folder):
            raise InputError(f"{file} leads out of {folder}, to {file.resolve()}: copy the file itself into the folder")


def token_id(source: Source, name: str) -> int:
    """Returns the id of a token by its name. Raises InputError if the tokenizer has none of this name."""
    if source.tokenizer is None:
        raise InputError(f"--eos {name!r} is the name of a token, and there is no tokenizer: give its id, as --eos 0")
    found = Tokenizer.from_buffer(source.tokenizer).token_to_id(name)
    if found is None:
        raise InputError(f"--eos {name!r} is not a token of the tokenizer: give its name there, or its id, as --eos 0")
    return found


def check_tokenizer(source: Source, vocab_size: int, eos: Sequence[int] = ()) -> None:
    """Raises InputError if an id of the tokenizer, or of the user's `eos`, is not one that the model embeds."""
    if eos and max(eos) >= vocab_size:
        raise InputError(
            f"--eos {max(eos)} is not a token of {source.name}, which has {vocab_size} embeddings (ids 0 to "
            f"{vocab_size - 1}): give the id that ends its texts"
        )
    if source.tokenizer is None:
        return
    with reading(f"the tokenizer of {source.name}", "a tokenizer.json"):
        vocabulary = json.loads(source.tokenizer)
        added = [token["id"] for token in vocabulary.get("added_tokens", [])]
        model = vocabulary.get("model", {}).get("vocab", {})
        ids = list(model.values()) if isinstance(model, dict) else list(range(len(model)))
    largest = max([*added, *ids], default=-1)
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer of {source.name} makes token ids up to {largest}, but the model has {vocab_size} "
            f"embeddings (ids 0 to {vocab_size - 1}): give the tokenizer that the model was trained with"
        )
