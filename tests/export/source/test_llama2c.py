"""llama2.c checkpoints: files written here by the format, and a Llama in numpy that turns adjacent pairs as it does."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pastkey.contract import names
from pastkey.errors import InputError, ResourceError
from pastkey.export import export
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Opening
from pastkey.runtime import load

Array = npt.NDArray[np.float32]
Piece = tuple[bytes, float]


# --- a checkpoint of any sizes ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Toy:
    """A random llama2.c decoder; heads of size 6 and odd widths, so that no two sizes can be mixed up."""

    dim: int = 24
    hidden: int = 33
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 265
    context: int = 19
    tied: bool = True

    def weights(self) -> dict[str, Array]:
        rng = np.random.default_rng(0)
        kv = self.dim // self.heads * self.kv_heads
        shapes = {
            "embedding": (self.vocab, self.dim),
            "norm1": (self.layers, self.dim),
            "wq": (self.layers, self.dim, self.dim),
            "wk": (self.layers, kv, self.dim),
            "wv": (self.layers, kv, self.dim),
            "wo": (self.layers, self.dim, self.dim),
            "norm2": (self.layers, self.dim),
            "w1": (self.layers, self.hidden, self.dim),
            "w2": (self.layers, self.dim, self.hidden),
            "w3": (self.layers, self.hidden, self.dim),
            "norm": (self.dim,),
            "head": (self.vocab, self.dim),
        }
        return {
            name: (rng.normal(size=shape) * 0.4 + name.startswith("norm")).astype(np.float32)
            for name, shape in shapes.items()
        }

    def sizes(self) -> list[int]:
        return [self.dim, self.hidden, self.layers, self.heads, self.kv_heads, self.vocab, self.context]

    def version0(self) -> bytes:
        w = self.weights()
        sizes = self.sizes()
        sizes[5] *= 1 if self.tied else -1
        table = np.full((2, self.context, self.dim // self.heads // 2), 7, np.float32)  # read by nobody
        order = ["embedding", "norm1", "wq", "wk", "wv", "wo", "norm2", "w1", "w2", "w3", "norm"]
        blocks = [*(w[name] for name in order), table, *([] if self.tied else [w["head"]])]
        return struct.pack("<7i", *sizes) + b"".join(block.tobytes() for block in blocks)

    def version1(self, version: int = 1) -> bytes:
        w = self.weights()
        header = struct.pack("<Ii7iB", 0x616B3432, version, *self.sizes(), self.tied).ljust(256, b"\0")
        order = ["norm1", "norm2", "norm", "embedding", "wq", "wk", "wv", "wo", "w1", "w2", "w3"]
        return header + b"".join(w[name].tobytes() for name in [*order, *([] if self.tied else ["head"])])

    def logits(self, ids: list[int]) -> Array:
        """(T, V) in float64, one position and one head at a time."""
        w, size = {name: block.astype(np.float64) for name, block in self.weights().items()}, self.dim // self.heads
        hidden = w["embedding"][ids]  # (T, E)
        for layer in range(self.layers):
            x = normed(hidden, w["norm1"][layer])
            q, k, v = (
                (x @ w[name][layer].T).reshape(len(ids), -1, size) for name in ("wq", "wk", "wv")
            )  # (T, heads, D)
            q, k = turned(q), turned(k)
            mixed = np.zeros_like(q)
            for t in range(len(ids)):
                for head in range(self.heads):
                    group = head // (self.heads // self.kv_heads)
                    scores = k[: t + 1, group] @ q[t, head] / np.sqrt(size)
                    share = np.exp(scores - scores.max())
                    mixed[t, head] = share @ v[: t + 1, group] / share.sum()
            hidden = hidden + mixed.reshape(len(ids), -1) @ w["wo"][layer].T
            x = normed(hidden, w["norm2"][layer])
            gate = x @ w["w1"][layer].T
            hidden = hidden + (gate / (1 + np.exp(-gate)) * (x @ w["w3"][layer].T)) @ w["w2"][layer].T
        return normed(hidden, w["norm"]) @ w["embedding" if self.tied else "head"].T


def normed(hidden: Any, gain: Any) -> Any:
    return hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-5) * gain


def turned(heads: Any) -> Any:
    """(T, heads, D), each adjacent pair turned as one complex number."""
    length, _, size = heads.shape
    angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)  # (T, D/2)
    pairs = (heads[..., 0::2] + 1j * heads[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([pairs.real, pairs.imag], -1).reshape(heads.shape)


def checkpoint(folder: Path, content: bytes) -> Path:
    path = folder / "toy.bin"
    path.write_bytes(content)
    return path


IDS = [1, 264, 7, 100, 7, 33, 259, 260, 261, 7, 0, 2]


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_computes_what_llama2c_computes(version, tied, tmp_path):
    toy = Toy(tied=tied)
    source = open_source(checkpoint(tmp_path, toy.version1() if version else toy.version0()))
    with torch.no_grad():
        found = source.module(torch.tensor([IDS]), torch.arange(len(IDS))[None])[0].numpy()
    expected = toy.logits(IDS)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_header_becomes_the_configuration(tmp_path):
    source = open_source(checkpoint(tmp_path, Toy(tied=False).version0()), Opening(context_length=12))
    config = source.config
    assert (source.name, source.context_length, config["max_position_embeddings"]) == ("toy", 12, 12)
    assert (config["model_type"], config["tie_word_embeddings"], config["head_dim"]) == ("llama", False, 6)
    assert (config["intermediate_size"], config["num_key_value_heads"], config["vocab_size"]) == (33, 2, 265)
    # A text ends with </s>, or with the <s> that begins the next one.
    assert (source.bos_token_id, source.eos_token_ids, source.tokenizer) == (1, (2, 1), None)


# --- a file that cannot be read -----------------------------------------------------------------------------------
WHOLE = Toy().version0()
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes, which is less than the header of a llama2.c checkpoint"),
    "a header alone": (WHOLE[:28], f"has 28 bytes and its header asks for {len(WHOLE):,}: it was cut short or alter"),
    "cut": (WHOLE[:-1], f"has {len(WHOLE) - 1:,} bytes and its header asks for {len(WHOLE):,}"),
    "cut, of version 1": (Toy().version1()[:-4], "its header asks for"),
    "version 2": (Toy().version1(2), "is of llama2.c's format version 2, the one with int8 weights, and pastkey reads"),
    "a zip file": (b"PK\3\4" + bytes(300), "its header would mean dim 67324752, hidden_dim 0"),
    "heads that do not divide": (dataclasses.replace(Toy(), heads=5).version0(), "would mean dim 24, hidden_dim 33"),
    "K/V heads": (struct.pack("<7i", 24, 33, 2, 4, 3, 265, 19) + bytes(99), "n_heads 4, n_kv_heads 3"),
    "context": (struct.pack("<7i", 24, 33, 2, 4, 2, 265, -1) + bytes(99), "max_seq_len -1"),
    "vocabulary": (struct.pack("<7i", 24, 33, 2, 4, 2, -(2**31), 19) + bytes(99), "vocab_size 2147483648"),
    "layers": (struct.pack("<7i", 2, 1, 100_000, 1, 1, 3, 2) + bytes(4), "n_layers 100000"),
}


@pytest.mark.parametrize("spoilt", REFUSED)
def test_a_file_that_is_no_whole_checkpoint_is_refused_before_a_layer_is_made(spoilt, tmp_path, monkeypatch):
    content, words = REFUSED[spoilt]
    monkeypatch.setattr("pastkey.export.source.llama2c.Decoder", None)
    path = checkpoint(tmp_path, content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))} .*{re.escape(words)}"):
        open_source(path)


def test_a_file_that_claims_a_size_and_has_no_content_is_refused_for_its_memory(tmp_path):
    path = checkpoint(tmp_path, struct.pack("<7i", 4096, 33, 2, 4, 2, 1 << 24, 19))
    os.truncate(path, 1 << 38)
    with pytest.raises(InputError, match="and its header asks for") as caught:
        open_source(path)
    os.truncate(path, int(str(caught.value).split("asks for ")[1].split(":")[0].replace(",", "")))
    with pytest.raises(ResourceError, match="of memory and"):
        open_source(path)


# --- the tokenizer ------------------------------------------------------------------------------------------------
RESERVED: list[Piece] = [
    (b"<unk>", 0.0),
    (b"\n<s>\n", 0.0),
    (b"\n</s>\n", 0.0),
    *((f"<0x{byte:02X}>".encode(), 0.0) for byte in range(256)),
]
LETTERS = [" ", "a", "b", "c", "é", "日", "<", ">", "s"]
# Longer pieces have lower scores or higher ones, some can be made in several ways, and some equal others' parts.
JOINED = [" a", "ab", "bc", "abc", "  ", " ab", "aa", "aaa", "ca", "caé", "é日", " b", "    ", "bb"]
PIECES = [
    *RESERVED,
    *((text.encode(), -1000.0 - i) for i, text in enumerate(LETTERS)),
    *((text.encode(), -float(i * 7 % 15)) for i, text in enumerate(JOINED)),
]


def tokenizer_bin(pieces: list[Piece]) -> bytes:
    longest = max(len(text) for text, _ in pieces)
    return struct.pack("<i", longest) + b"".join(struct.pack("<fi", score, len(text)) + text for text, score in pieces)


def encoded(text: str, pieces: list[Piece]) -> list[int]:
    """llama2.c's encoding, as its documentation describes it: merge the best-scored pair until none is left."""
    number = {piece: i for i, (piece, _) in enumerate(pieces)}
    ids = []
    for character in (" " + text if text else "").replace("▁", " "):
        data = character.encode()
        ids += [number[data]] if data in number else [byte + 3 for byte in data]
    while True:
        pairs = [pieces[a][0] + pieces[b][0] for a, b in itertools.pairwise(ids)]
        scores = [pieces[number[pair]][1] if pair in number else -np.inf for pair in pairs]
        if not scores or max(scores) == -np.inf:
            return [1, *ids]
        best = scores.index(max(scores))
        ids[best : best + 2] = [number[pairs[best]]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tok.bin").write_bytes(tokenizer_bin(PIECES))
    toy = dataclasses.replace(Toy(), vocab=len(PIECES))
    content = open_source(checkpoint(folder, toy.version0()), Opening(tokenizer=folder / "tok.bin")).tokenizer
    assert content is not None
    return Tokenizer.from_buffer(content)


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("aabbcc   é日<s>/xß\n🙂"), max_size=24))
def test_text_becomes_llama2cs_ids_and_comes_back(tokenizer, text):
    if any(special in text for special in ("<s>", "</s>")):
        return  # special tokens in a prompt are taken for what they are called
    ids = tokenizer.encode(text).ids
    assert ids == encoded(text, PIECES)
    assert tokenizer.decode(ids) == text


