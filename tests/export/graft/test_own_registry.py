"""What the fixtures of own decoders claim, by plain torch: nothing of the exporter runs here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .own.parts import Own
from .own.registry import DECODERS


@pytest.fixture(params=DECODERS)
def own(request):
    return DECODERS[request.param]


def texts(own: Own, rows: int = 2) -> Tensor:
    length = min(own.context - 1, 23)
    return torch.randint(own.vocab, (rows, length), generator=torch.Generator().manual_seed(1))


def changed(ids: Tensor, place: int, vocab: int) -> Tensor:
    """With another token there in the first row."""
    ids = ids.clone()
    ids[0, place] = (ids[0, place] + 1) % vocab
    return ids


def logits(own: Own, module: nn.Module, ids: Tensor) -> Tensor:
    """Those of every position (B, T, V), also where the module gives those of the last one only."""
    with torch.no_grad():
        found = own.call(module, ids)
        if found.dim() == 2:
            found = torch.stack([own.call(module, ids[:, : i + 1]) for i in range(ids.shape[1])], dim=1)
    return found.float()


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a part of the largest logit."""
    return float((one - other).abs().max() / one.abs().max())


def test_a_text_is_read_from_left_to_right_and_alone(own):
    module, ids = own.make(), texts(own)
    found = logits(own, module, ids)
    rounding = 1e-5 if all(p.dtype == torch.float32 for p in module.parameters()) else 2e-2
    assert found.shape == (*ids.shape, own.vocab)
    assert found.isfinite().all()
    assert torch.equal(found, logits(own, module, ids)), "not the same twice"
    last = logits(own, module, changed(ids, -1, own.vocab))
    assert apart(found[:, :-1], last[:, :-1]) < 1e-6, "looks ahead"
    assert apart(found[1], last[1]) < 1e-6, "rows see one another"
    assert apart(found[0, -1], last[0, -1]) > 1e-2
    assert apart(logits(own, module, ids[:, :9]), found[:, :9]) < rounding, "depends on the length"
    assert apart(logits(own, module, ids[:1]), found[:1]) < rounding, "depends on the number of rows"


def test_logits_depend_on_earlier_tokens(own):
    module, ids = own.make(), texts(own)
    off = apart(logits(own, module, ids)[0, -1], logits(own, module, changed(ids, -2, own.vocab))[0, -1])
    assert off == 0 if own.alone else off > 1e-2
