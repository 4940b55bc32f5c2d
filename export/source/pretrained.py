"""Opens a source that transformers reads: a Hugging Face folder, or a GGUF file, whose weights it dequantizes.

transformers knows the architecture: the configuration, the weights' names, the tokenizer. This module only checks
the conditions of an export, and collects the facts that a bundle stores.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from pastkey.contract import names
from pastkey.contract.config import ROPE_TYPES
from pastkey.errors import InputError, MissingFileError
from pastkey.files.folder import read_json
from pastkey.files.reading import read_bytes
from pastkey.files.tokenizer_file import MOST_BYTES, open_tokenizer, require_dense
from pastkey.train.pretrained import transformers_opening
from pastkey.values import is_int

from ..graft.streamed import WrittenError
from ..graph.stored import StoredWeights
from .gguf_tensors import dequantized_to_disk, has_room, read_once
from .packed.folder import Reader, dequantized_forms, find_packed, matrices, reader_of
from .packed.gguf import gguf_matrices
from .source import Opening, Source, context_of, refuse_links, sampling_of, special_ids
from .stored_tensors import Joined, kept_in_files
from .stored_weights import (
    MOST_POSITIONS,
    SIZES,
    check_gguf,
    check_sizes,
    check_weights,
    has_tokenizer,
    weights_of,
)
from .tokenizers.tokenizer import read_tokenizer

_EXTRAS = ("export", "huggingface")
_OTHER_HEAD = re.compile(r"For(?!CausalLM)[A-Z]\w*$")  # BertForMaskedLM
_QUANTIZED = "quantization_config"
_CONTEXT = SIZES["positions"]  # the first of these that a configuration has
_UNNAMED_CONTEXT = 2048  # tokens, if a configuration names none (ALiBi needs none)
_READ = (".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken", ".py")  # transformers reads them in a folder
_BESIDE_GGUF = (names.CONFIG, names.TOKENIZER, names.TOKENIZER_CONFIG, names.CHAT_TEMPLATE)  # and next to a GGUF file


def open_folder(folder: Path, opening: Opening, *, name: str | None = None) -> Source:
    """Opens a folder with config.json and safetensors. Raises InputError, MissingFileError or ResourceError.

    `name` is the source's, by default the folder's.
    """
    trusted, tokenizer = opening.trust_remote_code, opening.tokenizer
    code = check_config(folder, name or folder, trust_remote_code=trusted)
    content = read_json(folder / names.CONFIG)
    check_weights(folder, content)
    joined = find_packed(weights_of(folder, content), _packed_reader(content, name or folder))
    weights = check_sizes(folder, content) + sum(part.more for part in joined.values())
    if told := dequantized_forms(joined.values()):
        opening.say(f"weights of {name or folder.name} are {told}: they are read as float32, and not kept as they are")
    opening.before_loading(weights, 0, 0)
    if (folder / names.TOKENIZER).is_file() and not tokenizer:  # transformers also writes it
        opened = open_tokenizer(Tokenizer, read_bytes(folder / names.TOKENIZER, MOST_BYTES), folder / names.TOKENIZER)
        require_dense(opened.get_vocab(), folder / names.TOKENIZER)
    if code:
        opening.say(f"run the Python code of {folder}: {', '.join(code)}")
    with transformers_opening(folder, *_EXTRAS) as library:
        options: dict[str, Any] = {"trust_remote_code": trusted, "local_files_only": True}
        config = library.AutoConfig.from_pretrained(folder, **options)
        for part in (config, config.get_text_config()):
            if hasattr(part, _QUANTIZED):  # transformers would load the quantized matrices by other libraries
                delattr(part, _QUANTIZED)
        read: dict[str, Any] = {"config": config, "use_safetensors": True, "joined": joined, **options}
        model, stored = _load(library, folder, in_memory=opening.in_memory, **read)
        wanted = has_tokenizer(folder) and not tokenizer
        found = library.AutoTokenizer.from_pretrained(folder, **options) if wanted else None
    source = _source(name or folder.resolve().name, model, found, opening, stored)
    return dataclasses.replace(source, packed=matrices(joined.values()))


def open_gguf(file: Path, opening: Opening) -> Source:
    """Opens a GGUF file, which contains weights, configuration, tokenizer and chat template."""
    if not file.is_file():
        raise MissingFileError(f"no such file: {file}")
    refuse_links(file.parent, [file.parent / name for name in _BESIDE_GGUF])
    weights = check_gguf(file)
    with read_once():
        packed = gguf_matrices(file)
        in_file = 4 * weights if has_room(weights) and not opening.in_memory else 0
        opening.before_loading(weights, 4 * weights - in_file, in_file)
        with transformers_opening(file, *_EXTRAS) as library:
            options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
            model, stored = _load(library, file.parent, named=file, in_memory=opening.in_memory, **options)
            found = None if opening.tokenizer else library.AutoTokenizer.from_pretrained(file.parent, **options)
    source = _source(file.stem, model, found, opening, stored)
    source = dataclasses.replace(source, packed=packed)
    if found is None or source.tokenizer is None:
        return source
    own = _without_tokens_from(model.get_input_embeddings().num_embeddings, source.tokenizer)
    return dataclasses.replace(source, tokenizer=own)


def open_model(model: Any, opening: Opening) -> Source:
    """Opens a copy of a model in memory; the model does not change."""
    return _source(type(model).__name__, torch.nn.Module.float(copy.deepcopy(model)).eval(), None, opening)


# --- before loading -----------------------------------------------------------------------------------------------
def check_config(folder: Path, name: object, *, trust_remote_code: bool) -> list[str]:
    """Raises InputError if a folder's configuration is not that of a decoder that can be exported.

    Reads no weights. `name` is the source's in messages. Returns the names of the folder's own Python files, which need
    `trust_remote_code`.
    """
    refuse_links(folder, _read_of(folder))
    config = read_json(folder / names.CONFIG)
    _packed_reader(config, name)
    code = sorted({name.split("--")[-1].split(".")[0] + ".py" for name in code_references(folder)})
    if code and not trust_remote_code:
        raise InputError(
            f"{name} has its own Python code ({', '.join(code)}), which loading it would run: read that code, "
            "and if you trust it add --trust-remote-code"
        )
    with transformers_opening(name, *_EXTRAS) as library:
        opened = library.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        if getattr(opened, "is_encoder_decoder", False):
            raise InputError(f"{name} holds an encoder-decoder ({opened.model_type}): only decoders can be exported")
        own = "AutoModelForCausalLM" in (config.get("auto_map") or {})
        kinds = [str(kind) for kind in config.get("architectures") or ()]
        # transformers loads only the text part of a model around it.
        around = opened.get_text_config() is not opened and all(
            kind.endswith("ForConditionalGeneration") for kind in kinds
        )
        other = type(opened) not in library.MODEL_FOR_CAUSAL_LM_MAPPING or (_is_another(kinds) and not around)
        if not own and other:
            raise InputError(
                f"{name} holds a {' and '.join(kinds) or opened.model_type}, which is not a decoder of transformers "
                "(AutoModelForCausalLM): only decoders can be exported"
            )
    return code


def _packed_reader(config: Mapping[str, Any], source: object) -> Reader:
    """Returns the reader of a folder's quantized weights. Raises InputError for a form that nothing reads."""
    parts = (part for part in (config, config.get("text_config")) if isinstance(part, dict))
    settings = next((part[_QUANTIZED] for part in parts if isinstance(part.get(_QUANTIZED), dict)), None)
    return (lambda _: ()) if settings is None else reader_of(settings, source)


