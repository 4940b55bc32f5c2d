"""How a decoder is called and what it gives: losses, dicts, the last position, other layouts, its own caches."""

import torch
import torch.nn.functional as F
from torch import nn

from .parts import WIDTH, Causal, Gpt, Own


class FlatWithTargets(Gpt):
    """Logits flattened to (B*T, V) with a loss, and another shape without."""

    def forward(self, idx, targets=None):
        logits = super().forward(idx)
        if targets is None:
            return logits, None
        B, T, C = logits.shape
        logits = logits.view(B * T, C)
        return logits, F.cross_entropy(logits, targets.view(B * T))


class LossInside(Gpt):
    """The loss of each next token is made in every call: T - 1 of them."""

    def forward(self, ids):
        logits = super().forward(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) if ids.size(1) > 1 else logits.sum()
        return {"loss": loss, "logits": logits}


class Probabilities(Gpt):
    """Logarithms of probabilities, which are also logits."""

    def forward(self, idx):
        return F.log_softmax(super().forward(idx), dim=-1)


class OneText(nn.Module):
    """Attention over (T, C), without a batch."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        sims = torch.matmul(self.q(x), self.k(x).transpose(dim0=0, dim1=1)) / torch.tensor(x.size(dim=1) ** 0.5)
        mask = torch.tril(torch.ones(x.size(dim=0), x.size(dim=0))) == 0
        return torch.matmul(F.softmax(sims.masked_fill(mask=mask, value=-1e9), dim=1), self.v(x))


class Unbatched(Gpt):
    """One text (T,) -> (T, V): heads, masks and positions without a batch."""

    def embed(self, idx):
        return 4 * self.wte(idx) + self.wpe.weight[: idx.size(dim=0), :]


class OneRow(Gpt):
    """(1, T): the positions are a table of one row, viewed as the batch."""

    def embed(self, idx):
        B, T = idx.shape
        return self.wte(idx) + self.wpe(torch.arange(T)[None].view(B, T))


class StartPos(Gpt):
    """A number that says where the text begins: always 0 here."""

    def forward(self, tokens, start_pos):  # type: ignore[override]
        return self.logits(self.wte(tokens) + self.wpe.weight[start_pos : start_pos + tokens.size(1)]).float()


DECODERS = {
    "flat_with_targets": Own(lambda: FlatWithTargets(Causal), lambda m, ids: m(ids)[0]),
    "loss_inside": Own(lambda: LossInside(Causal), lambda m, ids: m(ids)["logits"]),  # cross_entropy over T - 1
    "log_probabilities": Own(lambda: Probabilities(Causal)),
    "unbatched": Own(lambda: Unbatched(OneText), lambda m, ids: torch.stack([m(row) for row in ids])),  # (T) -> (T, V)
    "one_row": Own(lambda: OneRow(Causal), lambda m, ids: torch.cat([m(row[None]) for row in ids])),  # only B = 1
    "start_pos": Own(lambda: StartPos(Causal), lambda m, ids: m(ids, 0)),
}
