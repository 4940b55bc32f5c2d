"""llama2.c checkpoints: files written here by the format, of a decoder whose logits are known."""

from __future__ import annotations

import itertools
import os
import re
import struct

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor, nn

from pastkey.contract import names
from pastkey.errors import InputError, ResourceError
from pastkey.export import export
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Opening
from pastkey.runtime import load
from pastkey.train.model import Decoder

from ..decoders import llama
from .opening import save, write

Array = npt.NDArray[np.float32]
Piece = tuple[bytes, float]


# --- a checkpoint of any sizes ------------------------------------------------------------------------------------
SIZES = (24, 33, 2, 4, 2, 265, 19)  # heads of size 6 and odd widths, so that no two sizes can be mixed up
# The format's order of the weights, by the names that Llama has in PyTorch.
_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "down_proj", "up_proj")
ORDER = (
    ("embed_tokens", "input_layernorm", *_MATRICES, "post_attention_layernorm", *_MLP, "norm"),
    ("input_layernorm", "post_attention_layernorm", "norm", "embed_tokens", *_MATRICES, *_MLP),
)


def toy(*, vocab: int = 265, tied: bool = True) -> Decoder:
    """A random decoder of these sizes, also in its norms."""
    dim, hidden, layers, heads, kv_heads, _, context = SIZES
    model = llama(
        vocab_size=vocab, max_position_embeddings=context, hidden_size=dim, intermediate_size=hidden, head_dim=6,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        norm_eps=1e-5, rope_theta=10000.0,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4).add_(torch.randn(parameter.shape) * 0.1)
    return model


def content(model: Decoder, version: int = 0) -> bytes:
    """The model as llama2.c writes it."""
    state, tied = model.state_dict(), model.config.tie_word_embeddings
    sizes = [*SIZES[:5], model.config.vocab_size * (1 if tied or version else -1), SIZES[6]]
    header = struct.pack("<7i", *sizes)
    if version:
        header = (struct.pack("<Ii", 0x616B3432, version) + header + bytes([tied])).ljust(256, b"\0")
    blocks = [block for name in ORDER[version > 0] for block in _blocks(state, name)]
    table = [] if version else [torch.full((2, SIZES[6], 3), 7.0)]  # of positions, read by nobody
    head = [] if tied else [state["lm_head.weight"]]
    return header + b"".join(block.numpy().tobytes() for block in (*blocks, *table, *head))


def _blocks(state: dict[str, Tensor], name: str) -> list[Tensor]:
    """A weight of all layers. llama2.c turns adjacent pairs in each head of six, Llama in PyTorch those 3 apart."""
    found = [weight for full, weight in state.items() if full.split(".")[-2] == name]
    if name in ("q_proj", "k_proj"):
        found = [weight.unflatten(0, (-1, 2, 3)).transpose(1, 2).flatten(0, 2) for weight in found]
    return found


def logits(model: nn.Module) -> Array:
    with torch.no_grad():
        found: Array = model(torch.tensor([IDS]), torch.arange(len(IDS))[None])[0].numpy()
    return found


IDS = [1, 264, 7, 100, 7, 33, 259, 260, 261, 7, 0, 2]


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_computes_what_llama2c_computes(version, tied, tmp_path):
    model = toy(tied=tied)
    source = open_source(write(tmp_path / "toy.bin", content(model, version)))
    expected = logits(model)
    assert np.abs(logits(source.module) - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_header_becomes_the_configuration(tmp_path):
    source = open_source(write(tmp_path / "toy.bin", content(toy(tied=False))), Opening(context_length=12))
    config = source.config
    assert (source.name, source.context_length, config["max_position_embeddings"]) == ("toy", 12, 12)
    assert (config["model_type"], config["tie_word_embeddings"], config["head_dim"]) == ("llama", False, 6)
    assert (config["intermediate_size"], config["num_key_value_heads"], config["vocab_size"]) == (33, 2, 265)
    # A text ends with </s>, or with the <s> that begins the next one.
    assert (source.bos_token_id, source.eos_token_ids, source.tokenizer) == (1, (2, 1), None)


# --- a file that cannot be read -----------------------------------------------------------------------------------
WHOLE = content(toy())
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes, which is less than the header of a llama2.c checkpoint"),
    "a header alone": (WHOLE[:28], f"has 28 bytes and its header asks for {len(WHOLE):,}: it was cut short or alter"),
    "cut": (WHOLE[:-1], f"has {len(WHOLE) - 1:,} bytes and its header asks for {len(WHOLE):,}"),
    "cut, of version 1": (content(toy(), 1)[:-4], "its header asks for"),
    "version 2": (content(toy(), 2), "is of llama2.c's format version 2, the one with int8 weights"),
    "a zip file": (b"PK\3\4" + bytes(300), "its header would mean dim 67324752, hidden_dim 0"),
    "heads that do not divide": (struct.pack("<7i", 24, 33, 2, 5, 1, 265, 19) + bytes(99), "would mean dim 24, hidden"),
    "K/V heads": (struct.pack("<7i", 24, 33, 2, 4, 3, 265, 19) + bytes(99), "n_heads 4, n_kv_heads 3"),
    "context": (struct.pack("<7i", 24, 33, 2, 4, 2, 265, -1) + bytes(99), "max_seq_len -1"),
    "vocabulary": (struct.pack("<7i", 24, 33, 2, 4, 2, -(2**31), 19) + bytes(99), "vocab_size 2147483648"),
    "layers": (struct.pack("<7i", 2, 1, 100_000, 1, 1, 3, 2) + bytes(4), "n_layers 100000"),
}


