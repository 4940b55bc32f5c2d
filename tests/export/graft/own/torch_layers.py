"""torch's own attention: MultiheadAttention, TransformerEncoder and scaled_dot_product_attention with masks."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .parts import CONTEXT, HEADS, VOCAB, WIDTH, Gpt, Own, Qkv
from .positions import PositionalEncoding

square_mask = nn.Transformer.generate_square_subsequent_mask


class MultiHead(nn.Module):
    """Weights are computed (need_weights is True unless it is told) and thrown away."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=True)

    def forward(self, x):
        mask = torch.triu(torch.ones(x.size(1), x.size(1), dtype=torch.bool), diagonal=1)
        return self.attn(x, x, x, attn_mask=mask)[0]


class Encoder(nn.Module):
    """As torch's tutorial has it, but for the batch first."""

    def __init__(self, *, norm_first=False, mask_inside=True):
        super().__init__()
        self.mask_inside = mask_inside
        self.embedding, self.pos_encoder = nn.Embedding(VOCAB, WIDTH), PositionalEncoding(WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, norm_first=norm_first)
        self.transformer_encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.linear = nn.Linear(WIDTH, VOCAB)

    def forward(self, src, src_mask=None):
        x = self.pos_encoder(self.embedding(src) * math.sqrt(WIDTH))
        if self.mask_inside:
            src_mask = square_mask(src.size(1))
        return self.linear(self.transformer_encoder(x, mask=src_mask))


class EncoderTimeFirst(nn.Module):
    """(T, B), and a mask kept until the length changes."""

    def __init__(self):
        super().__init__()
        self.src_mask = torch.zeros(0)
        self.encoder, self.pos = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.Linear(WIDTH, VOCAB)

    def forward(self, src):
        if self.src_mask.size(0) != len(src):
            self.src_mask = torch.log(torch.tril(torch.ones(len(src), len(src))))
        x = self.encoder(src) + self.pos(torch.arange(len(src)).unsqueeze(1))
        return F.log_softmax(self.decoder(self.layers(x, self.src_mask)), dim=-1)


class SdpaGrouped(Qkv):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1, enable_gqa=True)


class SdpaWindow(Qkv):
    """A band as a boolean mask."""

    def attend(self, q, k, v):
        band = torch.ones(q.size(-2), q.size(-2), dtype=torch.bool).tril().triu(-7)
        return F.scaled_dot_product_attention(q, k, v, band)


def with_mask(module, ids):
    return module(ids, square_mask(ids.size(1)))


DECODERS = {
    "multi_head_attention": Own(lambda: Gpt(MultiHead)),  # need_weights is left True
    "transformer_encoder": Own(Encoder),  # generate_square_subsequent_mask inside
    "transformer_encoder_mask_outside": Own(lambda: Encoder(mask_inside=False, norm_first=True), with_mask),
    "transformer_encoder_time_first": Own(EncoderTimeFirst, lambda m, ids: m(ids.t()).transpose(0, 1)),
    "sdpa_grouped": Own(lambda: Gpt(lambda: SdpaGrouped(kv_heads=2))),  # is_causal=T > 1
    "sdpa_window": Own(lambda: Gpt(SdpaWindow)),  # a window of 8
}
