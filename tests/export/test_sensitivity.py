"""What each matrix costs in int8: one graph with gates, against graphs that were quantized in the plain way."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from pastkey import names
from pastkey.bundle import Bundle
from pastkey.errors import InputError, MissingFileError, QualityError
from pastkey.export.calibrate import probing
from pastkey.export.chart import place
from pastkey.export.evaluate import kl_divergence, top1_agreement
from pastkey.export.gates import GATES, add_gates, gates
from pastkey.export.int4 import rounded
from pastkey.export.quantize import quantize
from pastkey.export.sensitivity import Row, Sensitivity, sensitivity
from pastkey.export.tables import check_tables, write_table

from .conftest import Export

Logits = npt.NDArray[np.float32]
# A tied table; products with a bias and a softcap; a matrix that is used five times; plain norms.
DECODERS = ["llama", "softcap_bias_and_scale", "one_block_five_times", "nano_gpt"]


def windows_of(bundle: Bundle) -> list[npt.NDArray[np.int64]]:
    """Two of unlike length (T,)."""
    rng = np.random.default_rng(0)
    length = bundle.manifest.context_length
    return [rng.integers(0, bundle.manifest.vocab_size, size) for size in (length, length - 3)]


def logits_of(bundle: Bundle, ids: npt.NDArray[np.int64], int8: set[str] | None = None) -> Logits:
    """(T, V) of the float32 graph, or of one in which only those matrices are quantized, in the plain way."""
    model = ir.load(bundle.common_graph)
    if int8 is not None:
        quantize(model, set(model.graph.initializers) - int8)
    with probing(model, bundle.common_graph.parent, [names.LOGITS]) as probe:
        return probe(ids)[names.LOGITS]


@pytest.mark.parametrize("name", DECODERS)
def test_every_mixture_is_the_graph_that_is_quantized_so(name: str, exported: Export) -> None:
    bundle = exported(name).bundle
    ids = windows_of(bundle)[0]
    model = ir.load(bundle.common_graph)
    matrices = add_gates(model)
    every = [matrix.weight for matrix in matrices]
    with probing(model, bundle.common_graph.parent, [names.LOGITS]) as probe:
        found = {
            chosen: probe(ids, {GATES: gates(matrices, chosen)})[names.LOGITS]
            for chosen in ((), tuple(every), *((weight,) for weight in every))
        }
    exact = logits_of(bundle, ids)
    np.testing.assert_allclose(found[()], exact, rtol=0, atol=1e-6 * np.abs(exact).max())
    for chosen, logits in found.items():
        expected = logits_of(bundle, ids, set(chosen))
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(exact).max())
        assert chosen == () or np.abs(logits - exact).max() > 2e-5 * np.abs(exact).max() or "position" in chosen[0]


@pytest.mark.parametrize("name", DECODERS)
def test_the_table_says_what_each_matrix_costs(name: str, exported: Export) -> None:
    bundle = exported(name).bundle
    windows = windows_of(bundle)
    found = sensitivity(ir.load(bundle.common_graph), bundle.common_graph.parent, windows)
    exact = np.concatenate([logits_of(bundle, ids) for ids in windows])
    every = {row.weight for row in found.rows}
    for row in (found.rows[0], found.rows[-1]):
        alone = np.concatenate([logits_of(bundle, ids, {row.weight}) for ids in windows])
        assert row.kl_divergence == pytest.approx(kl_divergence(exact, alone), rel=1e-2, abs=1e-10)
        assert row.top1_agreement == pytest.approx(top1_agreement(exact, alone))
    whole = np.concatenate([logits_of(bundle, ids, every) for ids in windows])
    assert found.kl_divergence == pytest.approx(kl_divergence(exact, whole), rel=1e-3)
    costs = [row.kl_divergence for row in found.rows]
    assert costs == sorted(costs, reverse=True)
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    stored = {weight: array.shape for weight, array in exported(name).weights().items()}
    assert {row.weight: row.shape for row in found.rows} == {weight: stored[weight] for weight in every}
    assert every == {weight for weight, shape in stored.items() if len(shape) == 2 and weight not in ("cos", "sin")}
    assert not list(bundle.common_graph.parent.glob("probe*"))


def test_only_tables_that_are_gathered_and_nothing_else_are_no_products(exported: Export) -> None:
    for name, gathered in (("llama", set()), ("nano_gpt", {"wpe.weight"})):
        bundle = exported(name).bundle
        found = sensitivity(ir.load(bundle.common_graph), bundle.common_graph.parent, windows_of(bundle))
        assert {row.weight.rpartition("transformer.")[2] for row in found.rows if not row.product} == gathered


def test_a_budget_keeps_the_fewest_of_the_worst_products(exported: Export) -> None:
    bundle = exported("llama").bundle
    windows, folder = windows_of(bundle), bundle.common_graph.parent
    plain = sensitivity(ir.load(bundle.common_graph), folder, windows)
    budget = plain.kl_divergence / 3
    kept = sensitivity(ir.load(bundle.common_graph), folder, windows, budget).keep
    assert kept == plain.worst(len(kept))
    exact = np.concatenate([logits_of(bundle, ids) for ids in windows])

    def left(count: int) -> float:
        int8 = {row.weight for row in plain.rows} - set(plain.worst(count))
        return kl_divergence(exact, np.concatenate([logits_of(bundle, ids, int8) for ids in windows]))

    assert left(len(kept)) <= budget < left(len(kept) - 1)
    assert sensitivity(ir.load(bundle.common_graph), folder, windows, plain.kl_divergence * 1.01).keep == ()


def test_a_budget_below_what_the_embeddings_cost_keeps_them_too(exported: Export) -> None:
    bundle = exported("nano_gpt").bundle
    windows, folder = windows_of(bundle), bundle.common_graph.parent
    plain = sensitivity(ir.load(bundle.common_graph), folder, windows)
    gathered = {row.weight: row.kl_divergence for row in plain.rows if not row.product}
    found = sensitivity(ir.load(bundle.common_graph), folder, windows, min(gathered.values()) / 2)
    assert set(gathered) <= set(found.keep)
    assert len(found.keep) < len(found.ranking) == len(plain.rows)
    with pytest.raises(QualityError, match=r"with 5 of 6 matrices in float32, over --max-kl 1e-12 by \d"):
        sensitivity(ir.load(bundle.common_graph), folder, windows, 1e-12)


def test_int4_cannot_get_below_what_int8_embeddings_cost(exported: Export) -> None:
    bundle = exported("nano_gpt").bundle
    windows, folder = windows_of(bundle), bundle.common_graph.parent
    int4 = rounded(ir.load(bundle.common_graph), folder, windows)
    with pytest.raises(QualityError, match=r"of \d+ matrices in float32, over --max-kl 1e-12 by \d"):
        sensitivity(ir.load(bundle.common_graph), folder, windows, 1e-12, int4=int4)


# --- files --------------------------------------------------------------------------------------------------------
def a_table(layers: int = 30) -> Sensitivity:
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
    rng = np.random.default_rng(0)
    rows = [
        Row(f"model.layers.{layer}.{kind}.weight", (8, 8), float(rng.lognormal(-9, 2)), 0.9, 0.01, product=True)
        for layer in range(layers)
        for kind in kinds
    ]
    rows.append(Row("model.embed_tokens.weight", (61, 8), 0.0, 1.0, 0.1, product=False))
    return Sensitivity(0.01, tuple(sorted(rows, key=lambda row: -row.kl_divergence)))


def test_the_table_as_json(tmp_path: Path) -> None:
    table, file = a_table(), tmp_path / "table.json"
    write_table(file, table)
    content = json.loads(file.read_text())
    assert content["kl_divergence"] == 0.01
    assert [row["weight"] for row in content["matrices"]] == [row.weight for row in table.rows]
    assert set(content["matrices"][0]) == {"weight", "shape", "kl_divergence", "top1_agreement", "share", "product"}


@pytest.mark.parametrize(
    "table",
    [
        a_table(),
        a_table(1),
        Sensitivity(0.1, (Row("head", (2, 2), 0.1, 1.0, 1.0, product=True),)),
        Sensitivity(0.0, (Row("layers.0.up.weight", (2, 2), 0.0, 1.0, 1.0, product=True),)),
    ],
    ids=["thirty_layers", "one_layer", "no_layer", "no_cost"],
)
def test_the_table_as_a_chart(table: Sensitivity, tmp_path: Path) -> None:
    from matplotlib.image import imread

    file = tmp_path / "table.png"
    file.write_text("an older one")
    write_table(file, table)
    image = imread(file)
    assert min(image.shape[:2]) > 400
    assert image.std() > 0.01
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (3, "q_proj")),
        ("model.layers.12.mlp.up_proj.weight.scaled_0", (12, "up_proj")),
        ("blocks.0.o.weight", (0, "o")),
        ("h.4.mlp.2.weight", (4, "mlp.2")),
        ("head.weight", None),
    ],
)
def test_a_name_says_layer_and_kind(weight: str, expected: Any) -> None:
    assert place(weight) == expected


@pytest.mark.parametrize(
    ("file", "kind", "words"),
    [
        ("table.csv", InputError, r"a name that ends in \.json or \.png was expected"),
        ("table", InputError, r"a name that ends in \.json or \.png was expected"),
        ("folder.json", InputError, "is a folder"),
        ("nowhere/table.png", MissingFileError, "there is no folder"),
    ],
)
def test_files_that_cannot_be_written_are_refused(file: str, kind: type[Exception], words: str, tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(kind, match=words):
        check_tables([tmp_path / "fine.json", tmp_path / file], "int8", tmp_path / "bundle", [])
    assert [path.name for path in tmp_path.iterdir()] == ["folder.json"]


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(**where: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(where["dir"]))

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with pytest.raises(InputError, match=r"table\.json cannot be written there \(Permission denied\): choose another"):
        check_tables([tmp_path / "table.json"], "int8", tmp_path / "bundle", [])


def test_a_table_over_what_is_exported_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    read = [tmp_path / "checkpoint", str(tmp_path / "tokenizer.json"), None]
    for file in ("checkpoint/config.json", "tokenizer.json"):
        with pytest.raises(InputError, match="is part of what is to be exported: choose another name"):
            check_tables([tmp_path / file], "int8", tmp_path / "bundle", read)


def test_a_file_of_a_like_name_stays(tmp_path: Path) -> None:
    like = tmp_path / "table.json.new"
    like.write_text("precious")
    [path] = check_tables([tmp_path / "table.json"], "int8", tmp_path / "bundle", [])
    write_table(path, a_table())
    assert like.read_text() == "precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["table.json", "table.json.new"]


def test_a_table_inside_the_bundle_that_is_replaced_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bundle" / "deep").mkdir(parents=True)
    for file in ("bundle/table.json", "bundle/deep/table.png", "bundle/deep/../table.json"):
        with pytest.raises(InputError, match="which is replaced: put it beside that"):
            check_tables([tmp_path / file], "int8", tmp_path / "bundle", [])
