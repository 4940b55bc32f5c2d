"""Exported bundles that tests share: one export needs seconds, so each is made once."""

from __future__ import annotations

import functools
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from pastkey.__main__ import main
from pastkey.contract import names
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.export import Report, export
from pastkey.files.durable import write_json
from pastkey.train.checkpoint import TOKENS_TRAIN, TOKENS_VAL, TrainingState, save_checkpoint

from .cases import CASES
from .commands import FACTORY
from .decoders import llama


@dataclass(frozen=True)
class Exported:
    """A module and the bundle that was made of it."""

    module: nn.Module
    report: Report
    bundle: Bundle

    def graph(self, *, last: bool = False) -> onnx.ModelProto:
        """The graph with its weights left in their file."""
        path = self.bundle.last_logits_graph if last else self.bundle.all_logits_graph
        return onnx.load(path, load_external_data=False)

    def weights(self) -> dict[str, npt.NDArray[np.generic]]:
        """The initializers of the all-logits graph by name."""
        model = onnx.load(self.bundle.all_logits_graph)
        return {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}

    def torch_logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """(T, V): the module as its author runs it."""
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return self.module.eval()(torch.tensor([ids]), torch.arange(len(ids))[None])[0].numpy()


@pytest.fixture(scope="session", autouse=True)
def short(short_exports):
    """Exports of these tests are short."""


@pytest.fixture(scope="session")
def word_tokenizer():
    """A tokenizer of as many words as `llama` has embeddings; the last one ends a text."""
    vocabulary = {f"w{i}": i for i in range(60)} | {"<end>": 60}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def saved_untrained(folder: Path, tokenizer: Tokenizer, **sizes: Any) -> Path:
    """A checkpoint folder as `pastkey train` writes it, of an untrained decoder."""
    (folder / "training").mkdir(parents=True)
    tokenizer.save(str(folder / names.TOKENIZER))
    write_json(folder / names.TOKENIZER_CONFIG, {"eos_token": "<end>", "bos_token": None})
    for name in (TOKENS_TRAIN, TOKENS_VAL):
        (folder / name).write_bytes(b"\0\0")
    save_checkpoint(folder, llama(eos_token_id=60, **sizes), TrainingState(0, {}, {}, {}, {}))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, word_tokenizer):
    return saved_untrained(tmp_path_factory.mktemp("trained") / "checkpoint", word_tokenizer)


@pytest.fixture(scope="session")
def exported(made_once, tmp_path_factory):
    """exported(NAME, precision, graph): a case of the table, exported once for all processes that run the tests.

    Each has a copy: some write a graph next to the bundle's for a moment.
    """

    @functools.cache
    def make(name: str, precision: str = "fp32", graph: str = "auto") -> Exported:
        case = CASES[name]
        module = case.build()

        def fill(folder: Path) -> None:
            options: Any = {"precision": precision, "graph": graph, "context_length": case.context}
            report = export(case.build(), folder / "bundle", **options)
            (folder.parent / f"{folder.name}.report").write_bytes(pickle.dumps(report))

        folder = made_once(f"{name}-{precision}-{graph}", fill)
        report = pickle.loads((folder.parent / f"{folder.name}.report").read_bytes())
        bundle = shutil.copytree(folder / "bundle", tmp_path_factory.mktemp(name) / "bundle")
        return Exported(module, report, open_bundle(bundle, verify=False))

    return make


@pytest.fixture(scope="session")
def saved_llama(tmp_path_factory):
    """A Llama's folder with a tokenizer. Shared: copy it before changing it."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from .tiny_llama import TEMPLATE, bpe, llama

    folder = tmp_path_factory.mktemp("saved") / "tiny-llama"
    llama().save_pretrained(folder)
    tokenizer = bpe(bos=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def llama_folder(saved_llama, tmp_path):
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(saved_llama, tmp_path / "tiny-llama"))


# --- commands ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def factory(tmp_path_factory):
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(FACTORY)
    return file


@pytest.fixture(scope="session")
def trained(checkpoint):
    """The checkpoint's int8 bundle."""
    out = checkpoint.parent / "bundle"
    assert main(["export", str(checkpoint), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def small(factory):
    """The fp32 bundle of the factory's module."""
    out = factory.parent / "small"
    assert main(["export", f"{factory}:Small", "--context", "12", "--precision", "fp32", "--out", str(out)]) == 0
    return out
