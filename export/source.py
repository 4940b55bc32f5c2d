"""What can be exported: a module, file.py:factory, a checkpoint, a Hugging Face folder, GGUF, or llama2.c."""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from pastkey import names
from pastkey.errors import ContextLengthError, InputError, MissingFileError, PastkeyError
from pastkey.folder import read_json

SOURCES = "a checkpoint or Hugging Face folder, a .gguf file, a llama2.c .bin, or path/to/file.py:factory"


@dataclass(frozen=True)
class Source:
    """A module with what a bundle says of it."""

    module: nn.Module
    name: str  # what the manifest calls it
    context_length: int  # tokens
    tokenizer: bytes | None = None  # the content of tokenizer.json
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # config.json, where the source has one
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    folder: Path | None = None  # of a Hugging Face model, for optimum's exporter where the graft cannot take it


def open_source(
    source: nn.Module | str | Path,
    *,
    tokenizer: str | Path | None = None,
    context_length: int | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda stage: None,
    before_loading: Callable[[int], None] = lambda weights: None,
) -> Source:
    """Opens what `export` was given.

    Raises MissingFileError, InputError or IntegrityError. `context_length` is required for a module, which has none of
    its own, and may shorten that of others. `trust_remote_code` runs the Python that a Hugging Face folder brings, as
    `say` is told first. `before_loading` is given the number of weights of a file, and may refuse to load so many.
    """
    if isinstance(source, nn.Module):
        return _from_module(source, tokenizer, context_length)
    text = str(source)
    file, colon, factory = text.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_module(_call_factory(Path(file), factory), tokenizer, context_length)
    if text.endswith(".py"):
        raise InputError(f"{text} names a file without its factory: write {text}:NAME, where NAME() returns the module")
    path = Path(source)
    if not path.exists():
        raise MissingFileError(f"no such source: {path} does not exist; expected {SOURCES}")
    if path.suffix == ".bin" and path.is_file():
        from .llama2c import open_llama2c

        return open_llama2c(path, tokenizer, context_length)
    if path.suffix == ".gguf" and path.is_file():
        from .pretrained import open_gguf

        return open_gguf(path, tokenizer=tokenizer, context_length=context_length, before_loading=before_loading)
    if (path / names.CONFIG).is_file() and not (path / names.MANIFEST).exists():
        from .pretrained import open_folder

        return open_folder(
            path,
            tokenizer=tokenizer,
            context_length=context_length,
            trust_remote_code=trust_remote_code,
            say=say,
            before_loading=before_loading,
        )
    if path.is_dir() and not (path / names.MANIFEST).exists():
        raise MissingFileError(
            f"{path} has no {names.CONFIG}, as a Hugging Face folder has, and no {names.MANIFEST}, as a checkpoint "
            f"has: expected {SOURCES}"
        )
    return _from_checkpoint(path, tokenizer, context_length)


def _is_of_transformers(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")  # whoever made the module has imported it
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def _from_module(module: nn.Module, tokenizer: str | Path | None, context_length: int | None) -> Source:
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    if _is_of_transformers(module):
        from .pretrained import open_model

        return open_model(module, tokenizer=tokenizer, context_length=context_length)
    name = type(module).__name__
    if context_length is None:
        raise InputError(
            f"{name} has no context length of its own: give it with context_length=N (on the command line, --context N)"
        )
    return Source(module, name, _checked_context(context_length), **read_tokenizer(tokenizer))


def _from_checkpoint(path: Path, tokenizer: str | Path | None, context_length: int | None) -> Source:
    from pastkey.train.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path)
    config = checkpoint.config
    context = context_of(path, config.max_position_embeddings, context_length)
    found = read_tokenizer(tokenizer or checkpoint.tokenizer_path)
    if config.eos_token_id is not None:
        found["eos_token_ids"] = (config.eos_token_id,)
    found["bos_token_id"] = config.bos_token_id
    content = config.to_json() | {"max_position_embeddings": context}
    return Source(checkpoint.model, path.resolve().name, context, config=content, **found)