@pytest.mark.parametrize("spoilt", REFUSED)
def test_a_file_that_is_no_whole_checkpoint_is_refused_before_a_layer_is_made(spoilt, tmp_path, monkeypatch):
    damaged, words = REFUSED[spoilt]
    monkeypatch.setattr("pastkey.export.source.llama2c.Decoder", None)
    path = write(tmp_path / "toy.bin", damaged)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))} .*{re.escape(words)}"):
        open_source(path)


def test_a_file_that_claims_a_size_and_has_no_content_is_refused_for_its_memory(tmp_path):
    path = write(tmp_path / "toy.bin", struct.pack("<7i", 4096, 33, 2, 4, 2, 1 << 24, 19))
    os.truncate(path, 1 << 38)
    with pytest.raises(InputError, match="and its header asks for") as caught:
        open_source(path)
    os.truncate(path, int(str(caught.value).split("asks for ")[1].split(":")[0].replace(",", "")))
    with pytest.raises(ResourceError, match="of memory and"):
        open_source(path)


# --- the tokenizer ------------------------------------------------------------------------------------------------
RESERVED: list[Piece] = [(text, 0.0) for text in (b"<unk>", b"\n<s>\n", b"\n</s>\n")]
RESERVED += [(f"<0x{byte:02X}>".encode(), 0.0) for byte in range(256)]
LETTERS = [" ", "a", "b", "c", "é", "日", "<", ">", "s"]
# Longer pieces have lower scores or higher ones, some can be made in several ways, and some equal others' parts.
JOINED = [" a", "ab", "bc", "abc", "  ", " ab", "aa", "aaa", "ca", "caé", "é日", " b", "    ", "bb"]
PIECES = [
    *RESERVED,
    *((text.encode(), -1000.0 - i) for i, text in enumerate(LETTERS)),
    *((text.encode(), -float(i * 7 % 15)) for i, text in enumerate(JOINED)),
]


TOY = toy(vocab=len(PIECES))


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
def files(tmp_path_factory):
    """A checkpoint and its tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return write(folder / "toy.bin", content(TOY)), write(folder / "tok.bin", tokenizer_bin(PIECES))


@pytest.fixture(scope="module")
def tokenizer(files):
    return Tokenizer.from_buffer(open_source(files[0], Opening(tokenizer=files[1])).tokenizer or b"")


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("aabbcc   é日<s>/xß\n🙂"), max_size=24))
def test_text_becomes_llama2cs_ids_and_comes_back(tokenizer, text):
    if any(special in text for special in ("<s>", "</s>")):
        return  # special tokens in a prompt are read as their names
    ids = tokenizer.encode(text).ids
    assert ids == encoded(text, PIECES)
    assert tokenizer.decode(ids) == text


@pytest.mark.oldest
@pytest.mark.slow
def test_a_bundle_computes_and_takes_text_as_llama2c(files, tmp_path):
    out = tmp_path / "bundle"
    manifest = export(files[0], out, precision="fp32", tokenizer=files[1]).manifest
    assert (manifest.graph, manifest.bos_token_id, manifest.eos_token_ids) == ("standard", 1, (2, 1))
    lm = load(out)
    assert lm.prompt_ids("abc é") == encoded("abc é", PIECES)
    assert lm.prompt_ids("") == [1]
    expected = logits(TOY)
    assert np.abs(lm.logits(IDS) - expected).max() < 1e-5 * np.abs(expected).max()
    assert '"add_bos_token": true' in (out / names.TOKENIZER_CONFIG).read_text()


def test_a_tokenizer_json_is_taken_too_and_the_format_keeps_its_own_end(tokenizer, files, tmp_path):
    path = save(tokenizer, tmp_path)
    source = open_source(files[0], Opening(tokenizer=path))
    assert source.tokenizer == path.read_bytes()
    assert (source.bos_token_id, source.eos_token_ids) == (1, (2, 1))


GOOD = tokenizer_bin(PIECES)
LAST = f"piece {len(PIECES) - 1}, at byte"
REFUSED_TOKENIZERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a llama2.c tokenizer, or was cut short: piece 0, at byte 4"),
    "cut": (GOOD[:-1], LAST),
    "a length below 0": (GOOD[:4] + struct.pack("<fi", 0, -3) + GOOD[12:], "piece 0, at byte 4"),
    "not UTF-8": (tokenizer_bin([*PIECES[:-1], (b"\xff\xfe", 0.0)]), LAST),
    "too few": (tokenizer_bin(PIECES[:-1]), f"{len(PIECES) - 1} pieces and the model {len(PIECES)} embeddings"),
    "a long piece": (tokenizer_bin([*PIECES[:-1], (b"a" * 1001, 0.0)]), LAST),
    "another order": (tokenizer_bin([*PIECES[259:], *RESERVED]), "are not <unk>, <s>, </s>, the 256 bytes"),
    "a piece twice": (tokenizer_bin([*PIECES[:-1], PIECES[-2]]), "each its own text"),
}


@pytest.mark.parametrize("spoilt", REFUSED_TOKENIZERS)
def test_a_tokenizer_that_does_not_fit_is_refused(spoilt, files, tmp_path):
    damaged, words = REFUSED_TOKENIZERS[spoilt]
    with pytest.raises(InputError, match=rf"tok\.bin .*{words}"):
        open_source(files[0], Opening(tokenizer=write(tmp_path / "tok.bin", damaged)))
