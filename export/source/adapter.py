"""Opens an adapter of peft as the model that it makes of its base."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pastkey.contract import names
from pastkey.errors import InputError, MissingFileError, first_line, missing_extra
from pastkey.files.folder import hub_id, read_json
from pastkey.quiet import quiet

from ..graft.huggingface import HuggingFaceDecoder
from .source import Source
from .tokenizers.tokenizer import read_tokenizer


def is_adapter(path: Path) -> bool:
    """Whether this is a folder that peft wrote."""
    return (path / names.ADAPTER_CONFIG).is_file()


def base_of(folder: Path) -> str:
    """Returns the path or the Hub id of an adapter's base. Raises MissingFileError if it is neither."""
    base = str(read_json(folder / names.ADAPTER_CONFIG).get("base_model_name_or_path"))
    if not Path(base).exists() and hub_id(base) is None:
        raise MissingFileError(
            f"the base of the adapter {folder} is not at {base}: put it there, or change base_model_name_or_path in "
            f"{folder / names.ADAPTER_CONFIG}"
        )
    return base


def merged(base: Source, folder: Path, tokenizer: str | Path | None) -> Source:
    """Returns the base with the adapter's updates added to its weights, which are in memory.

    Its tokenizer is the given one, or the adapter's if it has one. Raises InputError if the adapter is of another base.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise missing_extra(error, "finetune") from None
    module: Any = base.module.model if isinstance(base.module, HuggingFaceDecoder) else base.module
    try:
        with quiet():
            peft.PeftModel.from_pretrained(module, folder).merge_and_unload()  # in place
    except Exception as error:  # of many kinds
        raise InputError(
            f"peft {peft.__version__} cannot merge {folder} into {base.name}: {first_line(error)}"
        ) from error
    module.requires_grad_(False)
    changes: dict[str, Any] = {"name": folder.resolve().name}
    own = folder / names.TOKENIZER
    if tokenizer or own.is_file():
        changes |= read_tokenizer(tokenizer or own)
    return dataclasses.replace(base, **changes)
