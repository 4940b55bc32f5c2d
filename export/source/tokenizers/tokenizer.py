"""Reads a --tokenizer argument of any form as tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.files.folder import read_json
from pastkey.files.reading import parse_json, read_bytes, reading
from pastkey.files.tokenizer_file import MOST_BYTES, open_tokenizer
from pastkey.values import is_int

from ...settings import TOKENIZERS, split_factory
from ..factory import make
from ..source import read_template, refuse_links
from .byte_level import from_gpt2, from_tiktoken, merges_beside
from .characters import from_list, is_byte_level
from .conversion import Conversion
from .sentencepiece import from_sentencepiece

_OF_A_FOLDER = (names.TOKENIZER, "encoder.json", "vocab.json", "tokenizer.model")  # the first that exists
_PICKLES = (".pkl", ".pickle", ".pt", ".pth")


def read_tokenizer(given: str | Path | None) -> dict[str, Any]:
    """Returns a Source's fields from a tokenizer. Raises MissingFileError or InputError."""
    if given is None:
        return {}
    factory = split_factory(str(given))
    if factory is not None:
        return _from_factory(*factory).fields(given)
    file = Path(given)
    if file.is_dir():
        file = next((file / name for name in _OF_A_FOLDER if (file / name).is_file()), file / names.TOKENIZER)
        refuse_links(file.parent, [file])
    if not file.exists():
        raise MissingFileError(f"no such tokenizer: {file} does not exist; expected {TOKENIZERS}")
    with reading(file, "a tokenizer"):
        return _read(file)


def _read(file: Path) -> dict[str, Any]:
    if file.suffix == ".model":
        return from_sentencepiece(file).fields(file)
    if file.suffix in _PICKLES:
        raise InputError(
            f"{file} is a pickle, which can run any code when it is read: write the characters' ids, or the texts of "
            "the ids, to a .json file (json.dump(stoi, file)) and give that"
        )
    content = _other_json(file)
    if content is None:
        return _from_tokenizer_json(file)
    merges = merges_beside(file)
    if isinstance(content, Mapping) and merges is not None:
        refuse_links(file.parent, [merges])
    of_gpt2 = merges is not None or file.name == "encoder.json"
    if _is_vocabulary(content) and (of_gpt2 or is_byte_level(content)):
        return from_gpt2(content, file).fields(file)
    return from_list(content, file).fields(file)


def _other_json(file: Path) -> Any:
    """Returns the content of a .json file that is not a tokenizer.json, or None."""
    try:
        content = parse_json(read_bytes(file, MOST_BYTES), file)
    except IntegrityError:
        return None
    return (
        None if not content or not isinstance(content, Mapping | list | str) or _is_of_tokenizers(content) else content
    )


def _is_vocabulary(content: Any) -> bool:
    return isinstance(content, Mapping) and all(is_int(number, 0) for number in content.values())


def _is_of_tokenizers(content: Any) -> bool:
    return isinstance(content, Mapping) and "model" in content and not isinstance(content["model"], int | str)


def _from_tokenizer_json(file: Path) -> dict[str, Any]:
    content = read_bytes(file, MOST_BYTES)  # stored unchanged: the tokenizer that the model was trained with
    tokenizer = open_tokenizer(Tokenizer, content, file)
    beside, template = file.with_name(names.TOKENIZER_CONFIG), file.with_name(names.CHAT_TEMPLATE)
    refuse_links(file.parent, [beside, template])
    config = read_json(beside) if beside.is_file() else {}
    if template.is_file():
        config["chat_template"] = read_template(template)
    ids = {key: _token_id(tokenizer, config.get(key)) for key in ("bos_token", "eos_token")}
    eos = ids["eos_token"]
    return {
        "tokenizer": content,
        "tokenizer_config": config,
        "bos_token_id": ids["bos_token"],
        "eos_token_ids": () if eos is None else (eos,),
    }


def _token_id(tokenizer: Any, token: Any) -> int | None:
    """Returns the id of a special token, which a configuration writes as a string or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def _from_factory(file: Path, text: str) -> Conversion:
    """Converts the result of the user's function or expression: a Tokenizer, a tiktoken Encoding or a list of texts."""
    made = make(
        file,
        text,
        definitions_only=file.suffix == ".ipynb",
        is_wanted=lambda value: isinstance(value, Tokenizer | Mapping | list | str) or _is_encoding(value),
        expected="a tokenizers.Tokenizer, a tiktoken.Encoding, or the ids of characters or words",
    )
    if isinstance(made, Mapping | list | str):
        return from_list(made, f"{text} of {file}")
    try:
        if _is_encoding(made):
            return from_tiktoken(made)
        copy = open_tokenizer(Tokenizer, made.to_str().encode(), f"the result of {text} of {file}")
    except Exception as error:  # a part written in Python, or a pattern that tokenizers cannot read
        kind = type(made).__name__
        raise InputError(f"{text} of {file} gives a {kind} that tokenizer.json cannot hold: {error}") from None
    return Conversion(copy, encode=lambda text: made.encode(text).ids, decode=made.decode)


def _is_encoding(value: object) -> bool:
    return all(hasattr(value, name) for name in ("_mergeable_ranks", "_pat_str", "_special_tokens", "encode_ordinary"))
