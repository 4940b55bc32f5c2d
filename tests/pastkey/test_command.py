"""None"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable

import pytest

from pastkey import __main__ as module
from pastkey import command
from pastkey.errors import InputError
from pastkey.runtime.commands import inspection


@pytest.mark.parametrize(
    ("read", "text", "found"),
    [
        (command.positive_int, "1", 1),
        (command.positive_int, "0", "0 is not a whole number from 1"),
        (command.natural_int, "0", 0),
        (command.natural_int, "-1", "-1 is not a whole number from 0"),
        (command.finite_float, "-1e-3", -0.001),
        (command.finite_float, "nan", "nan is not a finite number"),
        (command.finite_float, "many", "'many' is not a number"),
        (command.id_list, "1, 2,,3", [1, 2, 3]),
        (command.id_list, "1,a", "'1,a' is not a list of token ids such as 1,2,3"),
    ],
)
def test_an_argument_is_read_or_one_of_another_kind_named(read, text, found):
    try:
        value = read(text)
    except argparse.ArgumentTypeError as error:
        value = str(error)
    assert value == found


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--prompt", "hi", "--top-k", "-1"], "argument --top-k: -1 is not a whole number from 0"),
        (["--promt", "hi"], "no flag --promt; did you mean --prompt?"),
        (["--prompt", "hi", "--zzz"], "no flag --zzz"),
        (["--top", "1"], "the following arguments are required: --prompt"),  # a beginning is enough
        (["hi"], "'hi' is given without a flag; the following arguments are required: --prompt"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line_and_status_2(capsys, given, sentence):
    parser = command.Parser(prog="pastkey run")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--top-k", type=command.natural_int)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(given)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"pastkey run: {sentence} (see pastkey run --help)\n"


def test_more_threads_than_cores_are_told(capsys):
    parser = command.Parser(prog="pastkey run")
    command.add_placement(parser)
    for given, threads in (([], None), (["--threads", "1"], 1), (["--threads", "250"], 250)):
        assert command.placement_of(parser.parse_args(given))["threads"] == threads
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("warning: --threads 250 is more than the ")


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


# --- the last resort: an error that nobody foresaw is a sentence with the file, and status 2 -----------------------
def instead(monkeypatch: pytest.MonkeyPatch, run: Callable[[object], int]) -> None:
    monkeypatch.setattr(inspection, "inspect_command", module.Command(inspection.inspect_command.add_arguments, run))


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(arguments: object) -> int:
        raise error

    instead(monkeypatch, run)


def test_an_unforeseen_error_names_the_file_that_was_read(command, monkeypatch, tmp_path):
    (tmp_path / "pastkey.json").write_text('{"kind": "bundle"}')
    status, _, _ = command("inspect", tmp_path)
    assert status == 2
    failing(monkeypatch, KeyError("layers"))
    status, out, err = command("inspect", tmp_path)
    assert (status, out) == (2, "")
    assert "stopped by a fault ('layers'; KeyError in test_command.py, line" in err
    assert f"after reading {tmp_path / 'pastkey.json'}, which may be damaged" in err
    assert err.count("\n") == 1
    monkeypatch.setenv(module.TRACEBACK, "1")
    assert "Traceback (most recent call last)" in command("inspect", tmp_path)[2]


ENDS = [
    (ModuleNotFoundError("No module", name="else"), 2, "pastkey inspect: stopped by a fault"),
    (RecursionError(), 2, "pastkey inspect: stopped by a fault"),
    (InputError("type  pastkey run 'a  b'  and\ntry again"), 2, "pastkey inspect: type  pastkey run 'a  b'  and try"),
    (SystemExit(143), 143, ""),  # which a command asked for
]


@pytest.mark.parametrize(("error", "status", "words"), ENDS, ids=repr)
def test_no_error_ends_in_status_1(error, status, words, command, monkeypatch, tmp_path):
    failing(monkeypatch, error)
    found, _, err = command("inspect", tmp_path)
    assert found == status
    assert err.startswith(words)


def test_a_chat_without_jinja_ends_before_the_export(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr("pastkey.exported.exported", lambda source: pytest.fail("exports"))
    status, _, err = command("chat", "org/name", "--prompt", "x")
    assert status == 2
    assert "type  pip install '.[chat]'  in" in err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
@pytest.mark.parametrize(("handler", "status"), [(signal.SIG_DFL, 129), (signal.SIG_IGN, 143)])
def test_a_closed_terminal_ends_a_command_unless_it_is_ignored_as_under_nohup(command, monkeypatch, handler, status):
    def run(arguments: object) -> int:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        return 0

    instead(monkeypatch, run)
    before = signal.signal(signal.SIGHUP, handler), signal.getsignal(signal.SIGTERM)
    try:
        assert command("inspect", "bundle")[0] == status
        assert (signal.getsignal(signal.SIGHUP) == handler) == (handler == signal.SIG_IGN)
    finally:
        for number, each in zip((signal.SIGHUP, signal.SIGTERM), before, strict=True):
            signal.signal(number, each)


@pytest.mark.skipif(sys.platform == "win32", reason="nobody sends SIGTERM on Windows")
def test_a_signal_whose_exception_python_drops_ends_the_command(command, monkeypatch):
    def run(arguments: object) -> int:
        node = argparse.Namespace()
        reference = weakref.ref(node, lambda _: signal.raise_signal(signal.SIGTERM))
        del node
        gc.collect()
        assert reference() is None
        time.sleep(10)
        return 0

    instead(monkeypatch, run)
    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    try:
        assert command("inspect", "bundle") == (143, "", "")
        assert sys.unraisablehook is before[1]
    finally:
        signal.signal(signal.SIGTERM, before[0])


def test_a_misspelt_command_is_named_with_the_nearest(command):
    assert command("chta") == (2, "", "pastkey: no command 'chta'; did you mean chat?\n")
    assert command("inspect", "a\udcffb")[0] == 2  # a path that is no text


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX closes the streams")
@pytest.mark.parametrize("closed", ["1>&-", "0<&- 1>&- 2>&-"])
def test_a_standard_stream_that_is_closed_is_no_fault(closed):
    told = "import sys; from pastkey.__main__ import main; sys.exit(main(['devices']))"
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, told], check=False)
    assert done.returncode == 0
