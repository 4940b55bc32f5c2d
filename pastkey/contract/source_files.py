"""The files that an export reads of its source. They tell a source from a changed one."""

from __future__ import annotations

import glob
from pathlib import Path

from ..files.folder import read_json
from . import names

# Of a folder. It may hold other files that change, such as a log of this export.
_ENDINGS = (".json", ".safetensors", ".jinja", ".model", ".tiktoken", ".py", ".onnx*")
_READ = (*(f"[!.]*{end}" for end in _ENDINGS), "vocab.txt", "merges.txt", "onnx/*", "additional_chat_templates/*")
_BESIDE_GGUF = (names.CONFIG, names.TOKENIZER, names.TOKENIZER_CONFIG, names.CHAT_TEMPLATE)


def source_files(source: Path) -> dict[str, Path]:
    """Returns the files that an export reads of a folder, or of a file and its neighbours, by their relative names.

    Of an adapter these are also the files of its base.
    """
    folder, patterns = source, list(_READ)
    if not source.is_dir():
        folder, patterns = source.parent, [f"{glob.escape(source.name)}*", *_BESIDE_GGUF]  # *: an ONNX graph's data
    read = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    found = {str(file.relative_to(folder)): file for file in read}
    base = adapter_base(source)
    if base is not None and Path(base).exists() and adapter_base(Path(base)) is None:
        found |= {f"base {name}": file for name, file in source_files(Path(base)).items()}
    return found


def adapter_base(folder: Path) -> str | None:
    """Returns the path or Hub id that a folder of peft names as its base, None for any other folder or file."""
    file = folder / names.ADAPTER_CONFIG
    return str(read_json(file).get("base_model_name_or_path")) if file.is_file() else None
