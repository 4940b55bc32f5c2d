"""The flags, the key, and the port."""

from __future__ import annotations

import argparse
import socket

import pytest

from pastkey.__main__ import main
from pastkey.command import Parser
from pastkey.errors import InputError
from pastkey.serve.command import KEY, listen, serve_command, settings_of
from pastkey.serve.settings import ServerSettings


def parsed(*words: str) -> argparse.Namespace:
    parser = Parser(prog="pastkey serve")
    serve_command.add_arguments(parser)
    return parser.parse_args(["b", *words])


def test_without_flags_the_settings_are_the_defaults(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    assert settings_of(parsed()) == ServerSettings(names=("b",))
    found = settings_of(parsed("--max-queue", "0", "--alias", "x", "--alias", "y", "--default", "top_k=3"))
    assert (found.max_queue, found.names, found.defaults) == (0, ("x", "y"), {"top_k": 3})
    assert settings_of(parsed("--allow-origin", "https://MyBox.local")).allow_origins == ("https://mybox.local",)


@pytest.mark.parametrize("given", ["inf", "-inf", "nan", "1e999", "4GB", ""])
def test_a_memory_that_is_no_number_of_bytes_is_a_sentence(given, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "nowhere", f"--max-memory={given}"])
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.startswith("pastkey serve: argument --max-memory: ")
    assert " is not a " in told
    assert parsed("--max-memory", "4e9").max_memory == 4_000_000_000


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n", encoding="utf-8")
    monkeypatch.setenv(KEY, "three")
    assert settings_of(parsed()).keys == ("three",)
    found = settings_of(parsed("--api-key-file", str(file)))
    assert found.keys == ("one", "two")
    assert "one" not in repr(found)
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(InputError, match="has no key"):
        settings_of(parsed("--api-key-file", str(file)))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_another_address_needs_a_key(host, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(InputError, match="no key is set: add --api-key-file"):
        settings_of(parsed("--host", host))
    assert settings_of(parsed("--host", host, "--insecure")).host == host
    monkeypatch.setenv(KEY, "x")
    assert settings_of(parsed("--host", host)).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LocalHost", "::1", "127.1.2.3"])
def test_loopback_needs_none(host, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    assert settings_of(parsed("--host", host)).host == host


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        ("temprature=1", "docs/sampling.md lists the names"),
        ("temperature=x", "a JSON value was expected"),
        ("temperature=-1", "temperature is -1"),
    ],
)
def test_a_wrong_default_is_told(pair, told, capsys):
    assert main(["serve", "nowhere", "--port", "0", "--default", pair]) == 2
    assert told in capsys.readouterr().err


def test_a_port_in_use_is_a_sentence(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tmp_path), "--port", port]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"pastkey serve: cannot listen on 127.0.0.1 port {port} (another program listens there)")


@pytest.mark.parametrize(("host", "port"), [("203.0.113.9", 0), ("no.such.host.invalid", 0), ("127.0.0.1", 99999)])
def test_an_address_that_is_not_here_is_a_sentence(host, port):
    with pytest.raises(InputError, match=f"cannot listen on {host}"):
        listen(host, port)
