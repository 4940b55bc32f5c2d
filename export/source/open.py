"""Opens any source: a module, file.py:factory, a checkpoint, a Hugging Face or ONNX folder, GGUF, or llama2.c."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pastkey.contract import names
from pastkey.contract.source_files import adapter_base
from pastkey.errors import InputError, MissingFileError, first_line, missing_extra
from pastkey.files.folder import hub_hint, hub_id, read_json
from pastkey.quiet import quiet
from pastkey.runtime.text.chat_template import ChatTemplate
from pastkey.values import is_int

from ..graft.huggingface import HuggingFaceDecoder
from ..settings import SOURCES, split_factory
from .factory import call_factory
from .hub import HubModel, find
from .llama2c import open_llama2c
from .onnx_folder.folder import SUFFIX, find_graph, open_onnx
from .packed.folder import in_file, matrices
from .packed.matrix import PackedMatrix
from .pretrained import check_config, open_folder, open_gguf, open_model
from .source import Opening, Source, checked_context, context_of, read_template, token_id, with_template
from .stored_weights import stored_bytes_per_weight
from .tokenizers.tokenizer import read_tokenizer
from .weights import load_weights

PLAIN = Opening()


def open_source(source: nn.Module | str | Path | HubModel, opening: Opening = PLAIN) -> Source:
    """Opens the source of an export. A str may be ORG/NAME on the Hub.

    Raises MissingFileError, InputError or IntegrityError.
    """
    template = None if opening.chat_template is None else read_template(opening.chat_template)  # loading is slow
    if template is not None and importlib.util.find_spec("jinja2") is not None:
        ChatTemplate(template)  # refuses an invalid template; without Jinja, `chat` does
    opened = _opened(source, opening)
    if opening.eos:
        ids = tuple(token if isinstance(token, int) else token_id(opened, token) for token in opening.eos)
        opened = dataclasses.replace(opened, eos_token_ids=ids)
    return opened if template is None else with_template(opened, template)


def _opened(source: nn.Module | str | Path | HubModel, opening: Opening) -> Source:
    if isinstance(source, nn.Module):
        module = getattr(source, "_orig_mod", source)  # unwrap torch.compile
        # The caller's own must not change.
        return _from_module(module if opening.weights is None else copy.deepcopy(module), opening)
    if (factory := split_factory(str(source))) is not None:
        module, told = call_factory(*factory, weights_follow=opening.weights is not None)
        return _from_module(getattr(module, "_orig_mod", module), opening, told)
    if opening.weights is not None:
        raise InputError(
            f"--weights {opening.weights} is for a module (file.py:factory or notebook.ipynb:Model), and {source} "
            "has its own weights: leave it out"
        )
    if isinstance(source, HubModel):
        return _open_hub(source, opening)
    if (base := _base_of(Path(source))) is not None:
        own = dataclasses.replace(opening, tokenizer=None, chat_template=None, eos=(), revision="", in_memory=True)
        try:
            opened = open_source(base, own)
        except MissingFileError as error:
            raise MissingFileError(f"{_adapter_of(Path(source), base)}: {error}") from error
        return _merged(opened, Path(source), opening.tokenizer)
    if isinstance(source, str) and hub_id(source) is not None:
        return _open_hub(find(source, opening.progress, network=opening.network, revision=opening.revision), opening)
    return _open(Path(source), opening)


def _open(path: Path, opening: Opening) -> Source:
    if not path.exists():
        raise MissingFileError(f"no such source: {path} does not exist; expected {SOURCES}{hub_hint(str(path))}")
    if path.suffix == ".bin" and path.is_file():
        return open_llama2c(path, opening)
    if path.suffix == ".gguf" and path.is_file():
        return open_gguf(path, opening)
    graph = path if path.suffix == SUFFIX and path.is_file() else None
    if path.is_dir() and not (path / names.MANIFEST).exists():
        graph = find_graph(path)
    if graph is not None:
        return open_onnx(graph, opening)
    training = _training_of_fine_tuned(path)
    if (path / names.CONFIG).is_file() and (training is not None or not (path / names.MANIFEST).exists()):
        opened = open_folder(path, opening)
        return dataclasses.replace(opened, warnings=(*_unfinished(path, training or {}), *opened.warnings))
    if path.is_dir() and not (path / names.MANIFEST).exists():
        raise MissingFileError(
            f"{path} has no {names.CONFIG}, as a Hugging Face or ONNX folder has, and no {names.MANIFEST}, as a "
            f"checkpoint has: expected {SOURCES}"
        )
    return _from_checkpoint(path, opening)


def _open_hub(found: HubModel, opening: Opening) -> Source:
    if found.is_bundle:
        raise InputError(
            f"{found} is a bundle already: fetch it with  pastkey export {found} --out {found.folder_name}  and load "
            "that folder"
        )
    found.fetch_small(opening.progress, code=opening.trust_remote_code)
    check_config(found.folder, found, trust_remote_code=opening.trust_remote_code)
    weights = sum(found.weights().values()) // stored_bytes_per_weight(read_json(found.folder / names.CONFIG))
    opening.before_loading(weights, 0, 0)
    found.fetch_weights(opening.progress)
    return dataclasses.replace(open_folder(found.folder, opening, name=found.name), revision=found.revision)


def _is_of_transformers(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")  # imported already if the module is one of its models
    # A class of the user's own is called as its author calls it, whatever it inherits from.
    package = type(module).__module__.partition(".")[0]
    of_library = package in ("transformers", "transformers_modules")
    return transformers is not None and of_library and isinstance(module, transformers.PreTrainedModel)


def _require_float_python(module: nn.Module) -> None:
    """Raises InputError for a module with parts of TorchScript, or that torch has quantized."""
    for path, part in module.named_modules():
        scripted = isinstance(part, torch.jit.ScriptModule)
        if scripted or ".quantized." in f"{type(part).__module__}.":
            what = "a module of TorchScript" if scripted else f"quantized already ({type(part).__name__})"
            raise InputError(
                f"{f'{path} of ' if path else ''}{type(module).__name__} is {what}: give the Python module in float, "
                "as it was before; pastkey quantizes it itself"
            )


def _from_module(module: nn.Module, opening: Opening, told: tuple[str, ...] = ()) -> Source:
    """`told`: sentences about how the module was made."""
    packed: tuple[PackedMatrix, ...] = ()
    if opening.weights is not None:
        file = Path(opening.weights)
        told = (*told, *load_weights(module, file, opening.say))
        packed = matrices([in_file(file)]) if file.suffix == ".safetensors" else ()
    _require_float_python(module)
    if _is_of_transformers(module):
        opened = open_model(module, opening)
    else:
        name = type(module).__name__
        if opening.context_length is None:
            raise InputError(
                f"{name} has no context length: give it with context_length=N (on the command line, --context N)"
            )
        context = checked_context(opening.context_length)
        opened = Source(module, name, context, **read_tokenizer(opening.tokenizer))
    return dataclasses.replace(opened, warnings=(*told, *opened.warnings), packed=packed)


def _from_checkpoint(path: Path, opening: Opening) -> Source:
    from pastkey.train.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path)
    config = checkpoint.config
    context = context_of(path, config.max_position_embeddings, opening.context_length)
    found = read_tokenizer(opening.tokenizer or checkpoint.tokenizer_path)
    if config.eos_token_id is not None:
        found["eos_token_ids"] = (config.eos_token_id,)
    found["bos_token_id"] = config.bos_token_id
    content = config.to_json() | {"max_position_embeddings": context}
    warnings = (*_unfinished(path, checkpoint.training), *found.pop("warnings", ()))
    return Source(checkpoint.model, path.resolve().name, context, config=content, warnings=warnings, **found)


def _training_of_fine_tuned(path: Path) -> Mapping[str, Any] | None:
    """Returns "training" of the manifest of a model of transformers that `pastkey train --init` wrote, or None."""
    if not (path / names.MANIFEST).is_file():
        return None
    from pastkey.train.checkpoint import TRANSFORMERS, check_settled, layout_of

    return check_settled(path) if layout_of(path) == TRANSFORMERS else None


def _unfinished(path: Path, training: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the warning about a training that stopped before its last step."""
    settings = training.get("settings")
    step, steps = training.get("step"), settings.get("steps") if isinstance(settings, dict) else None
    if not (is_int(step) and is_int(steps) and step < steps):
        return ()
    return (
        f"the training of {path} stopped at step {step} of {steps}: continue with  "
        f"{shlex.join(['pastkey', 'train', '--out', str(path), '--resume'])}  and export again",
    )


