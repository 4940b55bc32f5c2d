"""The files that an export reads of its source. They tell a source from a changed one."""

from __future__ import annotations

import glob
from pathlib import Path

from . import names

_READ = ("[!.]*", "onnx/*", "additional_chat_templates/*")  # of a folder
_BESIDE_GGUF = (names.CONFIG, names.TOKENIZER, names.TOKENIZER_CONFIG, names.CHAT_TEMPLATE)


def source_files(source: Path) -> dict[str, Path]:
    """Returns the files that an export reads of a folder, or of a file and its neighbours, by their relative names."""
    folder, patterns = source, list(_READ)
    if not source.is_dir():
        folder, patterns = source.parent, [glob.escape(source.name), *_BESIDE_GGUF]
    read = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    return {str(file.relative_to(folder)): file for file in read}
