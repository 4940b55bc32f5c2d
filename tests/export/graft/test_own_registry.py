"""What the fixtures of own decoders claim, by plain torch: nothing of the exporter runs here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .own.parts import Own, Refused
from .own.registry import DECODERS, REFUSED


@pytest.fixture(params=DECODERS)
def own(request: pytest.FixtureRequest) -> Own:
    return DECODERS[request.param]


def texts(own: Own | Refused, rows: int = 2) -> Tensor:
    length = min(own.context - 1, 23)
    return torch.randint(own.vocab, (rows, length), generator=torch.Generator().manual_seed(1))


def changed(ids: Tensor, place: int, vocab: int) -> Tensor:
    """With another token there in the first row."""
    ids = ids.clone()
    ids[0, place] = (ids[0, place] + 1) % vocab
    return ids


def logits(own: Own | Refused, module: nn.Module, ids: Tensor) -> Tensor:
    """Those of every position (B, T, V), also where the module gives those of the last one only."""
    with torch.no_grad():
        found = own.call(module, ids)
        if found.dim() == 2:
            found = torch.stack([own.call(module, ids[:, : i + 1]) for i in range(ids.shape[1])], dim=1)
    return found.float()


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a part of the largest logit."""
    return float((one - other).abs().max() / one.abs().max())


def test_a_text_is_read_from_left_to_right_and_alone(own: Own) -> None:
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


def test_logits_depend_on_earlier_tokens(own: Own) -> None:
    module, ids = own.make(), texts(own)
    assert apart(logits(own, module, ids)[0, -1], logits(own, module, changed(ids, -2, own.vocab))[0, -1]) > 1e-2


def test_it_is_made_the_same_twice(own: Own) -> None:
    one, other = own.make().state_dict(), own.make().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_context_is_taken_in_full(own: Own) -> None:
    ids = torch.zeros((1, own.context), dtype=torch.long)
    with torch.no_grad():
        assert own.call(own.make(), ids).shape[-1] == own.vocab


def refused(*causes: str) -> list[str]:
    return [name for name, entry in REFUSED.items() if entry.cause in causes]


@pytest.mark.parametrize("name", refused("look-ahead"))
def test_a_later_token_changes_earlier_logits(name: str) -> None:
    entry = REFUSED[name]
    module, ids = entry.make(), texts(entry)
    one, other = logits(entry, module, ids), logits(entry, module, changed(ids, -1, entry.vocab))
    assert apart(one[0, :-1], other[0, :-1]) > (1e-5 if name == "little_ahead" else 1e-3)
    assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("name", refused("noise", "dropout"))
def test_twice_the_same_text_gives_other_logits(name: str) -> None:
    entry = REFUSED[name]
    module, ids = entry.make(), texts(entry)
    assert apart(logits(entry, module, ids), logits(entry, module, ids)) > (1e-5 if name == "little_noise" else 1e-3)


@pytest.mark.parametrize("name", refused("batch mixing"))
def test_another_row_changes_the_logits(name: str) -> None:
    entry = REFUSED[name]
    module, ids = entry.make(), texts(entry)
    one, other = logits(entry, module, ids), logits(entry, module, changed(ids, -1, entry.vocab))
    assert apart(one[1], other[1]) > 1e-3


@pytest.mark.parametrize("name", refused("state"))
def test_the_text_before_changes_the_logits(name: str) -> None:
    entry = REFUSED[name]
    module, ids = entry.make(), texts(entry)
    assert apart(logits(entry, module, ids), logits(entry, module, ids)) > 1e-3


@pytest.mark.parametrize("name", refused("cache written in place"))
def test_a_call_writes_into_buffers(name: str) -> None:
    entry = REFUSED[name]
    module, ids = entry.make(), texts(entry)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    logits(entry, module, ids)
    assert all(not torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


@pytest.mark.parametrize("name", refused("fixed length"))
def test_another_length_fails(name: str) -> None:
    entry = REFUSED[name]
    module = entry.make()
    assert logits(entry, module, torch.zeros((2, entry.context), dtype=torch.long)).shape[1] == entry.context
    with pytest.raises(RuntimeError):
        logits(entry, module, texts(entry))


@pytest.mark.parametrize("name", refused("length-dependent number"))
def test_the_length_alone_changes_earlier_logits(name: str) -> None:
    entry = REFUSED[name]
    module, ids = entry.make(), texts(entry)
    found = logits(entry, module, ids)
    assert apart(found[:, :-1], logits(entry, module, changed(ids, -1, entry.vocab))[:, :-1]) < 1e-6
    assert apart(found[:, :9], logits(entry, module, ids[:, :9])) > 1e-3


@pytest.mark.parametrize("name", refused("recurrence", "data-dependent loop", "cache written in place"))
def test_only_its_manner_is_in_the_way(name: str) -> None:
    """It reads from left to right, row by row, the same twice."""
    entry = REFUSED[name]
    module, ids = entry.make(), texts(entry)
    found, other = logits(entry, module, ids), logits(entry, module, changed(ids, -1, entry.vocab))
    assert torch.equal(found, logits(entry, module, ids))
    assert apart(found[:, :-1], other[:, :-1]) < 1e-6
    assert apart(found[1], other[1]) < 1e-6
    assert apart(found[:, :9], logits(entry, module, ids[:, :9])) < 1e-4
