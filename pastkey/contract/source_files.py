"""The files that an export reads of its source. They tell a source from a changed one."""

from __future__ import annotations

import glob
from pathlib import Path

from . import names

# Of a folder. It may hold other files that change, such as a log of this export.
_ENDINGS = (".json", ".safetensors", ".jinja", ".model", ".tiktoken", ".py", ".onnx*")
_READ = (*(f"[!.]*{end}" for end in _ENDINGS), "vocab.txt", "merges.txt", "onnx/*", "additional_chat_templates/*")
_BESIDE_GGUF = (names.CONFIG, names.TOKENIZER, names.TOKENIZER_CONFIG, names.CHAT_TEMPLATE)


def source_files(source: Path) -> dict[str, Path]:
    """Returns the files that an export reads of a folder, or of a file and its neighbours, by their relative names."""
    folder, patterns = source, list(_READ)
    if not source.is_dir():
        folder, patterns = source.parent, [f"{glob.escape(source.name)}*", *_BESIDE_GGUF]  # *: an ONNX graph's data
    read = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    return {str(file.relative_to(folder)): file for file in read}
