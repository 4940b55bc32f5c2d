"""The last resort: an error that nobody foresaw is a sentence with the file, and status 2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from pastkey import __main__ as module
from pastkey.errors import InputError
from pastkey.runtime.commands import inspection

Command = Callable[..., tuple[int, str, str]]


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(arguments: object) -> int:
        raise error

    monkeypatch.setattr(inspection, "inspect_command", module.Command(inspection.inspect_command.add_arguments, run))


def test_an_unforeseen_error_names_the_file_that_was_read(command, monkeypatch, tmp_path):
    (tmp_path / "pastkey.json").write_text('{"kind": "bundle"}')
    status, _, _ = command("inspect", tmp_path)
    assert status == 2
    failing(monkeypatch, KeyError("layers"))
    status, out, err = command("inspect", tmp_path)
    assert (status, out) == (2, "")
    assert "stopped by a fault ('layers'; KeyError in test___main__.py, line" in err
    assert f"after reading {tmp_path / 'pastkey.json'}, which may be damaged" in err
    assert err.count("\n") == 1
    monkeypatch.setenv(module.TRACEBACK, "1")
    assert "Traceback (most recent call last)" in command("inspect", tmp_path)[2]


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module", name="else"), RecursionError(), AssertionError()])
def test_no_error_ends_in_status_1(error, command, monkeypatch, tmp_path):
    failing(monkeypatch, error)
    status, _, err = command("inspect", tmp_path)
    assert status == 2
    assert err.startswith("pastkey inspect: stopped by a fault")


def test_a_command_in_a_sentence_keeps_its_spaces(command, monkeypatch, tmp_path):
    failing(monkeypatch, InputError("type  pastkey run 'a  b'  and\ntry again"))
    assert command("inspect", tmp_path)[2] == "pastkey inspect: type  pastkey run 'a  b'  and try again\n"


def test_a_chat_without_jinja_ends_before_the_export(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr("pastkey.exported.exported", lambda source: pytest.fail("exports"))
    status, _, err = command("chat", "org/name", "--prompt", "x")
    assert status == 2
    assert "type  pip install jinja2  and try again" in err


def test_the_end_that_a_command_asks_for_is_kept(command, monkeypatch, tmp_path):
    failing(monkeypatch, SystemExit(143))
    assert command("inspect", tmp_path)[0] == 143


def test_a_misspelt_command_is_named_with_the_nearest(command):
    assert command("chta") == (2, "", "pastkey: no command 'chta'; did you mean chat?\n")


def test_a_path_that_is_no_text_is_shown(command):
    status, _, err = command("inspect", "a\udcffb")
    assert status == 2
    assert "no such bundle" in err


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX closes the streams")
@pytest.mark.parametrize("closed", ["1>&-", "0<&- 1>&- 2>&-"])
def test_a_standard_stream_that_is_closed_is_no_fault(closed):
    told = "import sys; from pastkey.__main__ import main; sys.exit(main(['devices']))"
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, told], check=False)
    assert done.returncode == 0
