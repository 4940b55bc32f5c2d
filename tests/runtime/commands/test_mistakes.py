"""A typing mistake gives one sentence, exit status 2, and no file."""

import shlex
from pathlib import Path

import pytest

from pastkey.errors import MissingFileError
from pastkey.runtime import load

from ..bulk.rows import plain_rows, write_rows
from .conftest import fails

MISTAKES = {  # B is a bundle
    "run B --prompt ''": "the prompt is empty",
    "run B --prompt 'a\udcff'": "UTF-8",
    "run B --prompt-ids '1;2'": "'1;2' is not a list of token ids",
    "run B --prompt a --prompt-ids 1": "not allowed with",
    "run B --prompt a --temperature hot": "--temperature: 'hot' was given; it must be a number from 0",
    "run B --prompt a --temperature -1": "--temperature: '-1' was given",
    "run B --prompt a --threads 0": "whole number from 1",
    "run B --prompt a --provider cuda9": "'cuda9' is unknown",
    "run B --prompt a --colour red": "--colour",
    "run B --prompt a --suppress-tokens 99999": "suppress_tokens holds 99999; token ids are whole numbers",
    "chat B --json": "--json holds the answer to one question",
    "chat B --prompt a --template none.jinja": "no such file: none.jinja",
    "batch B none --out out": "no such file",
    "batch . rows --out out": "is not a bundle",
    "batch B twice --out out": "has the id 0 twice",
    "batch B rows --out out --shard=0/2": "--shard is '0/2'; I/N was expected",
    "batch B rows --out out --shard=3/2": "--shard is '3/2'; I/N was expected",
    "batch B rows --out out --shard=a/b": "--shard is 'a/b'; I/N was expected",
    "batch B rows --out out --draft=b": "no flag --draft",
    "batch B rows --out out --limit seconds=2": "--limit is for a bundle that is not trusted",
    "bench B --limit seconds=2": "--limit is for a bundle that is not trusted",
    "sign --key key.pem": "--key signs a bundle: name its folder",
    "sign b": "one of the arguments --key --new-key is required",
    "sign b --key ''": ". is a folder; a file was expected",
    "sign --new-key .": "'.' is not the name of a file",
    "sign b --key k.pem --untrusted": "no flag --untrusted",
    "run B --limit seconds=2 --prompt a": "--limit is for a bundle that is not trusted: add --untrusted",
    "run B --untrusted --limit colour=2 --prompt a": "--limit colour=2 was given; memory=BYTES or seconds=S",
    "run B --untrusted --limit memory=much --prompt a": "--limit memory=much was given",
    "run B --untrusted --limit memory=inf --prompt a": "memory=inf",
    "run B --untrusted --limit seconds=-1 --prompt a": "seconds is -1.0",
    "run B --untrusted --provider-option a=b --prompt a": "an untrusted bundle runs on the CPU only",
    "run B --untrusted --provider cuda --prompt a": "an untrusted bundle runs on the CPU only",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence_and_no_file(command, talking, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows", plain_rows(2))
    write_rows(tmp_path / "twice", [*plain_rows(2), *plain_rows(1)])
    fails(command(*shlex.split(line.replace(" B", f" {talking}", 1))), MISTAKES[line])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["run", "chat", "bench", "inspect"])
def test_what_is_no_bundle(command, tmp_path, name):
    prompt = ["--prompt", "a"] if name in ("run", "chat") else []
    for path, words in (
        (tmp_path / "none", "no such bundle"),
        (tmp_path, "is not a bundle"),
        (Path(__file__), "is a file"),
    ):
        fails(command(name, path, *prompt), words)


def test_a_bundle_that_lacks_what_a_command_needs(command, speaking_bundle, fused_bundle):
    fails(command("run", fused_bundle.path, "--prompt", "a"), "has no tokenizer", "--prompt-ids")
    fails(command("chat", fused_bundle.path), "has no tokenizer", "--prompt-ids")
    fails(command("chat", speaking_bundle.path), "has no chat template", "pastkey run")


def test_a_bundle_that_lost_its_manifest_is_told_as_that(command, make_bundle, tiny):
    path = make_bundle(tiny, "static", chunk=4).path
    (path / "config.json").write_text("{}")  # as every exported bundle has
    (path / "pastkey.json").unlink()
    for name, *flags in (("run", "--prompt", "a"), ("inspect",), ("run", "--prompt", "a", "--untrusted")):
        fails(command(name, path, *flags), f"{path} is a bundle without its pastkey.json: copy the whole folder again")
    with pytest.raises(MissingFileError, match=r"is a bundle without its pastkey\.json"):
        load(path)
