from __future__ import annotations

import argparse
import json

import pytest

from pastkey import command
from pastkey.errors import InputError


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (command.positive_int, "1", 1),
        (command.natural_int, "0", 0),
        (command.finite_float, "-1e-3", -0.001),
        (command.id_list, "1, 2,,3", [1, 2, 3]),
    ],
)
def test_an_argument_is_read(read, text, value):
    assert read(text) == value


@pytest.mark.parametrize(
    ("read", "text", "sentence"),
    [
        (command.positive_int, "0", "0 is not a whole number from 1"),
        (command.natural_int, "-1", "-1 is not a whole number from 0"),
        (command.finite_float, "nan", "nan is not a finite number"),
        (command.finite_float, "many", "'many' is not a number"),
        (command.id_list, "1,a", "'1,a' is not a list of token ids such as 1,2,3"),
    ],
)
def test_an_argument_of_another_kind_is_named(read, text, sentence):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        read(text)
    assert str(caught.value) == sentence


def test_a_mistake_in_the_arguments_is_one_line_and_status_2(capsys):
    parser = command.Parser(prog="pastkey run")
    parser.add_argument("--top-k", type=command.natural_int)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--top-k", "-1"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told == "pastkey run: argument --top-k: -1 is not a whole number from 0 (see pastkey run --help)\n"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--promt", "hi"], "no flag --promt; did you mean --prompt?"),
        (["--prompt", "hi", "--zzz"], "no flag --zzz"),
        (["--top", "1"], "the following arguments are required: --prompt"),  # a beginning is enough
        (["hi"], "'hi' stands without a flag; the following arguments are required: --prompt"),
    ],
)
def test_a_flag_that_is_none_is_named_with_the_nearest(capsys, given, sentence):
    parser = command.Parser(prog="pastkey run")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--top-k", type=command.natural_int)
    with pytest.raises(SystemExit):
        parser.parse_args(given)
    assert capsys.readouterr().err == f"pastkey run: {sentence} (see pastkey run --help)\n"


@pytest.mark.parametrize(("threads", "told"), [(None, ""), (1, ""), (250, "warning: --threads 250 is more than the ")])
def test_more_threads_than_cores_are_told(capsys, threads, told):
    parser = command.Parser(prog="pastkey run")
    command.add_placement(parser)
    given = [] if threads is None else ["--threads", str(threads)]
    assert command.placement_of(parser.parse_args(given))["threads"] == threads
    err = capsys.readouterr().err
    assert err.startswith(told)
    assert err.count("\n") == bool(told)


def test_input_is_utf_8():
    assert command.decode_input("Zoë 日".encode()) == "Zoë 日"
    with pytest.raises(InputError, match="standard input is not UTF-8 text: byte 2 is 0xeb"):
        command.decode_input(b"Zo\xeb")


def test_json_is_one_line_of_standard_output(capsys):
    command.say("said")
    command.print_json({"text": "Zoë\n"})
    out, err = capsys.readouterr()
    assert (json.loads(out), out.count("\n"), "Zoë" in out) == ({"text": "Zoë\n"}, 1, True)
    assert err == "said\n"
    with pytest.raises(ValueError, match="Out of range float"):
        command.print_json({"loss": float("nan")})


def test_a_terminal_gets_no_control_characters(monkeypatch, capsys):
    text = "a\x1b[2J\tb\x9b1m\rc\n"
    command.print_text(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    command.print_text(text)
    command.say("no bundle: \x1b]0;x\x07")
    out, err = capsys.readouterr()
    assert out == "a\N{REPLACEMENT CHARACTER}[2J\tb\N{REPLACEMENT CHARACTER}1m\N{REPLACEMENT CHARACTER}c\n"
    assert "\x1b" not in err + out
    assert "\x07" not in err
