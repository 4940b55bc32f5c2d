"""The search over mixtures of precisions, on made-up ones: which are tried, and where it ends."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from pastkey.contract.bundle import Bundle, CacheShift, Manifest
from pastkey.errors import InputError, QualityError
from pastkey.export.quantize import search as module
from pastkey.export.quantize.calibrate.calibration import CalibrationText
from pastkey.export.quantize.ranking.sensitivity import MatrixCost, Sensitivity
from pastkey.export.quantize.report import check_report_file
from pastkey.export.quantize.search import Quantized, search
from pastkey.precisions import PRECISIONS

TEXT = CalibrationText("own", (), ())


class Fake:
    """Mixtures of ten matrices: the table asks for `asked` of them, and the bundle keeps within from `enough` on."""

    precision = "int8"
    sensitivity = Sensitivity(1.0, (), tuple("abcdefghij"))

    def __init__(self, asked: int, enough: int, start: int = 0) -> None:
        self.start, self._asked, self._enough = start, asked, enough
        self.tried: list[int] = []

    def model(self, raised: int) -> Any:
        self.tried.append(raised)
        return raised

    def quality(self, raised: int) -> dict[str, Any]:
        return {"raised": raised}

    def asked_for(self) -> int:
        return self._asked

    def most(self) -> int:
        return 9

    def search(self, folder: Path, monkeypatch: pytest.MonkeyPatch, max_kl: float | None = 0.5) -> Quantized:
        manifest = Manifest("0", "fake", "int8", "cpu", "fused", "", 1, 2, (), 20, 10, "1", CacheShift())
        bundle = Bundle(folder, manifest)

        def write(model: ir.Model) -> tuple[Bundle, int]:
            graph = folder / PRECISIONS["int8"].graph
            graph.parent.mkdir()  # fails where the last round was left
            graph.touch()
            return bundle, 7

        monkeypatch.setattr(
            module, "measured", lambda *_: {"kl_divergence": 0.1 if self.tried[-1] >= self._enough else 1.0}
        )
        return search(self, bundle, TEXT, write, max_kl)


def test_without_a_budget_the_first_mixture_is_taken(tmp_path, monkeypatch):
    fake = Fake(asked=5, enough=9)
    assert fake.search(tmp_path, monkeypatch, None).quality == {"kl_divergence": 1.0, "raised": 0}
    assert fake.tried == [0]


@pytest.mark.parametrize(
    ("asked", "enough", "start", "tried"),
    [
        (5, 0, 0, [0]),  # the first keeps within
        (5, 5, 0, [0, 5]),  # then what the table asks for
        (2, 6, 0, [0, 2, 3, 5, 9]),  # then one more, two more, four more, and never more than there may be
        (3, 5, 3, [3, 4, 6]),  # the table was there before
    ],
)
def test_the_next_mixture_follows_the_table_and_then_ever_larger_steps(
    asked, enough, start, tried, tmp_path, monkeypatch
):
    fake = Fake(asked, enough, start)
    found = fake.search(tmp_path, monkeypatch)
    assert fake.tried == tried
    assert found.quality == {"kl_divergence": 0.1, "raised": tried[-1]}
    assert found.weight_bytes == 7


def test_a_budget_that_no_mixture_meets_is_refused(tmp_path, monkeypatch):
    fake = Fake(asked=5, enough=10)
    with pytest.raises(QualityError, match=r"with 9 of 10 matrices in fp32, over --max-kl 0\.5 by 0\.5"):
        fake.search(tmp_path, monkeypatch)
    assert fake.tried[-1] == 9


# --- the file of --sensitivity: what it holds, and which names are refused before the work ----------------------------
TABLE = Sensitivity(
    0.01,
    (
        MatrixCost("model.layers.1.mlp.down_proj.weight", (80, 48), 0.004, 0.97, 0.3, matmul=True),
        MatrixCost("model.embed_tokens.weight", (61, 48), 0.0, 1.0, 0.1, matmul=False),
    ),
)


def test_the_table_is_json():
    content = json.loads(json.dumps(TABLE.to_json()))
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


REFUSED = {
    "folder.json": (InputError, "is a folder"),
    "nowhere/table.json": (InputError, r"cannot be written there \(No such file or directory\)"),
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
