"""Linear attention as a loop over tokens: its memory is a matrix, which forgets a little and learns a key and a value
with each token. It is exported as it stands, and runs as onnxruntime's LinearAttention:

pastkey export examples/linear_attention.py:trained --tokenizer examples/lesson.py:tokenizer --context 64 --eos 0 \
  --out la
pastkey run la --prompt "who sleeps all day ?"
"""

import torch
import torch.nn.functional as F
from gru import taught
from lesson import WORDS
from torch import nn


class LinearAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.W_q, self.W_k, self.W_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.forget = nn.Linear(width, 1)

    def forward(self, x):  # (B, T, width)
        q, k, v = self.W_q(x), F.normalize(self.W_k(x), dim=-1), self.W_v(x)
        keep = torch.sigmoid(self.forget(x) + 3)
        memory, outputs = x.new_zeros(x.size(0), x.size(2), x.size(2)), []
        for t in range(x.size(1)):
            memory = keep[:, t, :, None] * memory + k[:, t, :, None] * v[:, t, None, :]
            outputs.append((q[:, t, None, :] @ memory).squeeze(1))
        return torch.stack(outputs, dim=1)


class Memory(nn.Module):
    def __init__(self, num_tokens, width=32, num_layers=2):
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, width)
        self.layers = nn.ModuleList(LinearAttention(width) for _ in range(num_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_layers))
        self.fc = nn.Linear(width, num_tokens)

    def forward(self, token_ids):
        x = self.embedding(token_ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.fc(x)


def trained():
    torch.manual_seed(0)
    return taught(Memory(len(WORDS)))
