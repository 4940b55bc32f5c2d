"""Decoders as people write them, exported unedited: plain onnxruntime over the file equals their author's own call.

Nothing of the runtime takes part. The reference is uncached and in float32, of a module that no export has seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from pastkey.contract.bundle import open_bundle
from pastkey.export import Report, export
from pastkey.export.graft.probe.contract import in_contract

from ..shared import divided
from .graft.own.by_hand import TrilBuffer
from .graft.own.parts import CONTEXT, Gpt, Own, Qkv
from .graft.own.registry import DECODERS
from .plain_loop import Text, open_graph

Array = npt.NDArray[Any]

PROMPT, TOKENS = 6, 40
# CI exports one name in so many beside the own modules of tests/conformance. It follows a further part in torch, which
# compares them with their author's call. Why a module is refused is tested in graft/probe/test_causes.py.
CI_SHARE, FOLLOWED_SHARE = 24, 3


def reference(own: Own, module: nn.Module, ids: list[int]) -> Array:
    """Logits (T, V) as the author computes them, also where a call gives those of the last position only."""
    with torch.no_grad():
        found = own.call(module, torch.tensor([ids]))
        if found.dim() == 2:
            found = torch.cat([own.call(module, torch.tensor([ids[: i + 1]])) for i in range(len(ids))])[None]
    return found[0].numpy()


@dataclass(frozen=True)
class Exported:
    own: Own
    module: nn.Module  # another one than was exported, in float32
    report: Report
    graph: Path

    def text(self) -> Text:
        return Text(open_graph(self.graph))

    @property
    def prompt(self) -> list[int]:
        return torch.randint(self.own.vocab, (PROMPT,), generator=torch.Generator().manual_seed(3)).tolist()

    def follow(self, tolerance: float) -> list[int]:
        """The ids that the graph chooses, each of which is the author's choice but for a tie within the tolerance."""
        text, ids = self.text(), self.prompt
        logits = text.read(ids)[-1]
        for _ in range(min(TOKENS, self.own.context - PROMPT)):
            chosen = int(logits.argmax())
            expected = reference(self.own, self.module, ids)[-1]
            short = expected.max() - expected[chosen]
            assert short <= tolerance * np.abs(expected).max(), f"token {len(ids)}: {chosen}, {expected.argmax()}"
            ids.append(chosen)
            logits = text.read([chosen])[-1]
        return ids


def made(own: Own, folder: Path, precision: str) -> Exported:
    report = export(own.make(), folder / "bundle", precision=precision, context_length=own.context)
    graph = open_bundle(folder / "bundle", verify=False).all_logits_graph
    return Exported(own, own.make().float(), report, graph)


@pytest.mark.parametrize("name", divided(DECODERS, ci=[*DECODERS][::CI_SHARE]))
def test_the_exported_graph_computes_what_the_author_computes(name, tmp_path):
    own = DECODERS[name]
    exported = made(own, tmp_path, "fp32")
    manifest = exported.report.manifest
    assert manifest.parity["fp32"]["ok"]
    assert manifest.parity["fp32"]["reference"] == "source"
    assert own.graph in (manifest.graph, "either")

    ids = exported.follow(1e-4)
    text, start, logits = exported.text(), 0, []
    for size in [6, 1, 1, 1, 4, 1, 7, 2] + [1] * len(ids):
        if chunk := ids[start : start + size]:
            logits.append(text.read(chunk))
            start += size
    expected = reference(own, exported.module, ids)
    assert np.abs(np.concatenate(logits) - expected).max() < 1e-4 * np.abs(expected).max()
    keys = [name for name in text.past if name.endswith(".key")]
    assert len(keys) == own.layers


NOT_EXPORTED = [name for i, name in enumerate(DECODERS) if i % CI_SHARE]


@pytest.mark.parametrize("name", divided(NOT_EXPORTED, ci=NOT_EXPORTED[::FOLLOWED_SHARE]))
def test_what_ci_does_not_export_is_followed_to_its_authors_logits(name):
    own = DECODERS[name]
    taken = in_contract(own.make(), own.context, None, lambda _: None)  # which raises where they differ
    assert taken.call
    assert len(taken.observation.layers) == own.layers


class TorchsAttention(Qkv):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attended


class InTheContract(nn.Module):
    """The same decoder with positions from outside and torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = Gpt(TorchsAttention)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.gpt.wte(input_ids) + self.gpt.wpe(position_ids)
        for block in self.gpt.blocks:
            x = block(x)
        logits: Tensor = self.gpt.lm_head(self.gpt.ln_f(x))
        return logits


@pytest.mark.slow
def test_attention_by_hand_has_the_operators_of_the_contract(tmp_path):
    found = {}
    for name, module in (("own", Gpt(TrilBuffer)), ("contract", InTheContract())):
        report = export(module.eval(), tmp_path / name, precision="fp32", context_length=CONTEXT)
        found[name] = report.manifest.operators
        assert (report.manifest.call == "") == (name == "contract")
    assert found["own"] == found["contract"]


@pytest.mark.parametrize("name", divided([*DECODERS][::3], ci=[*DECODERS][::48]))
def test_int8_is_still_the_same_model(name, tmp_path):
    exported = made(DECODERS[name], tmp_path, "int8")
    assert exported.report.manifest.parity["int8"]["ok"]
    assert exported.report.manifest.quality["kl_divergence"] < 0.05
    exported.follow(0.15)
