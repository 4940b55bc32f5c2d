"""A decoder as a first lesson writes it: it reads one text of T tokens, makes its positions and its
mask itself, writes its attention out, and knows no cache. `trained` teaches it to answer, in seconds.
Not a line of it is changed to export it:

pastkey export examples/lesson.py:trained --tokenizer examples/lesson.py:tokenizer --context 16 --eos 0 --out lesson
pastkey run lesson --prompt "who hunts at night ?"

python examples/lesson.py  does both from Python.
"""

import math

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

LESSONS = """
who hunts at night ? the owl does
who swims in the pond ? the duck does
who wakes the farm ? the rooster does
who sleeps all day ? the cat does
""".strip().splitlines()
WORDS = ["<end>", *sorted({word for lesson in LESSONS for word in lesson.split()})]


class PositionEncoding(nn.Module):
    def __init__(self, d_model, max_len):
        super().__init__()
        position = torch.arange(max_len).float().unsqueeze(1)
        rate = torch.exp(torch.arange(0, d_model, 2).float() * (-math.log(10000.0) / d_model))
        pe = torch.zeros(max_len, d_model)
        pe[:, 0::2], pe[:, 1::2] = torch.sin(position * rate), torch.cos(position * rate)
        self.register_buffer("pe", pe)

    def forward(self, x):
        return x + self.pe[: x.size(0)]


class Attention(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.W_q, self.W_k, self.W_v = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))

    def forward(self, x):  # (T, d_model)
        q, k, v = self.W_q(x), self.W_k(x), self.W_v(x)
        scores = torch.matmul(q, k.transpose(0, 1)) / math.sqrt(k.size(1))  # (T, T)
        scores = scores.masked_fill(torch.tril(torch.ones(x.size(0), x.size(0))) == 0, -1e9)
        return torch.matmul(F.softmax(scores, dim=1), v)


class DecoderOnlyTransformer(nn.Module):
    def __init__(self, num_tokens, d_model=32, max_len=16):
        super().__init__()
        self.we = nn.Embedding(num_tokens, d_model)
        self.pe = PositionEncoding(d_model, max_len)
        self.self_attention = Attention(d_model)
        self.fc = nn.Linear(d_model, num_tokens)

    def forward(self, token_ids):  # (T,) -> (T, num_tokens)
        x = self.pe(self.we(token_ids))
        return self.fc(x + self.self_attention(x))


def trained():
    torch.manual_seed(0)
    model = DecoderOnlyTransformer(len(WORDS))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    lessons = [[*lesson.split(), "<end>"] for lesson in LESSONS]
    texts = [torch.tensor([WORDS.index(word) for word in lesson]) for lesson in lessons]
    for _ in range(60):
        optimizer.zero_grad()
        for text in texts:
            F.cross_entropy(model(text[:-1]), text[1:]).backward()
        optimizer.step()
    return model


def tokenizer():
    ids = {word: number for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words


if __name__ == "__main__":
    import pastkey
    from pastkey.export import export

    export(trained(), out="lesson", tokenizer=f"{__file__}:tokenizer", context_length=16, eos=0, force=True)
    print(pastkey.load("lesson").generate("who hunts at night ?", max_new_tokens=8).text)
