"""`pastkey run` as a user types it."""

import json
import os
import subprocess
import sys

import pytest

from .conftest import fails


@pytest.fixture
def run(command, speaking_bundle):
    """run(*FLAGS): the result for the prompt abc."""
    return lambda *flags: command("run", speaking_bundle.path, "--prompt", "abc", *flags)


def test_it_prints_the_continuation_and_nothing_else(run, lm):
    text = lm.generate("abc", max_new_tokens=9).text
    assert run("--max-new-tokens", 9) == (0, text + "\n", "")
    assert run("--max-new-tokens", 9, "--stop", "~", "--stop", text[3:5])[1] == text[: text.index(text[3:5])] + "\n"
    letter = next(letter for letter in text if letter.strip())
    assert letter not in run("--max-new-tokens", 9, "--bad-word", letter)[1]


def test_json_is_one_object_with_these_keys(run, lm):
    settings = {"max_new_tokens": 9, "temperature": 1.2, "top_p": 0.9, "seed": 5}
    settings |= {"top_k": 9, "min_p": 0.01, "repetition_penalty": 1.1}
    expected = lm.generate("abc", **settings)
    flags = [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), value)]
    status, out, err = run(*flags, "--json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert list(found) == [
        "text", "ids", "finish_reason", "prompt_tokens", "new_tokens", "prefill_seconds", "decode_seconds",
        "stop_string", "draft_tokens", "accepted_tokens", "forced_tokens", "dropped_tokens",
    ]  # fmt: skip
    assert (found["text"], found["ids"], found["new_tokens"]) == (expected.text, expected.ids, 9)
    found = json.loads(run("--max-new-tokens", 3, "--json", "--logprobs", 2)[1])
    assert [entry["id"] for entry in found["logprobs"]] == found["ids"]
    assert [entry["top"][0] for entry in found["logprobs"]] == [[e["id"], e["logprob"]] for e in found["logprobs"]]


def test_draft_tokens_change_no_text(command, run, speaking_bundle, standard_bundle):
    plain, drafted, alone = (
        json.loads(run("--prompt", "abcabc", "--max-new-tokens", 100, "--json", *flags)[1])
        for flags in ([], ["--prompt-lookup"], ["--no-prompt-lookup"])
    )
    assert plain["ids"] == drafted["ids"] == alone["ids"]
    assert drafted["draft_tokens"] > 0 == alone["draft_tokens"]
    drawn = ("--temperature", "1", "--seed", "1", "--json")
    plain, drafted = (json.loads(run(*drawn, *more)[1]) for more in ([], ["--draft", speaking_bundle.path]))
    assert drafted["ids"] == plain["ids"]
    assert drafted["accepted_tokens"] > plain["accepted_tokens"]
    arguments = ("--prompt-ids", "1", "--draft", standard_bundle.path)
    fails(command("run", standard_bundle.path, *arguments), "a draft model is of no use to")


def test_ids_without_a_tokenizer_are_answered_with_ids(command, fused_bundle, tiny):
    arguments, expected = ("run", fused_bundle.path, "--max-new-tokens", 4, "--prompt-ids"), tiny.greedy([1, 2, 3], 4)
    status, out, _ = command(*arguments, "1,2, 3")
    assert (status, [int(word) for word in out.split()]) == (0, expected)
    found = json.loads(command(*arguments, "1,2,3", "--json")[1])
    assert (found["ids"], found["text"]) == (expected, "")


def test_the_prompt_is_read_from_standard_input(speaking_bundle, command, piped):
    asked = ("run", speaking_bundle.path, "--max-new-tokens", 5, "--prompt")
    assert piped(b"ab\xc3\xa9\n", *asked, "-") == command(*asked, "abé")
    fails(piped(b"ab\xff", *asked, "-"), "UTF-8")


def test_a_terminal_of_another_encoding_shows_what_it_can_and_a_closed_pipe_is_no_error(speaking_bundle):
    program = f"{sys.executable} -m pastkey run {speaking_bundle.path} --prompt a --temperature 9 --seed 1"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(["sh", "-c", program], capture_output=True, env=environment, check=True)
    assert b"?" in done.stdout
    program += " --max-new-tokens 500 | head -c 1"
    assert subprocess.run(["sh", "-c", program], capture_output=True, check=True).stderr == b""


def test_a_text_is_held_to_what_a_flag_says(run, tmp_path):
    pytest.importorskip("llguidance")
    assert run("--regex", "(abba ){2}") == (0, "abba abba \n", "")
    assert run("--choice", "dce", "--choice", "dcb")[1] in ("dce\n", "dcb\n")
    grammar, schema = tmp_path / "g.lark", tmp_path / "s.json"
    grammar.write_text('start: "a" b\nb: "é日"\n', encoding="utf-8")
    schema.write_text('{"type": "null"}', encoding="utf-8")
    assert run("--grammar", grammar) == (0, "aé日\n", "")
    assert run("--json-schema", schema) == (0, "null\n", "")
    fails(run("--json-schema", grammar), "json_schema is not JSON")
    fails(run("--json-schema", tmp_path / "none.json"), "no such file")
    fails(run("--regex", "("), "regex cannot be followed")
