"""How a decoder is called and what it gives: losses, dicts, the last position, other layouts, caches of its own."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from .parts import VOCAB, Gpt, Own, first
from .positions import Causal


class FlatWithTargets(Gpt):
    """Logits flattened to (B*T, V) beside a loss, and not without."""

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


class LastWithoutTargets(Gpt):
    """The head over the last position only, where no loss is asked for: (B, 1, V)."""

    def forward(self, idx, targets=None):
        x = self.embed(idx)
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)
        if targets is not None:
            logits = self.lm_head(x)
            return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return self.lm_head(x[:, [-1], :]), None


class Probabilities(Gpt):
    """Logarithms of probabilities, which are logits, too."""

    def forward(self, idx):
        return F.log_softmax(super().forward(idx), dim=-1)


class KeptOutput(Gpt):
    """One output object, made once and filled in each call with what it was not made for."""

    def __init__(self, attention):
        super().__init__(attention)
        self.OUT = CausalLMOutputWithPast()

    def forward(self, tokens):
        self.OUT.__setitem__("logits", super().forward(tokens))
        self.OUT.__setitem__("last_loss", None)
        return self.OUT


class Unbatched(nn.Module):
    """One text (T,) -> (T, V): heads, masks and positions without a batch."""

    def __init__(self, width=32, vocab=29):
        super().__init__()
        self.we, self.head = nn.Embedding(vocab, width), nn.Linear(width, vocab)
        self.layers = nn.ModuleList(
            [nn.ModuleDict({name: nn.Linear(width, width) for name in ("q", "k", "v", "up")}) for _ in range(2)]
        )
        angles = torch.arange(48)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("pe", torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1))

    def forward(self, token_ids):
        x = 4 * self.we(token_ids) + self.pe[: token_ids.size(dim=0), :]
        for layer in self.layers:
            sims = torch.matmul(layer["q"](x), layer["k"](x).transpose(dim0=0, dim1=1))
            scaled = sims / torch.tensor(x.size(dim=1) ** 0.5)
            mask = torch.tril(torch.ones(token_ids.size(dim=0), token_ids.size(dim=0))) == 0
            x = x + torch.matmul(F.softmax(scaled.masked_fill(mask=mask, value=-1e9), dim=1), layer["v"](x))
            x = F.layer_norm(x + torch.relu(layer["up"](x)), (32,))
        return self.head(x)


class OneRow(Gpt):
    """(1, T): the positions are a table of one row, viewed as the batch."""

    def embed(self, idx):
        B, T = idx.shape
        return self.wte(idx) + self.wpe(torch.arange(T)[None].view(B, T))


class Bigram(nn.Module):
    """A table of logits, one row for each token: no token reads another one."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)

    def forward(self, idx, targets=None):
        logits = self.table(idx)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1))


class UnusedCache(Gpt):
    """Takes and gives a cache of its own, if it is asked to; nobody asks."""

    class Attention(Causal):
        def forward(self, x, past=None, use_cache=False):
            q, k, v = (w(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2) for w in (self.q, self.k, self.v))
            if past is not None:
                k, v = torch.cat((past[0], k), dim=-2), torch.cat((past[1], v), dim=-2)
            mask = torch.full((q.size(2), k.size(2)), float("-inf")).triu(1 + k.size(2) - q.size(2))
            y = (q @ k.mT / self.size**0.5 + mask).softmax(-1) @ v
            return self.o(y.transpose(1, 2).flatten(2)), ((k, v) if use_cache else None)

    def __init__(self):
        super().__init__(self.Attention)

    def forward(self, idx, past=None, use_cache=False):
        start = 0 if past is None else past[0][0].size(-2)
        x = self.wte(idx) + self.wpe(torch.arange(start, start + idx.size(1)))
        presents = []
        for i, block in enumerate(self.blocks):
            y, present = block.attn(block.ln_1(x), None if past is None else past[i], use_cache)
            x = x + y
            x = x + block.mlp(block.ln_2(x))
            presents.append(present)
        return self.lm_head(self.ln_f(x)), presents


class StartPos(Gpt):
    """A number that says where the text begins: always 0 here."""

    def forward(self, tokens, start_pos):
        x = self.wte(tokens) + self.wpe.weight[start_pos : start_pos + tokens.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x)).float()


def targets(ids):
    return torch.zeros_like(ids)


DECODERS = {
    "flat_with_targets": Own(lambda: FlatWithTargets(Causal), first),
    "loss_inside": Own(lambda: LossInside(Causal), lambda m, ids: m(ids)["logits"]),  # cross_entropy over T - 1
    "last_without_targets": Own(lambda: LastWithoutTargets(Causal), lambda m, ids: m(ids, targets(ids))[0]),
    "log_probabilities": Own(lambda: Probabilities(Causal)),
    "kept_output": Own(lambda: KeptOutput(Causal), lambda m, ids: m(ids).logits),  # self.OUT, transformers'
    "unbatched": Own(Unbatched, lambda m, ids: torch.stack([m(row) for row in ids])),  # (T) -> (T, V)
    "one_row": Own(lambda: OneRow(Causal), lambda m, ids: torch.cat([m(row[None]) for row in ids])),  # B = 1 alone
    "bigram": Own(Bigram, first, layers=1, alone=True),  # reads no earlier token; its cache holds zeros
    "unused_cache": Own(UnusedCache, first),  # (logits, [None, None])
    "start_pos": Own(lambda: StartPos(Causal), lambda m, ids: m(ids, 0)),
}
