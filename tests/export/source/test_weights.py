"""Weights of a file find their places in a module, or the sentence says which does not."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Opening
from pastkey.export.source.weights import load_weights

from ..decoders import Plain
from .opening import Runs


@dataclasses.dataclass
class Settings:
    layers: int = 2
    where: Path = Path("a")


class Net(nn.Module):
    def __init__(self, width: int = 4, tied: bool = True, mask: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, width)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.head = nn.Linear(width, 8, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(mask, mask).tril())
        self.register_buffer("scratch", torch.rand(3), persistent=False)


def trained() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: tensor.clone() for name, tensor in Net().state_dict().items()}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def without(name: str) -> dict[str, Tensor]:
    return {other: tensor for other, tensor in trained().items() if other != name}


def saved(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "state.pt")
    return folder / "state.pt"


def loaded(module: nn.Module, file: Path) -> list[str]:
    """All that was said."""
    told: list[str] = []
    return [*load_weights(module, file, told.append), *told]


def refused(module: nn.Module, file: Path) -> str:
    with pytest.raises((InputError, IntegrityError)) as caught:
        loaded(module, file)
    return str(caught.value)


def same(module: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())


def test_safetensors_are_no_pickle_which_is_named_and_a_missing_tied_weight_is_the_other_one(tmp_path):
    net, file = Net(), tmp_path / "state.safetensors"
    save_file(without("head.weight"), file)
    assert loaded(net, file) == [f"4 weights of {file} were loaded"]
    assert same(net, trained())
    file = saved(trained(), tmp_path)
    told = f"{file} is a pickle, read by torch.load(weights_only=True), which runs no code of it"
    assert loaded(Net(), file) == [f"5 weights of {file} were loaded", told]


STATE = trained()
WRAPPED = {name.replace("layers.", "layers._orig_mod."): tensor for name, tensor in STATE.items()}
OTHERS = {"config": Settings(), "args": argparse.Namespace(a=1), "loss": np.float64(2.5)}
SEARCHED: dict[str, tuple[Any, str]] = {
    "model": ({"model": STATE, "step": 3}, ", under 'model'"),
    "lightning": ({"state_dict": prefixed(STATE, "model.")}, ", under 'state_dict', without 'model.' in"),
    "deep": ({"a": {"b": {"c": STATE}}}, ", under 'a.b.c'"),
    "compiled": (prefixed(STATE, "_orig_mod."), ", without '_orig_mod.' in their names"),
    "parallel": (prefixed(STATE, "module._orig_mod."), ", without '_orig_mod.' and 'module.' in their names"),
    "prefix": (prefixed(STATE, "net.decoder."), ", without 'net.decoder.' in their names"),
    "two": ({"model": STATE, "ema": STATE}, ", under 'model' ('ema' would also fit)"),
    "optimizer": ({"optimizer": {"state": {0: {"exp_avg": STATE["embed.weight"]}}}, "model": STATE}, ", under 'model'"),
    "compiled layers": ({"model": WRAPPED}, "'_orig_mod.'"),
    "other classes": ({"model": STATE} | OTHERS, ""),
    "outside the prefix": (
        prefixed(STATE, "net.") | {"loss.weight": torch.rand(3)},
        "1 that the module has no place for",
    ),
}


@pytest.mark.parametrize("name", SEARCHED)
def test_a_checkpoint_is_searched_and_its_names_are_made_to_fit(name, tmp_path):
    content, words = SEARCHED[name]
    net = Net()
    assert words in loaded(net, saved(content, tmp_path))[0]
    assert same(net, trained())


def test_a_module_within_a_wrapper_of_its_own_gets_the_names_of_the_wrapper(tmp_path):
    net = nn.ModuleDict({"model": Net()})
    assert "with 'model.' in front of their names" in loaded(net, saved(trained(), tmp_path))[0]
    assert same(net["model"], trained())


def test_half_precision_becomes_the_modules_own(tmp_path):
    net = Net()
    halves = {name: tensor.bfloat16() for name, tensor in trained().items()}
    loaded(net, saved(halves, tmp_path))
    assert net.embed.weight.dtype == torch.float32
    assert same(net, {"embed.weight": halves["embed.weight"].float()})


def angles(kind: Any) -> Tensor:
    return kind(torch.outer(torch.arange(9.0), 10 ** (-torch.arange(4.0) / 3)))


TABLES = {
    "tril": torch.ones(1, 1, 5, 5).tril(),
    "positions": torch.arange(5),
    "complex": torch.polar(torch.ones(4), torch.arange(4.0)),
    "frequencies": 10000 ** (-torch.arange(0, 8, 2) / 8),
    "cos": angles(torch.cos),
    "sin": angles(torch.sin)[None, :, None],
    "sinusoids": torch.stack([angles(torch.sin), angles(torch.cos)], -1).flatten(1),
    "not saved": torch.rand(3),
}
WEIGHTS = {
    "bias": torch.rand(4),
    "matrix": torch.rand(4, 4),
    "scalar": torch.tensor(0.5),
    "zeros": torch.zeros(4),
    "ones": torch.ones(4),
    "embedding": torch.cat([torch.zeros(1, 4), torch.rand(8, 4) * 0.1]),  # as padding_idx=0 leaves it
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_code_makes_is_left_out_and_said(table, tmp_path):
    name = "scratch" if table == "not saved" else "layers.0.bias"
    net = Net()
    sentence, _ = loaded(net, saved(trained() | {name: TABLES[table]}, tmp_path))
    assert f"; 1 that the module has no place for were left out ({name})" in sentence
    assert same(net, trained())


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_weight_that_would_be_lost_is_refused(weight, tmp_path):
    file = saved(trained() | {"layers.0.bias": WEIGHTS[weight], "more": torch.rand(2, 2)}, tmp_path)
    assert "layers.0.bias, for which the module has no place: 5 of its 7 weights fit" in refused(Net(), file)


REFUSED: dict[str, tuple[nn.Module, Any, str]] = {
    "a weight less": (Net(), without("layers.1.weight"), "lacks layers.1.weight: 4 of its 4 weights fit"),
    "no head": (Net(tied=False), without("head.weight"), "lacks head.weight"),
    "another shape": (Net(width=6), trained(), r"embed.weight is of shape \(8, 4\) in .* and of shape \(8, 6\) in the"),
    "a head of its own": (Net(), trained() | {"head.weight": torch.rand(8, 4)}, "embed.weight and head.weight differ"),
    "another module": (Net(), {"encoder.w": torch.rand(2)}, "it has encoder.w and the module embed.weight"),
    "no tensor": (Net(), {"step": 3}, "holds no state dict"),
    "a list": (Net(), [1, 2], "holds no state dict"),
    "a whole module": (Net(), Net(), "holds no state dict"),
}


@pytest.mark.parametrize("spoilt", REFUSED)
def test_weights_that_do_not_fit_are_refused_by_name(spoilt, tmp_path):
    module, content, word = REFUSED[spoilt]
    assert re.search(word, refused(module, saved(content, tmp_path)))


def test_buffers_may_be_missing_and_masks_may_be_for_another_context(tmp_path):
    net = Net(mask=3)
    assert "; 1 buffer stayed as the module makes them (mask)" in loaded(net, saved(trained(), tmp_path))[0]
    assert same(net, {"mask": torch.ones(3, 3).tril()})
    net = Net()
    assert "1 buffer stayed" in loaded(net, saved(without("mask"), tmp_path))[0]
    assert same(net, trained())


def test_files_that_are_no_weights_are_told(tmp_path):
    cut = saved(trained(), tmp_path).read_bytes()[:200]
    for name, content, words in (
        ("a.safetensors", b"nothing", "cannot be read as safetensors"),
        ("a.pt", b"nothing", "torch.load(weights_only=True) cannot read"),
        ("cut.pt", cut, "torch.load(weights_only=True) cannot read"),
        (".", None, "is a folder; a file of weights was expected"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert words in refused(Net(), tmp_path / name)
    with pytest.raises(MissingFileError, match=r"no such file: .*none.pt"):
        loaded(Net(), tmp_path / "none.pt")


def test_no_code_of_a_pickle_is_run(tmp_path):
    net, target = Net(), tmp_path / "evil"
    loaded(net, saved({"model": trained(), "extra": Runs(eval, f"open({str(target)!r}, 'w')")}, tmp_path))
    assert same(net, trained())
    for evil, words in ((Runs(os.system, f"touch {target}"), "system"), (Runs(Path.touch, target), "unrecognized")):
        sentence = refused(Net(), saved({"model": trained(), "extra": evil}, tmp_path))
        assert words in sentence
        assert "save only model.state_dict()" in sentence
        assert "False" not in sentence
    assert not target.exists()


# --- with a source --------------------------------------------------------------------------------------------------
def test_a_module_in_hand_is_left_as_it_is(tmp_path):
    module, other = Plain(), Plain()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(1)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    source = open_source(module, Opening(context_length=8, weights=saved(other.state_dict(), tmp_path)))
    assert same(module, before)
    assert same(source.module, other.state_dict())
    assert source.warnings[0].endswith("were loaded")


def test_a_source_with_weights_of_its_own_takes_no_others(checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"is for a module .* has its own weights: leave it out"):
        open_source(checkpoint, Opening(weights=tmp_path / "state.pt"))