def _is_another(kinds: Sequence[str]) -> bool:
    """Whether all classes have a head that is not a decoder's. A class of somebody's own may have any name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return bool(kinds) and all(_OTHER_HEAD.search(kind) and kind not in known for kind in kinds)


def _read_of(folder: Path) -> Iterator[Path]:
    """Yields the files that transformers may read."""
    yield from (file for file in sorted(folder.iterdir()) if file.suffix in _READ)
    yield from folder.glob("additional_chat_templates/*")


def code_references(folder: Path) -> list[str]:
    """Returns the classes that the folder's auto_map entries name: "module.Class", "ORG/NAME--module.Class"."""
    references: list[Any] = []
    for file in (folder / names.CONFIG, folder / names.TOKENIZER_CONFIG):
        entries = read_json(file).get("auto_map") if file.is_file() else None
        for reference in entries.values() if isinstance(entries, dict) else [entries]:
            references += reference if isinstance(reference, list) else [reference]
    return [name for name in references if isinstance(name, str)]


# --- loading ------------------------------------------------------------------------------------------------------
def _load(
    library: Any,
    folder: Path,
    *,
    named: Path | None = None,
    in_memory: bool = False,
    joined: Mapping[str, Joined] | None = None,
    **options: Any,
) -> tuple[Any, StoredWeights | None]:
    """Loads the model in float32; its large weights stay in their files. All of its weights must come from them."""
    read = functools.partial(
        library.AutoModelForCausalLM.from_pretrained,
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        ignore_mismatched_sizes=True,  # reported below, with the sizes
        output_loading_info=True,
        **options,
    )
    stored = StoredWeights()
    loaded = kept_in_files(None, joined) if joined else contextlib.nullcontext()
    stay = kept_in_files(stored, joined) if named is None else dequantized_to_disk(stored)
    try:
        with loaded if in_memory else stay:
            model, info = read()
    except WrittenError:  # some families change a weight after it was read, such as the embedding of padding
        stored = StoredWeights()
        with loaded:
            model, info = read()
    source = named or folder
    for mismatch in sorted(info["mismatched_keys"]):
        # transformers 4 returns only the name, 5 also both shapes.
        name, found = (
            (mismatch, "another shape") if isinstance(mismatch, str) else (mismatch[0], f"shape {tuple(mismatch[1])}")
        )
        raise InputError(
            f"the weight {name} of {source} has {found} and its config.json asks for "
            f"{tuple(model.state_dict()[name].shape)}: one of the two is another model's"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"{source} has no weight {missing[0]!r}{f' and {len(missing) - 1} more' if missing[1:] else ''}, which "
            f"{type(model).__name__} needs: the files are incomplete, or config.json is another model's"
        )
    known = {_numberless(name) for name in model.state_dict()}
    beyond = [name for name in sorted(info["unexpected_keys"]) if _numberless(name) in known]
    if beyond:
        raise InputError(
            f"{source} has the weight {beyond[0]!r}, for which {type(model).__name__} of its config.json has no layer: "
            "one of the two is another model's"
        )
    # transformers rejects its own float() on dequantized weights, although they are float32 or float16 now.
    return torch.nn.Module.float(model).eval(), stored if next(stored.parameters(model), None) else None


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


