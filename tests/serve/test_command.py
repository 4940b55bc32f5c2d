"""The flags, the key, and the port."""

import socket

import pytest

from pastkey.command import Parser
from pastkey.errors import InputError
from pastkey.serve.command import KEY, listen, serve_command, settings_of
from pastkey.serve.settings import ServerSettings


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)


def parsed(*words):
    parser = Parser(prog="pastkey serve")
    serve_command.add_arguments(parser)
    return parser.parse_args(["b", *words])


def test_without_flags_the_settings_are_the_defaults():
    assert settings_of(parsed()) == ServerSettings(names=("b",))
    found = settings_of(parsed("--max-queue", "0", "--alias", "x", "--alias", "y", "--default", "top_k=3"))
    assert (found.max_queue, found.names, found.defaults) == (0, ("x", "y"), {"top_k": 3})
    assert settings_of(parsed("--allow-origin", "https://MyBox.local")).allow_origins == ("https://mybox.local",)
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
def test_an_address_that_is_not_loopback_needs_a_key(host, monkeypatch):
    for loopback in ("127.0.0.1", "localhost", "LocalHost", "::1", "127.1.2.3"):
        assert settings_of(parsed("--host", loopback)).host == loopback
    with pytest.raises(InputError, match="no key is set: add --api-key-file"):
        settings_of(parsed("--host", host))
    assert settings_of(parsed("--host", host, "--insecure")).host == host
    monkeypatch.setenv(KEY, "x")
    assert settings_of(parsed("--host", host)).host == host


NO_BYTES = {f"--max-memory={given}": "argument --max-memory: " for given in ("inf", "-inf", "nan", "1e999", "4GB", "")}
REFUSED = NO_BYTES | {
    "--default=temprature=1": "--default temprature=1 was given; docs/output.md lists the names",
    "--default=temperature=x": "--default temperature=x was given; a JSON value was expected",
    "--default=temperature=-1": "temperature is -1",
    "--port=99999": "cannot listen on 127.0.0.1",
    "--host=203.0.113.9": "cannot listen on 203.0.113.9",
    "--host=no.such.host.invalid": "cannot listen on no.such.host.invalid",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_a_wrong_setting_is_a_sentence(flag, command, monkeypatch):
    monkeypatch.setenv(KEY, "x")
    status, out, err = command("serve", "nowhere", "--port=0", flag)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"pastkey serve: {REFUSED[flag]}")


def test_a_port_in_use_is_told_as_that():
    told = pytest.raises(InputError, match=r"port \d+ \(another program listens there\)")
    with socket.create_server(("127.0.0.1", 0)) as taken, told:
        listen("127.0.0.1", taken.getsockname()[1])
