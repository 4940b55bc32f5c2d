"""The search over mixtures of precisions, on made-up ones: which are tried, and where it ends."""

from __future__ import annotations

import json

import pytest

from pastkey.contract.bundle import Bundle, CacheShift, Manifest
from pastkey.errors import QualityError
from pastkey.export.quantize import search as module
from pastkey.export.quantize.calibrate.calibration import CalibrationText
from pastkey.export.quantize.ranking.sensitivity import MatrixCost, Sensitivity
from pastkey.precisions import PRECISIONS

BUNDLE = Manifest("0", "fake", "int8", "cpu", "fused", "", 1, 2, (), 20, 10, "1", CacheShift())


class Mixtures:
    """Of ten matrices, `start` of which are raised at first: the table asks for `asked` of them."""

    precision = "int8"
    sensitivity = Sensitivity(1.0, (), tuple("abcdefghij"))

    def __init__(self, asked, start):
        self.asked, self.start = asked, start

    def model(self, raised):
        return raised

    def quality(self, raised):
        return {"raised": raised}

    def asked_for(self):
        return self.asked

    def most(self):
        return 9


@pytest.mark.parametrize(
    ("asked", "enough", "start", "max_kl", "tried"),
    [
        (5, 9, 0, None, [0]),  # without a budget, the first is chosen
        (5, 0, 0, 0.5, [0]),  # the first keeps within
        (5, 5, 0, 0.5, [0, 5]),  # then what the table asks for
        (2, 6, 0, 0.5, [0, 2, 3, 5, 9]),  # then one more, two more, four more, and never more than there may be
        (3, 5, 3, 0.5, [3, 4, 6]),  # the table was there before
        (5, 10, 0, 0.5, [0, 5, 6, 8, 9]),  # no mixture keeps within
    ],
)
def test_the_next_mixture_follows_the_table_and_then_ever_larger_steps(
    asked, enough, start, max_kl, tried, tmp_path, monkeypatch
):
    found = list[int]()

    def write(raised):
        graph = tmp_path / PRECISIONS["int8"].graph
        graph.parent.mkdir()  # fails where the last round was left
        graph.touch()
        found.append(raised)
        return Bundle(tmp_path, BUNDLE), 7

    def measured(*_):
        return {"kl_divergence": 0.1 if found[-1] >= enough else 1.0}

    monkeypatch.setattr(module, "measured", measured)
    arguments = Mixtures(asked, start), Bundle(tmp_path, BUNDLE), CalibrationText("own", (), ()), write, max_kl
    if enough == 10:
        with pytest.raises(QualityError, match=r"with 9 of 10 matrices in fp32, over --max-kl 0\.5 by 0\.5"):
            module.search(*arguments)
    else:
        made = module.search(*arguments)
        assert made.quality == {"kl_divergence": 1.0 if max_kl is None else 0.1, "raised": tried[-1]}
        assert made.weight_bytes == 7
    assert found == tried


# --- the file of --sensitivity ----------------------------------------------------------------------------------------
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
        "weight": TABLE.rows[0].weight, "shape": [80, 48], "kl_divergence": 0.004, "top1_agreement": 0.97,
        "share": 0.3, "matmul": True,
    }  # fmt: skip