# --- the source ---------------------------------------------------------------------------------------------------
def _source(
    name: str, model: Any, tokenizer: Any | None, opening: Opening, stored: StoredWeights | None = None
) -> Source:
    from ..graft.huggingface import HuggingFaceDecoder, freeze_rotary

    config = model.config.get_text_config()
    longest = _longest(config, tokenizer)
    context_length = opening.context_length
    context = context_of(name, longest or context_length or _UNNAMED_CONTEXT, context_length)
    freeze_rotary(model, context)
    fields = read_tokenizer(opening.tokenizer) if opening.tokenizer else _tokenizer(tokenizer, context)
    if longest is None and context_length is None:
        told = (
            f"the configuration of {name} names no context length: it gets {context:,} tokens; --context N changes it"
        )
        fields["warnings"] = (*fields.get("warnings", ()), told)
    generation = getattr(model, "generation_config", None)
    fields |= special_ids({} if generation is None else generation.to_dict(), config.to_dict())
    fields["generation"] = {} if generation is None else sampling_of(generation.to_diff_dict())
    return Source(HuggingFaceDecoder(model, stored), name, context, config=_config(config, context), **fields)


def _longest(config: Any, tokenizer: Any | None) -> int | None:
    """The context length that the configuration names, or the tokenizer's; a number far too large means none."""
    named = [getattr(config, key, None) for key in _CONTEXT] + [getattr(tokenizer, "model_max_length", None)]
    return next((n for n in named if is_int(n, 2) and n <= MOST_POSITIONS), None)


def _config(config: Any, context: int) -> dict[str, Any]:
    """config.json for transformers 4 and 5, and for transformers.js, which needs every size written out."""
    content: dict[str, Any] = config.to_dict()
    for name in ("auto_map", "quantization_config", "_name_or_path", "transformers_version"):
        content.pop(name, None)
    content |= {"max_position_embeddings": context, "dtype": "float32", "torch_dtype": "float32"}
    rope = content.get("rope_parameters")
    if isinstance(rope, dict):  # of transformers 5; 4.57 silently ignores this, and reads rope_theta and rope_scaling
        per_kind = [kind for kind in rope.values() if isinstance(kind, dict)]
        theta = next((kind["rope_theta"] for kind in (rope, *per_kind) if "rope_theta" in kind), None)
        if theta is not None:
            content.setdefault("rope_theta", theta)
        if rope.get("rope_type") in ROPE_TYPES:  # 4.57 has other rules for longrope
            content["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return content


def _tokenizer(tokenizer: Any | None, context: int) -> dict[str, Any]:
    """Returns a Source's fields from a transformers tokenizer."""
    if tokenizer is None:
        return {}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"its tokenizer is a {type(tokenizer).__name__}, which is not of the tokenizers library: convert it to a "
            "tokenizer.json and give that with --tokenizer"
        )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    config: dict[str, Any] = {
        "clean_up_tokenization_spaces": bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)),
        "model_max_length": context,
    }
    # Every named token, since a chat template may write any of them.
    config |= {key: str(token) for key, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)}
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # in a file, several named templates are a list: transformers.js reads only that
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        config["chat_template"] = template
    return {
        "tokenizer": backend.to_str().encode(),
        "tokenizer_config": config,
        "bos_token_id": bos,
        "eos_token_ids": () if eos is None else (eos,),
    }


def _without_tokens_from(end: int, tokenizer: bytes) -> bytes:
    """Returns tokenizer.json without added tokens whose ids are `end` or larger.

    transformers adds tokens that it expects of every tokenizer of a kind, such as <|endoftext|>, even if a GGUF file
    has none.
    """
    content = json.loads(tokenizer)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < end]
    return json.dumps(content, ensure_ascii=False).encode()
