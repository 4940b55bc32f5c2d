"""`pastkey run` as a user types it, good input and bad."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pastkey.errors import MissingFileError
from pastkey.runtime import load
from pastkey.runtime.speculation.worth import Worth

from .conftest import fails


def test_run_prints_the_continuation_and_nothing_else(command, speaking_bundle):
    expected = load(speaking_bundle.path, threads=1).generate("abc", max_new_tokens=9).text
    arguments = ["run", speaking_bundle.path, "--prompt", "abc", "--max-new-tokens", 9]
    assert command(*arguments) == (0, expected + "\n", "")


def test_run_json_is_one_object_with_these_keys(command, speaking_bundle):
    settings: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.2, "top_p": 0.9, "seed": 5}
    settings |= {"top_k": 9, "min_p": 0.01, "repetition_penalty": 1.1}
    expected = load(speaking_bundle.path, threads=1).generate("abc", **settings)
    flags = [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), value)]
    status, out, err = command("run", speaking_bundle.path, "--prompt", "abc", *flags, "--json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert list(found) == [
        "text", "ids", "finish_reason", "prompt_tokens", "new_tokens", "prefill_seconds", "decode_seconds",
        "stop_string", "draft_tokens", "accepted_tokens", "forced_tokens", "dropped_tokens",
    ]  # fmt: skip
    assert (found["text"], found["ids"], found["new_tokens"]) == (expected.text, expected.ids, 9)


def test_run_json_has_log_probabilities_where_they_are_asked_for(command, speaking_bundle):
    arguments = ["run", speaking_bundle.path, "--prompt", "abc", "--max-new-tokens", 3, "--json", "--logprobs", 2]
    found = json.loads(command(*arguments)[1])
    assert [entry["id"] for entry in found["logprobs"]] == found["ids"]
    assert [entry["top"][0] for entry in found["logprobs"]] == [[e["id"], e["logprob"]] for e in found["logprobs"]]


def test_run_takes_bans(command, speaking_bundle):
    arguments = ["run", speaking_bundle.path, "--prompt", "abc", "--max-new-tokens", 12]
    plain = command(*arguments)[1].strip()
    letter = next(letter for letter in plain if letter.strip())
    assert letter not in command(*arguments, "--bad-word", letter)[1]
    status, _, err = command(*arguments, "--suppress-tokens", "99999")
    assert status == 2
    assert "suppress_tokens holds 99999; token ids are whole numbers" in err


def test_run_decodes_with_draft_tokens_or_without(command, speaking_bundle):
    arguments = ["run", speaking_bundle.path, "--prompt", "abcabc", "--max-new-tokens", 100, "--json"]
    plain, drafted, alone = (
        json.loads(command(*arguments, *flags)[1]) for flags in ([], ["--prompt-lookup"], ["--no-prompt-lookup"])
    )
    assert plain["ids"] == drafted["ids"] == alone["ids"]
    assert drafted["draft_tokens"] > 0 == alone["draft_tokens"]


def test_a_draft_model_changes_no_text(command, speaking_bundle, standard_bundle, monkeypatch):
    monkeypatch.setattr(Worth, "tokens", lambda self, rate, behind, most: min(3, most))
    arguments = ["run", speaking_bundle.path, "--prompt", "abc", "--temperature", "1", "--seed", "1", "--json"]
    plain, drafted = (json.loads(command(*arguments, *more)[1]) for more in ([], ["--draft", speaking_bundle.path]))
    assert drafted["ids"] == plain["ids"]
    assert drafted["accepted_tokens"] > plain["accepted_tokens"]
    status, _, err = command("run", standard_bundle.path, "--prompt-ids", "1", "--draft", standard_bundle.path)
    assert (status, "a draft model is of no use to" in err) == (2, True)


def test_run_with_ids_and_no_tokenizer_prints_ids(command, bundle):
    expected = load(bundle.path, threads=1).generate([1, 2, 3], max_new_tokens=4).ids
    status, out, _ = command("run", bundle.path, "--prompt-ids", "1,2, 3", "--max-new-tokens", 4)
    assert (status, [int(word) for word in out.split()]) == (0, expected)
    status, out, _ = command("run", bundle.path, "--prompt-ids", "1,2,3", "--max-new-tokens", 4, "--json")
    assert (json.loads(out)["ids"], json.loads(out)["text"]) == (expected, "")


def test_run_stops_before_a_stop_string(command, speaking_bundle):
    text = command("run", speaking_bundle.path, "--prompt", "abc")[1]
    _, out, _ = command("run", speaking_bundle.path, "--prompt", "abc", "--stop", "~", "--stop", text[3:5])
    assert out == text[: text.index(text[3:5])] + "\n"


def test_run_reads_the_prompt_from_standard_input(speaking_bundle, command, piped):
    asked = ("run", speaking_bundle.path, "--max-new-tokens", 5, "--prompt")
    assert piped(b"ab\xc3\xa9\n", *asked, "-") == command(*asked, "abé")
    fails(piped(b"ab\xff", *asked, "-"), "UTF-8")


def test_run_on_a_terminal_of_another_encoding_shows_what_it_can(speaking_bundle):
    program = [
        sys.executable,
        "-m",
        "pastkey",
        "run",
        speaking_bundle.path,
        "--prompt",
        "abc",
    ]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [*program, "--temperature", "9", "--seed", "1"], capture_output=True, env=environment, check=True
    )
    assert b"?" in done.stdout


def test_a_closed_pipe_is_no_error(speaking_bundle):
    program = f"{sys.executable} -m pastkey run {speaking_bundle.path} --prompt a --max-new-tokens 500 | head -c 1"
    done = subprocess.run(["sh", "-c", program], capture_output=True, check=True)
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], ["the prompt is empty"]),
        (["--prompt", "a\udcff"], ["UTF-8"]),
        (["--prompt-ids", "1;2"], ["'1;2' is not a list of token ids"]),
        (["--prompt", "a", "--prompt-ids", "1"], ["not allowed with"]),
        (["--prompt", "a", "--temperature", "hot"], ["--temperature: 'hot' was given; it must be a number from 0"]),
        (["--prompt", "a", "--temperature", "-1"], ["--temperature: '-1' was given"]),
        (["--prompt", "a", "--threads", "0"], ["whole number from 1"]),
        (["--prompt", "a", "--provider", "cuda9"], ["'cuda9' is unknown", "cpu"]),
        (["--prompt", "a", "--colour", "red"], ["--colour"]),
    ],
)
def test_bad_input_to_run(command, speaking_bundle, arguments, words):
    fails(command("run", speaking_bundle.path, *arguments), *words)


def test_a_text_for_a_bundle_without_tokenizer(command, bundle):
    fails(command("run", bundle.path, "--prompt", "a"), "has no tokenizer", "--prompt-ids")


@pytest.mark.parametrize("name", ["run", "chat", "bench", "inspect"])
def test_what_is_no_bundle(command, tmp_path, name):
    prompt = ["--prompt", "a"] if name in ("run", "chat") else []
    fails(command(name, tmp_path / "none", *prompt), "no such bundle")
    fails(command(name, tmp_path, *prompt), "is not a bundle")
    fails(command(name, Path(__file__), *prompt), "is a file")


def test_a_bundle_that_lost_its_manifest_is_told_as_that(command, make_bundle, tiny):
    path = make_bundle(tiny, "static", chunk=4).path
    (path / "config.json").write_text("{}")  # as every exported bundle has
    (path / "pastkey.json").unlink()
    for name, *flags in (("run", "--prompt", "a"), ("inspect",), ("run", "--prompt", "a", "--untrusted")):
        fails(command(name, path, *flags), f"{path} is a bundle without its pastkey.json: copy the whole folder again")
    with pytest.raises(MissingFileError, match=r"is a bundle without its pastkey\.json"):
        load(path)


def test_run_holds_a_text_to_what_a_flag_says(command, speaking_bundle, tmp_path):
    pytest.importorskip("llguidance")
    asked = ("run", speaking_bundle.path, "--prompt", "abc")
    assert command(*asked, "--regex", "(abba ){2}") == (0, "abba abba \n", "")
    assert command(*asked, "--choice", "dce", "--choice", "dcb")[1] in ("dce\n", "dcb\n")
    grammar, schema = tmp_path / "g.lark", tmp_path / "s.json"
    grammar.write_text('start: "a" b\nb: "é日"\n', encoding="utf-8")
    schema.write_text('{"type": "null"}', encoding="utf-8")
    assert command(*asked, "--grammar", grammar) == (0, "aé日\n", "")
    assert command(*asked, "--json-schema", schema) == (0, "null\n", "")
    fails(command(*asked, "--json-schema", grammar), "json_schema is not JSON")
    fails(command(*asked, "--json-schema", tmp_path / "none.json"), "no such file")
    fails(command(*asked, "--regex", "("), "regex cannot be followed")
