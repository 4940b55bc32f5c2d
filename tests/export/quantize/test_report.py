"""The file of --sensitivity: what it holds, and which names are refused before the work."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest

from pastkey.errors import InputError, MissingFileError
from pastkey.export.quantize.ranking.sensitivity import Row, Sensitivity
from pastkey.export.quantize.report import check_report_file, write_report

TABLE = Sensitivity(
    0.01,
    (
        Row("model.layers.1.mlp.down_proj.weight", (80, 48), 0.004, 0.97, 0.3, matmul=True),
        Row("model.embed_tokens.weight", (61, 48), 0.0, 1.0, 0.1, matmul=False),
    ),
)


@pytest.mark.parametrize("name", ["table.json", "TABLE.JSON"])
def test_the_table_as_json_replaces_an_older_one(name, tmp_path):
    file = tmp_path / name
    file.write_text("an older one")
    check_report_file(file, tmp_path / "bundle", [])
    write_report(file, TABLE)
    content = json.loads(file.read_text())
    assert content["kl_divergence"] == 0.01
    assert [row["weight"] for row in content["matrices"]] == [row.weight for row in TABLE.rows]
    assert content["matrices"][0] == {
        "weight": "model.layers.1.mlp.down_proj.weight",
        "shape": [80, 48],
        "kl_divergence": 0.004,
        "top1_agreement": 0.97,
        "share": 0.3,
        "matmul": True,
    }
    assert list(tmp_path.iterdir()) == [file]


REFUSED = {
    "table.csv": (InputError, r"a name that ends in \.json"),
    "folder.json": (InputError, "is a folder"),
    "nowhere/table.json": (MissingFileError, "does not exist"),
    "checkpoint/config.json": (InputError, "is part of what is to be exported"),
    "tokenizer.json": (InputError, "is part of what is to be exported"),
    "bundle/table.json": (InputError, "which is replaced"),
    "bundle/deep/table.JSON": (InputError, "which is replaced"),
    "bundle/deep/../table.json": (InputError, "which is replaced"),
}


@pytest.mark.parametrize("file", REFUSED)
def test_a_place_for_the_table_is_refused_before_the_work(file, tmp_path):
    for folder in ("folder.json", "checkpoint", "bundle/deep"):
        (tmp_path / folder).mkdir(parents=True)
    kind, words = REFUSED[file]
    read = [tmp_path / "checkpoint", str(tmp_path / "tokenizer.json"), None]
    with pytest.raises(kind, match=words):
        check_report_file(tmp_path / file, tmp_path / "bundle", read)


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, monkeypatch):
    def denied(**where: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(where["dir"]))

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with pytest.raises(InputError, match=r"table\.json cannot be written there \(Permission denied\): choose another"):
        check_report_file(tmp_path / "table.json", tmp_path / "bundle", [])


def test_a_file_of_a_like_name_stays(tmp_path):
    like = tmp_path / "table.json.new"
    like.write_text("precious")
    write_report(tmp_path / "table.json", TABLE)
    assert like.read_text() == "precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["table.json", "table.json.new"]
