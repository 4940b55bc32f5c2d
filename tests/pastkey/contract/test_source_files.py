"""What an export reads of a folder or a file, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path

from pastkey.contract.source_files import source_files


def test_a_folder_has_its_own_files_and_those_of_its_graphs_and_a_file_its_neighbours(tmp_path):
    graph = {"model.onnx", "model.onnx_data"}
    plain = {"config.json", "merges.txt"}
    for name in (
        "a.gguf",
        "b[1].gguf",
        "nohup.out",
        "log.txt",
        ".config.json",
        "onnx/model.onnx",
        "runs/a.json",
        *graph,
        *plain,
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert set(source_files(tmp_path)) == {*plain, *graph, str(Path("onnx", "model.onnx"))}
    assert set(source_files(tmp_path / "b[1].gguf")) == {"config.json", "b[1].gguf"}
    assert set(source_files(tmp_path / "model.onnx")) == {"config.json", *graph}
    assert source_files(tmp_path)["config.json"] == tmp_path / "config.json"


def test_an_adapter_has_the_files_of_its_base(tmp_path):
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    found = source_files(tmp_path / "adapter")
    assert found == {"adapter_config.json": config, "base config.json": tmp_path / "base" / "config.json"}
    config.write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "adapter")}))  # of itself
    assert set(source_files(tmp_path / "adapter")) == {"adapter_config.json"}
