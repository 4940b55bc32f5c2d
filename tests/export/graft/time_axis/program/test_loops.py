"""Loops over tokens: a rolled-up loop computes the same as the loop, and the rest is refused with its line."""

import inspect

import pytest
import torch

from pastkey.contract import names
from pastkey.export.graft.attention import intercept, torch_attention
from pastkey.export.graft.probe.causes import Kind, NoCacheError

from ..small import VOCAB, WIDTH, Of, followed, program_of, result

G = torch.Generator().manual_seed(0)
W, A = torch.randn(WIDTH, WIDTH, generator=G) / 3, torch.rand(WIDTH, generator=G)


def decayed(x):
    h, out = torch.zeros(1, WIDTH), []
    for t in range(x.shape[1]):
        h = A * h + x[:, t]
        out.append(h)
    return torch.stack(out, 1)


def two_states(x):
    """A pair that changes places."""
    a, b, out = torch.zeros(1, WIDTH), torch.ones(1, WIDTH), []
    for t in range(x.shape[1]):
        a, b = torch.tanh(b @ W), a + x[:, t]
        out.append(a)
    return torch.stack(out, 1)


def normed_memory(x):
    """A memory of slots that the token reads and writes by a softmax, as sums of products."""
    memory, out = torch.zeros(1, 3, WIDTH), []
    for t in range(x.shape[1]):
        weights = (x[:, t] @ W[:, :3]).softmax(-1)
        memory = memory * (1 - weights[..., None] * A) + weights[..., None] * x[:, t, None]
        out.append(torch.einsum("bs,bsd->bd", weights, memory / (1 + memory.norm(dim=-1, keepdim=True))))
    return torch.stack(out).permute(1, 0, 2)


def in_place(x):
    out, h = torch.empty_like(x), torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        h *= A
        h += x[:, t] @ W
        out[:, t, :] = h
    return out


def sliced(x):
    h, out = torch.zeros(1, 1, WIDTH), []
    for t in range(x.size(1)):
        h = torch.tanh(x[:, t : t + 1] + h @ W)
        out.append(h)
    return torch.cat(out, dim=1)


def from_none(x):
    h, out = None, []
    for row in x.unbind(dim=1):
        h = row if h is None else torch.tanh(h @ W) + row
        out.append(h)
    return torch.stack(out, 1)


def from_the_first(x):
    """Its beginning is made of the first token, which the loop reads as well."""
    h, out = torch.tanh(x[:, 0] @ W), []
    for t in range(x.shape[1]):
        h = A * h + x[:, t]
        out.append(h)
    return torch.stack(out, 1)


def state_before(x):
    h, out = torch.full((1, WIDTH), 0.5), []
    for t in range(x.shape[1]):
        out.append(h)
        h = torch.tanh(h @ W + x[:, t])
    return torch.stack(out, 1) + x


def listed(x):
    """One loop reads what another listed."""
    h, first = torch.zeros(1, WIDTH), []
    for t in range(x.shape[1]):
        h = A * h + x[:, t]
        first.append(h)
    h, second = torch.zeros(1, WIDTH), []
    for row in first:
        h = torch.tanh(row + h @ W)
        second.append(h @ W)
    return torch.stack(second, 1)


def of_positions(x):
    h, out, decay = torch.zeros(1, WIDTH), [], 1 / (1 + torch.arange(x.shape[1], dtype=torch.float32))
    for t in range(x.shape[1]):
        h = h + (x[:, t] - h) * decay[t]  # a running mean
        out.append(h)
    return torch.stack(out, 1)


@pytest.mark.parametrize("function", [
    decayed, two_states, normed_memory, in_place, sliced, from_none, from_the_first, state_before, listed, of_positions,
])  # fmt: skip
def test_a_loop_over_tokens_computes_the_same_rolled_up(function):
    result(function)


def test_layers_inside_a_loop_come_apart_into_a_recurrence_each():
    def function(x):
        a = b = torch.zeros(1, WIDTH)
        out = []
        for t in range(x.shape[1]):
            a = torch.tanh(a @ W + x[:, t] @ W)
            b = torch.tanh(b @ W + a)
            out.append(b @ W)
        return torch.stack(out, 1)

    run = followed(function)
    bodies = [[part.name for part in op.target.body] for op in run.program.ops if op.name == "recurrence"]
    assert bodies == [["matmul", "add", "tanh"]] * 2  # the products of x and of b are outside, for all tokens at once


def test_a_loop_with_another_order_is_another_program():
    """A body that differs by one operator or by one token gives other numbers, here and as the author computes it."""

    def later(x):
        h, out = torch.zeros(1, WIDTH), []
        for t in range(x.shape[1]):
            h = A * (h + x[:, t])
            out.append(h)
        return torch.stack(out, 1)

    one, other = result(decayed).tensor, result(later).tensor
    assert not torch.allclose(one, other, atol=1e-2)


