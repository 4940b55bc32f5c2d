"""What an export reads of a folder or a file, and what it does not."""

from __future__ import annotations

from pathlib import Path

from pastkey.contract.source_files import source_files


def test_a_folder_has_its_own_files_and_those_of_its_graphs_and_a_file_its_neighbours(tmp_path: Path) -> None:
    for name in ("a.gguf", "b[1].gguf", "config.json", "tokenizer.json", ".hidden", "onnx/model.onnx", "runs/log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    plain = {"a.gguf", "b[1].gguf", "config.json", "tokenizer.json"}
    assert set(source_files(tmp_path)) == {*plain, str(Path("onnx", "model.onnx"))}
    assert set(source_files(tmp_path / "b[1].gguf")) == plain - {"a.gguf"}
    assert source_files(tmp_path)["config.json"] == tmp_path / "config.json"