def context_of(name: object, longest: int, asked: int | None) -> int:
    """The context length in tokens: what the model was trained for, or less where less was asked for."""
    if asked is not None and asked > longest:
        raise ContextLengthError(
            f"--context {asked} is more than the {longest} tokens that {name} was trained for", longest
        )
    return _checked_context(asked or longest)


def _checked_context(length: int) -> int:
    if not isinstance(length, int) or isinstance(length, bool) or length < 2:
        raise InputError(f"the context length is {length!r}; it must be a whole number of tokens from 2")
    return length


# --- tokenizer ----------------------------------------------------------------------------------------------------
def read_tokenizer(path: str | Path | None) -> dict[str, Any]:
    """The fields of a Source that a tokenizer.json and the tokenizer_config.json beside it give."""
    if path is None:
        return {}
    file = Path(path)
    if file.is_dir():
        file = file / names.TOKENIZER
    if not file.is_file():
        raise MissingFileError(f"no such tokenizer: {file} does not exist; expected a tokenizer.json")
    from tokenizers import Tokenizer

    try:
        content = file.read_bytes()  # kept as it is: the very tokenizer that the model was trained with
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:
        raise InputError(f"{file} is not a tokenizer.json of the tokenizers library: {error}") from None
    beside = file.with_name(names.TOKENIZER_CONFIG)
    config = read_json(beside) if beside.is_file() else {}
    config |= _chat_template(file.with_name(names.CHAT_TEMPLATE))
    ids = {key: _token_id(tokenizer, config.get(key)) for key in ("bos_token", "eos_token")}
    eos = ids["eos_token"]
    return {
        "tokenizer": content,
        "tokenizer_config": config,
        "bos_token_id": ids["bos_token"],
        "eos_token_ids": () if eos is None else (eos,),
    }


def _chat_template(file: Path) -> dict[str, str]:
    """A template in a file of its own, for tokenizer_config.json: the one place where transformers.js looks for it."""
    if not file.is_file():
        return {}
    try:
        return {"chat_template": file.read_text(encoding="utf-8")}
    except UnicodeDecodeError:
        raise InputError(f"{file} is not valid UTF-8: save it in that encoding") from None


def _token_id(tokenizer: Any, token: Any) -> int | None:
    """The id of a special token, which a configuration writes as a string or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def check_tokenizer(source: Source, vocab_size: int) -> None:
    """Raises InputError when the tokenizer makes ids that the model has no embedding for."""
    if source.tokenizer is None:
        return
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


# --- path/to/file.py:factory --------------------------------------------------------------------------------------
def _call_factory(file: Path, name: str) -> nn.Module:
    if not file.is_file():
        raise MissingFileError(f"no such file: {file}; expected path/to/file.py:factory")
    module = _import_file(file)
    factory = getattr(module, name, None)
    if not callable(factory):
        defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{file} has no function {name!r}; it defines {', '.join(defined) or 'none'}")
    result = _run_user_code(file, f"{name}()", factory)
    if not isinstance(result, nn.Module):
        raise InputError(f"{name}() of {file} returned a {type(result).__name__}; a torch.nn.Module was expected")
    return result


def _import_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"pastkey_source_{file.stem}", file)
    assert spec is not None
    loader = spec.loader
    assert loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    sys.path.insert(0, str(file.resolve().parent))  # the file may import its neighbours
    try:
        _run_user_code(file, "importing", lambda: loader.exec_module(module))
    finally:
        sys.path.remove(str(file.resolve().parent))
    return module


def _run_user_code(file: Path, what: str, call: Any) -> Any:
    """Calls the user's code; what it raises becomes a sentence with the line in their file."""
    try:
        return call()
    except PastkeyError:
        raise
    except (Exception, SystemExit) as error:  # a script without its `if __name__ == "__main__"` may exit
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        where = f"{file}:{lines[-1]}" if lines else str(file)
        raise InputError(f"{what} failed at {where} with {type(error).__name__}: {error}") from error