@pytest.mark.oldest
@pytest.mark.slow
def test_a_bundle_computes_and_takes_text_as_llama2c(tmp_path):
    (tmp_path / "tok.bin").write_bytes(tokenizer_bin(PIECES))
    toy = dataclasses.replace(Toy(), vocab=len(PIECES))
    out = tmp_path / "bundle"
    model = checkpoint(tmp_path, toy.version0())
    manifest = export(model, out, precision="fp32", tokenizer=tmp_path / "tok.bin").manifest
    assert (manifest.graph, manifest.bos_token_id, manifest.eos_token_ids) == ("standard", 1, (2, 1))
    lm = load(out)
    assert lm.prompt_ids("abc é") == encoded("abc é", PIECES)
    assert lm.prompt_ids("") == [1]
    expected = toy.logits(IDS)
    assert np.abs(lm.logits(IDS) - expected).max() < 1e-5 * np.abs(expected).max()
    assert '"add_bos_token": true' in (out / names.TOKENIZER_CONFIG).read_text()


def test_a_tokenizer_json_is_taken_too_and_the_format_keeps_its_own_end(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = open_source(checkpoint(tmp_path, WHOLE), Opening(tokenizer=tmp_path / "tokenizer.json"))
    assert source.tokenizer == (tmp_path / "tokenizer.json").read_bytes()
    assert (source.bos_token_id, source.eos_token_ids) == (1, (2, 1))


GOOD = tokenizer_bin(PIECES)
REFUSED_TOKENIZERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a llama2.c tokenizer, or was cut short: piece 0, at byte 4, cannot be read"),
    "cut": (GOOD[:-1], f"piece {len(PIECES) - 1}, at byte"),
    "a length below 0": (GOOD[:4] + struct.pack("<fi", 0, -3) + GOOD[12:], "piece 0, at byte 4"),
    "not UTF-8": (tokenizer_bin([*PIECES[:-1], (b"\xff\xfe", 0.0)]), f"piece {len(PIECES) - 1}, at byte"),
    "too few": (tokenizer_bin(PIECES[:-1]), f"{len(PIECES) - 1} pieces and the model {len(PIECES)} embeddings"),
    "a long piece": (tokenizer_bin([*PIECES[:-1], (b"a" * 1001, 0.0)]), f"piece {len(PIECES) - 1}, at byte"),
    "another order": (tokenizer_bin([*PIECES[259:], *RESERVED]), "are not <unk>, <s>, </s>, the 256 bytes, and then"),
    "a piece twice": (tokenizer_bin([*PIECES[:-1], PIECES[-2]]), "each its own text"),
}


@pytest.mark.parametrize("spoilt", REFUSED_TOKENIZERS)
def test_a_tokenizer_that_does_not_fit_is_refused(spoilt, tmp_path):
    content, words = REFUSED_TOKENIZERS[spoilt]
    (tmp_path / "tok.bin").write_bytes(content)
    model = checkpoint(tmp_path, dataclasses.replace(Toy(), vocab=len(PIECES)).version0())
    with pytest.raises(InputError, match=rf"tok\.bin .*{words}"):
        open_source(model, Opening(tokenizer=tmp_path / "tok.bin"))
