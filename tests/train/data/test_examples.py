"""Which tokens are trained, in each format; and that a token never spans the end of a prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import decoders, pre_tokenizers, processors

from pastkey.errors import InputError
from pastkey.train.data.chat import conversation_parts
from pastkey.train.data.documents import Conversation, PromptAnswer, document_of
from pastkey.train.data.examples import Example, encode_examples
from pastkey.train.tokenizer import TextTokenizer, train_bpe, train_char

from .helpers import CHATML, MARKED, chat, chat_tokenizer, trained_text

PAIR = {"prompt": "the cat ", "completion": "sat"}


def example_of(row: Any, tokenizer: TextTokenizer) -> Example:
    (example,) = encode_examples([document_of(row, "row 1")], tokenizer)
    return example


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_turn_is_trained_with_its_end_and_nothing_behind_as_transformers_masks_it(template, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = chat_tokenizer(template)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    row = chat("the cat", "sat on the mat", "a dog?", "\nsaw a cat")
    example = example_of(row, ours)
    assert trained_text(example, ours) == ["sat on the mat<|im_end|>", "\nsaw a cat<|im_end|>"]
    assert example.end == ours.tokenizer.token_to_id("<|im_end|>")
    options = {"return_dict": True, "return_assistant_tokens_mask": True, "chat_template": MARKED}
    expected = theirs.apply_chat_template(row["messages"], **options)
    assert example.ids.tolist() == list(expected["input_ids"])
    assert example.trained.astype(int).tolist() == list(expected["assistant_masks"])


def test_a_prompt_has_the_tokens_that_it_has_for_generation():
    tokenizer = train_bpe(["the cat sat on the mat"] * 3, 280)
    assert tokenizer.encode("cat sat")[-1] == tokenizer.encode(" sat")[0]  # one token, were it not for the boundary
    example = example_of(PAIR, tokenizer)
    prompt = tokenizer.prompt("the cat ")
    assert example.ids[: len(prompt)].tolist() == prompt
    assert trained_text(example, tokenizer) == ["sat<|endoftext|>"]
    assert not example.trained[: len(prompt)].any()


def test_offsets_without_spaces_do_not_move_the_boundary():
    tokenizer = train_bpe(["the cat sat on the mat"] * 3, 280)
    template = tokenizer.tokenizer.post_processor
    tokenizer.tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    expected = [tokenizer.end, *tokenizer.encode("the cat "), *tokenizer.encode("sat")]
    assert example_of(PAIR, tokenizer).ids[:-1].tolist() == expected


def test_a_tokenizer_that_puts_a_space_in_front_of_a_text_puts_one_in_front():
    tokenizer = train_bpe(["\u2581the\u2581cat\u2581sat"] * 3, 300)
    spaces = pre_tokenizers.Metaspace(prepend_scheme="first")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.tokenizer.pre_tokenizer = pre_tokenizers.Sequence([spaces, words])
    tokenizer.tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Metaspace(prepend_scheme="first")])
    example = example_of({"prompt": "the", "completion": " cat"}, tokenizer)
    assert example.ids[1:-1].tolist() == tokenizer.encode("the cat")


def test_a_text_is_trained_as_a_whole():
    tokenizer = train_char(["the cat"])
    example = example_of({"text": "the cat"}, tokenizer)
    assert trained_text(example, tokenizer) == ["the cat<|endoftext|>"]
    assert example.ids[0] == tokenizer.begin
    assert not example.trained[0]


def test_an_answer_without_a_special_token_has_no_end():
    plain = chat_tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
                           "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")  # fmt: skip
    example = example_of(chat("hi", "hello"), plain)
    assert trained_text(example, plain) == ["hello\n"]
    assert example.end is None


def test_an_unknown_character_is_named_by_its_place():
    documents = [document_of({"text": "cat"}, "line 1"), document_of({"text": "dog"}, "line 2")]
    with pytest.raises(InputError, match=r"line 2: the text has a word or character"):
        encode_examples(documents, train_char(["the cat"]))


# --- each format's rows, and the sentences for rows of no format ---------------------------------------------------
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "content", "texts"),
    [
        ({"text": "a", "id": 3}, "a", ["a"]),
        ({"prompt": "a", "completion": "b"}, PromptAnswer("a", "b"), ["ab"]),
        ({"messages": MESSAGES, "text": "x"}, Conversation(MESSAGES), ["a", "b"]),
        ({"messages": MESSAGES, "tools": [{"name": "t"}]}, Conversation(MESSAGES, [{"name": "t"}]), ["a", "b"]),
        ({"messages": None, "prompt": None, "text": "a"}, "a", ["a"]),  # as Parquet fills rows
    ],
)
def test_a_row_becomes_a_document(row, content, texts):
    document = document_of(row, "a.jsonl, line 1")
    assert document.content == content
    assert list(document.texts()) == texts
    assert document.canonical() != document_of({"text": "".join(texts)}, "").canonical() or not document.masked
    assert document.masked == (not isinstance(content, str))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (["a"], r"line 1 is \['a'\]; expected an object such as"),
        ({}, "line 1 has the fields none; expected text, or prompt and completion, or messages"),
        ({"text": 3}, "line 1: text is 3; it must be a text"),
        ({"text": "\ud800"}, "it must be a text"),
        ({"prompt": "a", "completion": MESSAGES}, "a conversation goes into the field messages"),
        ({"messages": []}, r"messages is \[\]; it must be a list of messages"),
        ({"messages": "hi"}, "messages is 'hi'; it must be a list"),
        ({"messages": ["hi"]}, "a message is 'hi'; each must be an object with role and content"),
        ({"messages": [{"from": "human", "content": "hi"}]}, "each must be an object with role and content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "each must be an object with role and content"),
        ({"messages": MESSAGES, "tools": ["t"]}, "it must be a list of JSON schemas"),
    ],
)
def test_a_row_of_no_format_is_refused(row, sentence):
    with pytest.raises(InputError, match=sentence):
        document_of(row, "a.jsonl, line 1")


# --- the assistant's turns are found by the template's mark, or by rendering up to them; else the template is refused
TALK = Conversation(chat("hi", "hello", "bye", "bye")["messages"])


def test_a_template_reads_the_special_tokens_and_tools():
    template = "{{ bos_token }}{{ tools | length if tools else 0 }}" + CHATML
    tokenizer = replace(chat_tokenizer(template), special_tokens={"bos_token": "<s>"})
    talk = replace(TALK, tools=[{"type": "function"}])
    assert conversation_parts(talk, tokenizer)[0][0].startswith("<s>1<|im_start|>user")


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_it_marks_them():
    # as templates do that leave the reasoning of earlier turns out
    last = "{% if loop.last %}<think></think>{% endif %}"
    with pytest.raises(InputError, match="does not write message 2 as a continuation of those before it"):
        conversation_parts(TALK, chat_tokenizer(CHATML.replace("{{ '<|im_start|>'", last + "{{ '<|im_start|>'")))
    marked = chat_tokenizer(MARKED.replace("{{ '<|im_start|>'", last + "{{ '<|im_start|>'", 1))
    assert [trained for _, trained in conversation_parts(TALK, marked)] == [False, True, False, True, False]
    assert conversation_parts(TALK, chat_tokenizer("")) == [("", False)]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "messages need a tokenizer with a chat template"),
        ("{% if %}", "the chat template does not accept this conversation"),
        ("{{ raise_exception('roles must alternate') }}", "does not accept this conversation: roles must alternate"),
    ],
)
def test_a_template_that_cannot_render_is_refused(template, sentence):
    with pytest.raises(InputError, match=sentence):
        conversation_parts(TALK, chat_tokenizer(template))
