"""Completions: several prompts, echo and log-probabilities as lm_eval reads them."""

import pytest

from pastkey.runtime import load

from ...runtime.adapters import lora, write_adapter
from ...runtime.decoding.batching import waiting
from ...runtime.tiny_decoder import Tiny
from ..conftest import CHAT, COMPLETIONS, HI, ids_of, running, write_tiny


@pytest.mark.oldest
def test_texts_ids_and_lists_of_them_are_continued_in_order(served):
    texts = [one.text for one in served.model.generate(["abc", "so "], max_new_tokens=4)]
    for prompt in (["abc", "so "], [ids_of("abc"), ids_of("so ")]):
        reply = served.ask(COMPLETIONS, {"prompt": prompt, "max_tokens": 4})[1]
        assert [choice["text"] for choice in reply["choices"]] == texts
        assert reply["usage"]["prompt_tokens"] == 6
    for one in ("abc", ids_of("abc")):
        assert served.choices(COMPLETIONS, prompt=one, max_tokens=4)[0]["text"] == texts[0]
    assert served.ask("/completions", {"prompt": "abc"})[1]["usage"]["completion_tokens"] == 16


def test_a_limit_of_minus_one_is_the_contexts_end(served):
    full = served.model.manifest.context_length + 1  # the last token is told and never read
    assert served.ask(COMPLETIONS, {"prompt": "abc", "max_tokens": -1})[1]["usage"]["total_tokens"] == full
    for limit in ({}, {"max_tokens": -1}, {"max_completion_tokens": -1, "max_tokens": 3}):
        assert served.ask(CHAT, {"messages": HI, **limit})[1]["usage"]["total_tokens"] == full


def test_a_stream_has_the_texts_of_the_whole_reply(served):
    body = {"prompt": ["abc", "so "], "max_tokens": 4, "echo": True, "n": 2, "seed": 1, "temperature": 1.0}
    *chunks, done = served.events(COMPLETIONS, {**body, "stream_options": {"include_usage": False}})
    texts, reasons = [""] * 4, [""] * 4
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert (done, reasons) == ("[DONE]", ["length"] * 4)
    assert texts == [choice["text"] for choice in served.choices(COMPLETIONS, **body)]
    assert texts[0].startswith("abc")


def test_the_chunks_of_a_stream_go_on_counting_characters(served):
    body = {"prompt": "abc", "max_tokens": 6, "logprobs": 1, "seed": 1}
    *chunks, _ = served.events(COMPLETIONS, {**body, "stream_options": {"include_usage": False}})
    columns = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    streamed = [offset for column in columns for offset in column["text_offset"]]
    assert streamed == served.ask(COMPLETIONS, body)[1]["choices"][0]["logprobs"]["text_offset"]
    assert streamed == sorted(set(streamed))


@pytest.mark.parametrize("tokens", [0, 1])
def test_echo_with_log_probabilities_scores_the_prompt(served, tokens):
    body = {"prompt": ids_of("abca"), "max_tokens": tokens, "echo": True, "logprobs": 2}
    reply = served.ask(COMPLETIONS, body)[1]
    (choice,) = reply["choices"]
    columns = choice["logprobs"]
    assert columns["tokens"][:4] == list("abca")
    assert len(columns["tokens"]) == len(columns["text_offset"]) == 4 + tokens
    assert columns["token_logprobs"][0] is None
    assert columns["token_logprobs"][1:4] == pytest.approx(served.model.score(ids_of("abca")).logprobs[1:])
    assert all(len(top) == 2 for top in columns["top_logprobs"][1:])
    assert (choice["text"] == "abca") == (tokens == 0)
    assert (reply["usage"]["completion_tokens"], choice["finish_reason"]) == (tokens, "length")


NO_TOKENS = [({}, {"max_tokens": 0}), ({"max_new_tokens": 0}, {}), ({"max_new_tokens": 0}, {"n": 2})]


@pytest.mark.parametrize(("defaults", "given"), NO_TOKENS)
def test_echo_without_new_tokens_is_the_prompt_alone(saying, defaults, given):
    """Whether streamed or not, also where the model would end the text at once."""
    n, body = given.get("n", 1), {"prompt": "abc", "echo": True, **given}
    with running(saying("abc", ""), defaults=defaults) as served:
        for more in ({}, {"logprobs": 1}):
            reply = served.ask(COMPLETIONS, {**body, **more})[1]
            assert [(one["text"], one["finish_reason"]) for one in reply["choices"]] == [("abc", "length")] * n
            assert reply["usage"]["completion_tokens"] == 0
        *chunks, last, _ = served.events(COMPLETIONS, {**body, "stream_options": {"include_usage": True}})
        told = [(each["index"], each["text"], each["finish_reason"]) for chunk in chunks for each in chunk["choices"]]
        assert told == [(i, "abc", None) for i in range(n)] + [(i, "", "length") for i in range(n)]
        assert last["usage"]["completion_tokens"] == 0
        assert served.choices(COMPLETIONS, **body | {"echo": False})[0]["text"] == ""


def test_a_request_with_an_adapters_name_as_its_model_is_answered_with_it(tmp_path):
    tiny = Tiny.random([(8, 8)], context_length=600)
    bundle = write_tiny(tmp_path / "tiny", tiny, adapters=True)
    adapter = write_adapter(tmp_path / "poems", lora(tiny, ["wq0", "wo0"]))
    with running(lambda: load(bundle, threads=1, adapters={"poems": adapter}), adapters=("poems",)) as served:
        waiting.until(lambda: served.service.is_loaded)
        texts = set()
        for name, adapted in (("tiny", None), ("poems", "poems")):
            reply = served.ask(COMPLETIONS, {"prompt": "abc", "max_tokens": 9, "model": name})[1]
            texts.add(reply["choices"][0]["text"])
            expected = served.model.generate("abc", max_new_tokens=9, adapter=adapted).text
            assert (reply["model"], reply["choices"][0]["text"]) == (name, expected)
        assert len(texts) == 2
        assert [model["id"] for model in served.ask("/v1/models")[1]["data"]] == ["tiny", "poems"]
        status, reply = served.ask("/v1/embeddings", {"input": "abc", "model": "poems"})
        assert (status, reply["error"]["code"]) == (404, "model_not_found")
