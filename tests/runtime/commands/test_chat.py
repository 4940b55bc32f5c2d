"""`pastkey chat` of one question, and what it draws by."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pastkey.runtime import load

from ..conftest import TEMPLATE
from .conftest import FLAGS, SETTINGS, fails


def test_tokens_are_drawn_as_the_models_authors_set_it(tiny, letters, make_bundle, piped):
    sampling = {"do_sample": True, "temperature": 1.3, "top_k": 9, "top_p": 1.0}
    config = {"chat_template": TEMPLATE}
    made = make_bundle(tiny, "fused", tokenizer=letters, tokenizer_config=config, generation_config=sampling)
    own = load(made.path, threads=1)
    authors = "as the model's generation_config.json has it: temperature 1.3, top_k 9 (--temperature 0 takes the likeli"
    cases: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
        ((), {"temperature": 1.3, "top_k": 9}, authors),
        (("--temperature", "0.5", "--top-k", "0"), {"temperature": 0.5}, ""),
        (("--temperature", "0"), {}, ""),
    ]
    for flags, settings, said in cases:
        answer = own.chat().ask("abc", max_new_tokens=7, seed=1, **settings).text
        status, out, err = piped(b"abc\n", "chat", made.path, "--max-new-tokens", "7", "--seed", "1", *flags)
        assert (status, out) == (0, answer + "\n")
        assert err[: len(authors)] == said


def test_one_question(talking, model, command, piped):
    answer = model.chat("be brief").ask("abc", **SETTINGS)
    arguments = ("chat", talking, "--system", "be brief", *FLAGS, "--prompt")
    assert command(*arguments, "abc") == (0, answer.text + "\n", "")
    assert piped(b"abc\n", *arguments, "-") == (0, answer.text + "\n", "")
    found = json.loads(command(*arguments, "abc", "--json")[1])
    seconds = found.pop("seconds")
    assert seconds > 0
    assert found == {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "abc"},
            {"role": "assistant", "content": answer.text},
        ],
        "text": answer.text,
        "ids": answer.ids,
        "finish_reason": "length",
        "stop_string": None,
        "prompt_tokens": len("<system>be brief.<user>abc.<assistant>"),
        "cached_tokens": 0,
        "new_tokens": 7,
    }


def test_another_template(talking, model, tmp_path, command):
    other = tmp_path / "other.jinja"
    other.write_text("{% for m in messages %}{{ m.content }}é{% endfor %}", encoding="utf-8")
    answer = model.chat(template=other).ask("abc", **SETTINGS)
    assert answer.ids == model.generate("abcé", **SETTINGS).ids != model.chat().ask("abc", **SETTINGS).ids
    status, out, _ = command("chat", talking, "--template", other, "--prompt", "abc", "--no-prompt-lookup", *FLAGS)
    assert (status, out) == (0, answer.text + "\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--json"], ["--json holds the answer to one question", "--prompt TEXT"]),
        (["--prompt", "a", "--temperature", "-1"], ["--temperature: '-1' was given"]),
        (["--prompt", "a", "--template", "none.jinja"], ["no such file: none.jinja"]),
        (["--colour"], ["--colour"]),
    ],
)
def test_bad_input(talking, command, arguments, words):
    fails(command("chat", talking, *arguments), *words)


def test_a_bundle_that_cannot_chat_says_so_at_once(speaking_bundle, fused_bundle, command):
    fails(command("chat", speaking_bundle.path), "has no chat template", "pastkey run")
    fails(command("chat", fused_bundle.path), "has no tokenizer", "--prompt-ids")