def delta_rule(x, decayed_first=True):
    """A matrix of 2 heads as the state; keys are read from the decayed matrix, or from the one before."""
    k, v, beta = (x @ W).sigmoid().view(*x.shape[:2], 2, 4), x.view(*x.shape[:2], 2, 4), (x @ W[:, :2]).sigmoid()
    state, out = torch.zeros(1, 2, 4, 4), []
    for t in range(x.shape[1]):
        decayed = state * beta[:, t, :, None, None]
        read = torch.einsum("bhk,bhkv->bhv", k[:, t], decayed if decayed_first else state)
        state = decayed + k[:, t, ..., None] @ (beta[:, t, :, None] * (v[:, t] - read))[:, :, None]
        out.append((v[:, t, ..., None] * state).sum(2).flatten(1))
    return torch.stack(out, 1)


def retention(x):
    """One head, written with its values first, and a decay that is a constant."""
    state, out = torch.zeros(1, WIDTH, WIDTH), []
    for t in range(x.shape[1]):
        state = A[0] * state + torch.bmm(x[:, t, :, None], (x[:, t] @ W)[:, None])
        out.append(torch.einsum("bvk,bk->bv", state, x[:, t]))
    return torch.stack(out, 1)


def grouped(x):
    """Two queries for each head."""
    state, out = torch.zeros(1, 2, 2, 4), []
    for t in range(x.shape[1]):
        k, v = (x[:, t] @ W)[:, :4].view(1, 2, 2), x[:, t].view(1, 2, 4)
        state = A[0] * state + torch.einsum("bhk,bhv->bhkv", k, v)
        out.append(torch.einsum("bhgk,bhkv->bhgv", x[:, t].view(1, 2, 2, 2), state).flatten(1))
    return torch.stack(out, 1)


@pytest.mark.parametrize(("function", "kinds"), [
    (delta_rule, [names.RECURRENT_STATE]),
    (lambda x: delta_rule(x, decayed_first=False), [names.FLAT_STATE]),  # no rule of LinearAttention
    (decayed, [names.FLAT_STATE]),
    (retention, [names.RECURRENT_STATE]),
    (grouped, [names.FLAT_STATE]),
])  # fmt: skip
def test_a_linear_recurrence_of_a_matrix_is_known_by_its_algebra(function, kinds):
    kept = []

    def keep(call):
        kept.append(call.geometry.kind)
        return call.over(None)[0]

    with intercept(torch_attention, states=keep):
        result(function)
    assert kept == kinds


# --- refused ----------------------------------------------------------------------------------------------------------
def growing(x):
    kept = x[:, :0]
    out = []
    for t in range(x.shape[1]):
        kept = torch.cat([kept, x[:, t : t + 1]], 1)
        out.append(torch.tanh(kept.sum(1)))
    return torch.stack(out, 1)


def by_number(x):
    h, out = torch.zeros(1, WIDTH), []
    for t in range(x.shape[1]):
        h = h * 0.9 + x[:, t] / (t + 1)
        out.append(h)
    return torch.stack(out, 1)


def next_token(x):
    h, out = torch.zeros(1, WIDTH), []
    for t in range(x.shape[1] - 1):
        h = h * 0.9 + x[:, t + 1]
        out.append(h)
    return torch.stack([x[:, 0], *out], 1) + 0 * x


def two_before(x):
    a = b = torch.zeros(1, WIDTH)
    out = [a, b]
    for t in range(x.shape[1]):
        out.append(torch.tanh(out[-1] + out[-2] @ W) + x[:, t])
    return torch.stack(out[2:], 1)


def backwards(x):
    h, out = torch.zeros(1, WIDTH), []
    for t in range(x.shape[1]):
        h = A * h + x[:, t]
        out.append(h)
    return torch.stack(out[::-1], 1)


def right_to_left(x):
    h, out = torch.zeros(1, WIDTH), []
    for t in reversed(range(x.shape[1])):
        h = A * h + x[:, t]
        out.append(h)
    return torch.stack(out[::-1], 1)


def read_back(x):
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        out[:, t] = torch.tanh(x[:, t] + out.sum(1) @ W)
    return out


REFUSED = {
    growing: "grows",
    by_number: "a number that changes with the position",
    two_before: "another token than this one and the one before",
    backwards: "another order than the text's",
    right_to_left: "",
    read_back: "carries rows of the whole text",
}


@pytest.mark.parametrize("function", REFUSED)
def test_a_loop_that_is_no_recurrence_is_refused_with_its_line(function):
    with pytest.raises(NoCacheError) as caught:
        program_of(function)
    (cause,) = caught.value.causes
    assert REFUSED[function] in cause.what
    assert cause.kind in (Kind.RECURRENCE, Kind.LENGTH, Kind.LOOK_AHEAD)
    lines, first = inspect.getsourcelines(function)
    file, _, line = cause.where.partition(":")
    assert file == "test_loops.py"
    assert first < int(line.partition("-")[0]) < first + len(lines)
    assert Of(function)(torch.arange(6)[None] % VOCAB).shape == (1, 6, WIDTH)  # which torch computes
