"""The device that a run chooses and states, its number types, and its utilisation."""

from __future__ import annotations

import pytest
import torch

from pastkey.errors import InputError
from pastkey.train import loop
from pastkey.train.checkpoint import load_checkpoint
from pastkey.train.hardware.device import choose_device, flops_per_token, layers_of, peak_flops
from pastkey.train.loss import next_token_loss
from pastkey.train.model import Decoder
from pastkey.train.report import read_metrics

from ..helpers import tiny


def test_on_the_cpu_nothing_changes_unless_it_is_asked_for():
    device = choose_device(tiny(device="cpu"), 0)
    assert (str(device), device.bfloat16, device.compiled, device.peak_flops) == ("cpu, float32", False, False, None)
    asked = choose_device(tiny(device="cpu", precision="bfloat16", compile=True, peak_tflops=2.0), 0)
    assert str(asked) == "cpu, bfloat16 autocast, compiled"
    assert asked.peak_flops == 2e12


def test_a_device_that_is_missing_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for kind in ("cuda", "mps"):
        with pytest.raises(InputError, match=f"--device is {kind}, and torch sees no .*--device cpu"):
            choose_device(tiny(device=kind), 0)
    with pytest.raises(InputError, match="--device is 'tpu'; it must be one of auto, cpu, cuda, mps"):
        tiny(device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="has no card for itself, there are 2: start at most 2 processes"):
        choose_device(tiny(), 2)


@pytest.mark.parametrize(
    ("name", "tflops"), [("H100 80GB HBM3", 989), ("H100 PCIe", 756), ("L40S", 362), ("L4", 121), ("A10G", None)]
)
def test_the_peak_of_a_card_is_known_or_none(name, tflops):
    assert peak_flops(f"NVIDIA {name}") == (None if tflops is None else tflops * 1e12)


def test_the_operations_of_a_token_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny(layers=3).model_config(40, None, 0)
    model = Decoder(config)
    ids = torch.zeros((2, config.max_position_embeddings), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        next_token_loss(model, (ids, ids)).backward()
    assert flops_per_token(model, config) == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.02)


def test_the_layers_are_the_longest_list_of_modules():
    model = Decoder(tiny(layers=3).model_config(40, None, 0))
    assert layers_of(model) == list(model.model.layers)
    assert layers_of(model.lm_head) == [model.lm_head]


def test_a_run_in_bfloat16_learns_and_saves_float32(whole, tmp_path):
    loop.train(tiny(precision="bfloat16"), tmp_path / "c", data=[whole.with_name("text.txt")])
    a, b = ([row["loss"] for row in read_metrics(out) if "loss" in row] for out in (whole, tmp_path / "c"))
    assert a != b
    assert b == pytest.approx(a, rel=0.02)
    assert {p.dtype for p in load_checkpoint(tmp_path / "c").model.parameters()} == {torch.float32}


def test_the_device_may_change_when_a_run_is_resumed(copy, capsys):
    loop.resume(copy, {"steps": 13, "precision": "bfloat16", "device": "cpu", "learning_rate": 1e-3})
    assert "parameters on cpu, bfloat16 autocast\n" in capsys.readouterr().err


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")  # torch compiles with warnings about its own old parts
def test_compiled_layers_compute_the_same(text, tmp_path):
    for name, compiled in (("a", False), ("b", True)):
        loop.train(tiny(steps=4, layers=2, compile=compiled), tmp_path / name, data=[text])
    a, b = (read_metrics(tmp_path / name) for name in "ab")
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    names = (load_checkpoint(tmp_path / name).model.state_dict().keys() for name in "ab")
    assert next(names) == next(names)
