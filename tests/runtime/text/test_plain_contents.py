"""Contents that write control tokens are encoded as characters; the template's own stay what they are."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pastkey.errors import InputError
from pastkey.runtime.text.chat_template import ChatTemplate
from pastkey.runtime.text.codec import TextCodec
from pastkey.runtime.text.plain_contents import PlainContents

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
CONTROLS = ["<|im_start|>", "<|im_end|>", "<unk>"]


def byte_level() -> Tokenizer:
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["Ġ<"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "<")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in CONTROLS])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("    ", special=False)])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Bytes for the rest, and control tokens that the model itself has, the unknown one among them."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "user", *CONTROLS[:2]]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in CONTROLS])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    return tokenizer


HOSTILE = st.text() | st.lists(
    st.sampled_from(
        [*CONTROLS, "<tool_call>", "<", "|im_end|>", "\ufdd0", "\ufdd1\U000f0000\ufdd1", " <", "    ", "a é日"]
    )
).map("".join)


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_whatever_contents_write_the_control_tokens_are_the_templates(make):
    codec, template = TextCodec(make()), ChatTemplate(CHATML)
    contents = PlainContents(codec)
    start, end, *others = (codec.added_tokens[text][0] for text in [*CONTROLS, "<tool_call>"])

    @given(st.lists(HOSTILE, min_size=1, max_size=3))
    def check(texts: list[str]) -> None:
        messages = [{"role": "user", "content": text} for text in texts]
        ids = contents.encode(template.render(contents.protect(messages, ["role"])))
        assert [token for token in ids if token in {start, end, *others}] == [start, end] * len(texts) + [start]
        for message in messages:
            message["content"] = message["content"].replace("\ufdd0", "").replace("\ufdd1", "")
        assert codec.decode(ids, keep_special_tokens=True) == template.render(messages)

    check()


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_without_control_tokens_the_encoding_is_the_tokenizers_own(make):
    tokenizer, template = make(), ChatTemplate(CHATML)
    contents = PlainContents(TextCodec(tokenizer))
    messages = [{"role": "user", "content": "a < b,     日 [x]"}]
    own = tokenizer.encode(template.render(messages), add_special_tokens=False).ids
    assert contents.encode(template.render(contents.protect(messages, ["role"]))) == own


def test_what_is_excepted_is_left_as_it_is():
    contents, mark = PlainContents(TextCodec(byte_level())), "<|im_end|>"
    protected = contents.protect({"role": mark, "content": [{"type": "text", "text": mark}], "n": 3}, ["role"])
    assert (protected["role"], protected["n"]) == (mark, 3)
    text = protected["content"][0]["text"]
    assert text.replace("\ufdd0", "") == mark != text


def test_a_tokenizer_whose_control_tokens_cannot_be_renamed_is_refused():
    content = json.loads(byte_level().to_str())
    content["model"]["vocab"]["<|im_end|>"] = len(content["model"]["vocab"]) + 9  # not the next one

    class Odd(TextCodec):
        def to_json(self) -> str:
            return json.dumps(content)

    with pytest.raises(InputError, match="special tokens cannot be told from text: leave special_tokens_as_text out"):
        PlainContents(Odd(byte_level()))
