"""Shared by the tests of the commands: a file with modules, how a command is run, and the form of a mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pastkey.export.progress import Progress

Result = tuple[int, str, str]  # exit status, standard output, standard error
Command = Callable[..., Result]

FACTORY = """
import torch, torch.nn.functional as F
from torch import nn

class Small(nn.Module):
    causal = True

    def __init__(self, vocab=37):
        super().__init__()
        torch.manual_seed(0)
        print("number of parameters: many")
        self.token, self.position = nn.Embedding(vocab, 16), nn.Embedding(12, 16)
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, vocab)

    def forward(self, input_ids, position_ids):
        x = self.token(input_ids) + self.position(position_ids)
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return self.head(x + F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)[:, 0])

class NotCausal(Small):
    causal = False
"""


def fails(result: Result, *words: str) -> None:
    """One sentence on standard error, nothing on standard output, exit status 2."""
    status, out, err = result
    assert (status, out) == (2, "")
    sentence = err.splitlines()[-1]
    assert sentence.startswith("pastkey "), err
    assert "Traceback" not in err
    for word in words:
        assert word in sentence


class Heard(Progress):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.stages: list[str] = []
        self.phases: list[str] = []
        self.shares: list[tuple[int, int]] = []

    def say(self, sentence: str) -> None:
        self.said.append(sentence)

    def warn(self, sentence: str) -> None:
        self.said.append(f"warning: {sentence}")

    def plan(self, phases: Mapping[str, float]) -> None:
        self.phases = list(phases)

    def require_planned(self) -> None:
        """Each stage belongs to a phase of the plan, they come in its order, and no label is shown twice."""
        found = [next(place for place, name in enumerate(self.phases) if s.startswith(name)) for s in self.stages]
        assert found == sorted(found)
        assert len(set(self.stages)) == len(self.stages)

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def advance(self, done: int, total: int) -> None:
        self.shares.append((done, total))
