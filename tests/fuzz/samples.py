"""The parts of valid files, and small ones of formats that no package here writes."""

from __future__ import annotations

import struct

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<|user|>{{ message['content'] | trim }}"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Yes?"}]
CORPUS = "the cat sat on the mat.\nthe dog sat in the inn! " * 30


def word_tokenizer() -> Tokenizer:
    letters = [*"abcdefghijklmnopqrstuvwxyz .,!?", "th", "he", "in", "<s>", "</s>", "<unk>"]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("h", "e"), ("i", "n")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("\t", " "), normalizers.NFC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return tokenizer


def gguf_valid() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("llama.block_count") + struct.pack("<II", 4, 1),
        text("llama.rope.freq_base") + struct.pack("<If", 6, 1e4),
        text("tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("b") + text("c"),
        text("scores") + struct.pack("<IIQ3f", 9, 6, 3, 0.0, 1.0, 2.0),
    ]
    tensors = [text(f"t{i}") + struct.pack("<IQQIQ", 2, 4, 2, 0, 32 * i) for i in range(2)]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs + tensors)
    return head + bytes(-len(head) % 32) + bytes(64)


def llama2c_valid() -> bytes:
    sizes = (8, 12, 1, 2, 1, 300, 16)  # width, inner, layers, heads, K/V heads, vocabulary, context
    query, kv = 8 * 8, 4 * 8
    numbers = 300 * 8 + 8 + query + 2 * kv + query + 8 + 3 * 12 * 8 + 8 + 2 * 16 * 2
    return struct.pack("<7i", *sizes) + bytes(4 * numbers)


def llama2c_tokenizer() -> bytes:
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256)), " ", "a", "b", "ab", " ab"]
    pieces += [f"<{number}>" for number in range(300 - len(pieces))]
    packed = (struct.pack("<fi", -i, len(piece.encode())) + piece.encode() for i, piece in enumerate(pieces))
    return struct.pack("<i", 10) + b"".join(packed)


def sentencepiece() -> bytes:
    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    texts = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab"]
    pieces = b"".join(
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", -i) + bytes([3 << 3, kinds.get(text, 1)]))
        for i, text in enumerate(texts)
    )
    return pieces + field(2, bytes([3 << 3, 2])) + field(3, b"")
