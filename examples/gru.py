"""A language model whose memory is a GRU. It learns the lessons of lesson.py in seconds; not a line of it is changed to
export it:

pastkey export examples/gru.py:trained --tokenizer examples/lesson.py:tokenizer --context 64 --eos 0 --out gru
pastkey run gru --prompt "who wakes the farm ?"
"""

import torch
import torch.nn.functional as F
from lesson import LESSONS, WORDS
from torch import nn


class GruLanguageModel(nn.Module):
    def __init__(self, num_tokens, width=32, num_layers=2):
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, width)
        self.gru = nn.GRU(width, width, num_layers, batch_first=True)
        self.fc = nn.Linear(width, num_tokens)

    def forward(self, token_ids):  # (B, T) -> (B, T, num_tokens)
        hidden, _ = self.gru(self.embedding(token_ids))
        return self.fc(hidden)


def taught(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    texts = [torch.tensor([[WORDS.index(word) for word in [*lesson.split(), "<end>"]]]) for lesson in LESSONS]
    for _ in range(60):
        optimizer.zero_grad()
        for text in texts:
            F.cross_entropy(model(text[:, :-1])[0], text[0, 1:]).backward()
        optimizer.step()
    return model


def trained():
    torch.manual_seed(0)
    return taught(GruLanguageModel(len(WORDS)))
