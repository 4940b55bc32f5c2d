"""Who may ask, how much, and how slowly."""

import contextlib
import re
import socket

import pytest

from .conftest import COMPLETIONS, running

BODY = {"prompt": "abc", "max_tokens": 1}


@pytest.fixture(scope="module")
def locked(bundle):
    settings = {"keys": ("QZ", "ß2", "密2", "\udce92"), "body_bytes": 1000, "receive_seconds": 0.3}
    with running(bundle, allow_origins=("https://a.b",), allow_hosts=("Proxy.a",), **settings) as served:
        yield served


def test_only_a_host_that_is_this_machine_may_be_asked(locked):
    """A page whose name was bound anew would send another one."""
    for host in ("localhost", "127.0.0.1:9", "[::1]:8080", "PROXY.A:80"):
        assert locked.ask("/health", Host=host) == (200, {"status": "ok"})
    for host in ("evil.com", "localhost.evil.com", "", "[", "0.0.0.0"):
        status, reply = locked.ask("/health", Host=host)
        assert (status, "Host header" in reply["error"]["message"]) == (403, True)


def test_a_page_of_another_site_may_not_ask_and_cors_headers_are_those_of_allowed_origins(served, locked):
    own = f"http://127.0.0.1:{served.port}"
    for origin, status in (("https://a.b", 403), ("null", 403), ("http://[", 403), (own, 200)):
        assert served.ask(COMPLETIONS, BODY, Origin=origin)[0] == status
    assert locked.ask(COMPLETIONS, BODY, Origin="https://a.b", Authorization="Bearer QZ")[0] == 200
    for server, origin, allowed in (
        (served, "https://a.b", None),
        (locked, "https://c.d", None),
        (locked, "https://a.b", "https://a.b"),
    ):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        with server.response(COMPLETIONS, method="OPTIONS", **asked) as response:
            assert response.headers["access-control-allow-origin"] == allowed


KEYS = [
    ({}, 401),
    ({"Authorization": "Bearer qz"}, 401),
    ({"Authorization": "Basic QZ"}, 401),
    ({"Authorization": "Bearer QZ"}, 200),
    ({"Authorization": "bearer QZ "}, 200),
    ({"X-Api-Key": "QZ"}, 200),
    ({"X-Api-Key": "ß2"}, 200),  # in Latin-1
    ({"Authorization": "Bearer 密2".encode()}, 200),
    ({"Authorization": "Bearer 密3".encode()}, 401),
    ({"X-Api-Key": b"\xe92"}, 200),
]


@pytest.mark.parametrize(("headers", "status"), KEYS)
def test_each_route_but_health_needs_a_key(locked, headers, status):
    for path, body in ((COMPLETIONS, BODY), ("/v1/models", None), ("/metrics", None), ("/openapi.json", None)):
        with locked.response(path, body, **headers) as response:
            assert response.status == status
    assert locked.ask("/health")[0] == 200
    assert locked.ask("/pastkey.json")[0] == 404  # the page, which has the weights


HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
POST = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: QZ\r\n".encode()
CHUNK = b"1f4\r\n" + b"x" * 500 + b"\r\n"
SENT = {  # the bytes sent, and those of the server until it closes
    "a large body": (POST + b"Content-Length: 1001\r\n\r\n" + b"x" * 1001, rb"HTTP/1.1 413 .*"),
    "a body of a length without end": (POST + b"Content-Length: 99999999999999999999\r\n\r\n", rb"HTTP/1.1 413 .*"),
    "a large body in chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNK * 3, rb"HTTP/1.1 413 .*"),
    "a body that does not come": (POST + b"Content-Length: 10\r\n\r\n", rb"HTTP/1.1 408 .*"),
    "nothing": (b"", b""),
    "headers without an end": (HEAD + b"X:", b""),
    "a second request without an end": (HEAD + b"\r\nGET /hea", rb'HTTP/1.1 200 .*{"status":"ok"}'),
    "no HTTP": (b"\x16\x03\x01 hello\r\n\r\n", rb"HTTP/1.1 400 .*Invalid HTTP request received\."),
    "endless headers": (HEAD + (b"X: " + b"y" * 8000 + b"\r\n") * 100, rb"(?!.* 200 ).*"),
}


@pytest.mark.parametrize(("sent", "expected"), SENT.values(), ids=SENT)
def test_headers_and_bodies_have_a_limit_of_size_and_time_however_they_are_sent(locked, sent, expected):
    found = b""
    with socket.create_connection(("127.0.0.1", locked.port), 60) as client, contextlib.suppress(ConnectionError):
        client.sendall(sent)
        while piece := client.recv(1000):
            found += piece
    assert re.fullmatch(expected, found, re.DOTALL)
    assert locked.ask("/health")[0] == 200
