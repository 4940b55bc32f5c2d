"""What `--generate` writes is proved against the runtime, or refused."""

from __future__ import annotations

import pytest

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError, ParityError
from pastkey.export import export
from pastkey.export.generation import write
from pastkey.export.settings import ExportConfig

from ..decoders import Plain, llama


def test_a_graph_that_says_something_else_is_not_kept(tmp_path, monkeypatch):
    settings = write.settings

    def other_seed(*given):
        return settings(*given) | {"seed": settings(*given)["seed"] + 1}

    monkeypatch.setattr(write, "settings", other_seed)
    with pytest.raises(ParityError, match=r"generate\.onnx gives other ids than pastkey's runtime from new token"):
        export(llama(), tmp_path / "bundle", precision="fp32", context_length=40, generate=True)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_what_is_not_made_is_said(tmp_path):
    module = Plain(value_size=16, layers=2)
    report = export(module, tmp_path / "bundle", precision="fp32", context_length=40, generate=True)
    (said,) = (warning for warning in report.warnings if "generate_step" in warning)
    assert "is not made: its keys and values differ in shape from layer to layer" in said
    assert names.GENERATE_GRAPH in open_bundle(tmp_path / "bundle").manifest.files


def test_nothing_is_written_unless_it_is_asked_for(exported):
    assert not [*(exported("llama").bundle.path / "onnx").glob("generate*")]


@pytest.mark.parametrize(
    ("option", "words"),
    [({"target": "qnn"}, "--target qnn"), ({"target": "webgpu"}, "--target webgpu"), ({"graph": "static"}, "a static")],
)
def test_what_runs_no_loop_is_refused_before_the_work(option, words):
    with pytest.raises(InputError, match=f"--generate and {words}.* exclude each other"):
        ExportConfig(precision="fp32", context_length=40, generate=True, **option)