def _base_of(folder: Path) -> str | None:
    """Returns the path or Hub id of an adapter's base, None if this is no adapter. Raises MissingFileError."""
    base = adapter_base(folder)
    if base is not None and not Path(base).exists() and hub_id(base) is None:
        raise MissingFileError(
            f"{_adapter_of(folder, base)}: no base is at {base!r}: put it there, or change base_model_name_or_path in "
            f"{folder / names.ADAPTER_CONFIG}"
        )
    if base is not None and not (folder / names.ADAPTER_WEIGHTS).is_file():  # peft would ask the Hub, or read a pickle
        raise MissingFileError(f"the adapter {folder} has no {names.ADAPTER_WEIGHTS}: copy it, or save it in this form")
    return base


def _adapter_of(folder: Path, base: str) -> str:
    """The kind of a folder without a whole model, and the command that needs only its base."""
    run = shlex.join(["pastkey", "run", "base", "--adapter", str(folder)])
    return (
        f"{folder} is a peft adapter of {base}, into which an export merges it (to export only the base, from another "
        f"folder:  pastkey export FOLDER --adapters --out base  and  {run})"
    )


def _merged(base: Source, folder: Path, tokenizer: str | Path | None) -> Source:
    """Returns the base with the adapter's updates added to its weights, which are in memory.

    Its tokenizer is the given one, or the adapter's if it has one; EOS tokens are the tokenizer's and the base's.
    Raises InputError if the adapter is of another base.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise missing_extra(error, "train") from None
    module: Any = base.module.model if isinstance(base.module, HuggingFaceDecoder) else base.module
    try:
        with quiet():
            peft.PeftModel.from_pretrained(module, folder).merge_and_unload()  # in place
    except Exception as error:  # of many kinds
        raise InputError(
            f"peft {peft.__version__} cannot merge {folder} into {base.name}: {first_line(error)}"
        ) from error
    module.requires_grad_(False)
    changes: dict[str, Any] = {"name": folder.resolve().name, "packed": ()}
    own = folder / names.TOKENIZER
    if tokenizer or own.is_file():
        changes |= read_tokenizer(tokenizer or own)
        # Of the EOS tokens of an instruction model, its tokenizer names one.
        changes["eos_token_ids"] = tuple(dict.fromkeys((*changes["eos_token_ids"], *base.eos_token_ids)))
    return dataclasses.replace(base, **changes)
