"""`pastkey chat` of one question, and what it draws by."""

from __future__ import annotations

import json

import pytest

from pastkey.runtime import load

from ..conftest import TEMPLATE
from .conversation import FLAGS, SETTINGS, chat, fails


# --- the model's own sampling -------------------------------------------------------------------------------------
def test_tokens_are_drawn_as_the_models_authors_set_it(tiny, letters, make_bundle):
    sampling = {"do_sample": True, "temperature": 1.3, "top_k": 9, "top_p": 1.0}
    config = {"chat_template": TEMPLATE}
    made = make_bundle(tiny, "fused", tokenizer=letters, tokenizer_config=config, generation_config=sampling)
    own = load(made.path, threads=1)
    answer = own.chat().ask("abc", max_new_tokens=7, seed=1, temperature=1.3, top_k=9).text
    done = chat(made.path, "--max-new-tokens", "7", "--seed", "1", given=b"abc\n")
    assert done.stdout.decode() == answer + "\n"
    told = "as the model's generation_config.json has it: temperature 1.3, top_k 9 (--temperature 0 takes the likeliest"
    assert done.stderr.decode().startswith(told)
    done = chat(made.path, "--max-new-tokens", "7", "--seed", "1", "--temperature", "0.5", "--top-k", "0", given=b"abc")
    assert done.stdout.decode() == own.chat().ask("abc", max_new_tokens=7, seed=1, temperature=0.5).text + "\n"
    assert done.stderr == b""
    done = chat(made.path, "--max-new-tokens", "7", "--temperature", "0", given=b"abc")
    assert done.stdout.decode() == own.chat().ask("abc", max_new_tokens=7).text + "\n"
    assert done.stderr == b""


# --- one question -------------------------------------------------------------------------------------------------
def test_one_question(talking, model):
    answer = model.chat("be brief").ask("abc", **SETTINGS)
    arguments = ["--system", "be brief", "--prompt", "abc", *FLAGS]
    done = chat(talking, *arguments)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, answer.text + "\n", b"")
    assert chat(talking, *arguments[:2], "--prompt", "-", *FLAGS, given=b"abc\n").stdout == done.stdout
    found = json.loads(chat(talking, *arguments, "--json").stdout)
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


def test_another_template(talking, model, tmp_path):
    other = tmp_path / "other.jinja"
    other.write_text("{% for m in messages %}{{ m.content }}é{% endfor %}", encoding="utf-8")
    answer = model.chat(template=other).ask("abc", **SETTINGS)
    assert answer.ids == model.generate("abcé", **SETTINGS).ids != model.chat().ask("abc", **SETTINGS).ids
    done = chat(talking, "--template", str(other), "--prompt", "abc", "--no-prompt-lookup", *FLAGS)
    assert (done.returncode, done.stdout.decode()) == (0, answer.text + "\n")
    missing = str(tmp_path / "none")
    fails(chat(talking, "--template", missing, "--prompt", "a"), f"no such file: {missing}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--json"], ["--json holds the answer to one question", "--prompt TEXT"]),
        (["--prompt", "a", "--temperature", "-1"], ["temperature is -1.0"]),
        (["--colour"], ["--colour"]),
    ],
)
def test_bad_input(talking, arguments, words):
    fails(chat(talking, *arguments), *words)


def test_a_bundle_that_cannot_chat_says_so_at_once(speaking_bundle, bundle):
    fails(chat(speaking_bundle.path), "has no chat template", "pastkey run")
    fails(chat(bundle.path), "has no tokenizer", "--prompt-ids")
