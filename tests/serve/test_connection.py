"""Headers that are too long, or come too slowly."""

from __future__ import annotations

import contextlib
import socket

import pytest

from .conftest import running


@pytest.fixture(scope="module")
def hasty(bundle):
    with running(bundle, receive_seconds=0.3) as served:
        yield served


def read(client: socket.socket) -> bytes:
    """What the server sends until it closes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(1000):
            found += piece
    return found


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX:"])
def test_headers_that_do_not_end_in_time_close_the_connection(hasty, sent):
    with socket.create_connection(("127.0.0.1", hasty.port), 60) as client:
        client.sendall(sent)
        assert read(client) == b""


def test_the_second_request_of_a_connection_has_the_same_time(hasty):
    with socket.create_connection(("127.0.0.1", hasty.port), 60) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
        assert read(client).endswith(b'{"status":"ok"}')


def test_endless_headers_are_refused(hasty):
    with socket.create_connection(("127.0.0.1", hasty.port), 60) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                client.sendall(b"X: " + b"y" * 8000 + b"\r\n")
        assert b" 200 " not in read(client)
    assert hasty.ask("/health")[0] == 200


def test_what_is_no_http_is_refused(hasty):
    with socket.create_connection(("127.0.0.1", hasty.port), 60) as client:
        client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        found = read(client)
    assert found.startswith(b"HTTP/1.1 400 ")
    assert found.endswith(b"Invalid HTTP request received.")
