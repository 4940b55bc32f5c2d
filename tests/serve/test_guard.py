"""Who may ask, and how much."""

from __future__ import annotations

import socket

import pytest

from .conftest import Served, running

BODY = {"prompt": "abc", "max_tokens": 1}
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def locked(bundle):
    settings = {"keys": ("QZ", "ß2", "密2", "\udce92"), "body_bytes": 1000, "receive_seconds": 0.3}
    with running(bundle, allow_origins=("https://a.b",), allow_hosts=("Proxy.a",), **settings) as served:
        yield served


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9", "[::1]:8080", "PROXY.A:80"])
def test_a_host_that_is_this_machine_may_be_asked(locked, host):
    assert locked.ask("/health", Host=host) == (200, {"status": "ok"})


@pytest.mark.parametrize("host", ["evil.com", "localhost.evil.com", "", "[", "0.0.0.0"])
def test_another_host_is_refused_as_a_page_that_was_bound_anew_would_send_it(locked, host):
    status, reply = locked.ask("/health", Host=host)
    assert (status, "Host header" in reply["error"]["message"]) == (403, True)


def test_a_page_of_another_site_may_not_ask(served, locked):
    assert served.ask(PATH, BODY, Origin="https://a.b")[0] == 403
    assert served.ask(PATH, BODY, Origin="null")[0] == 403
    assert served.ask(PATH, BODY, Origin=f"http://127.0.0.1:{served.port}")[0] == 200
    assert locked.ask(PATH, BODY, Origin="https://a.b", Authorization="Bearer QZ")[0] == 200


def test_cors_headers_are_those_of_allowed_origins(served, locked):
    def allowed(server: Served, origin: str) -> str | None:
        client = server.connection()
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST", "Connection": "close"}
        client.request("OPTIONS", PATH, headers=headers)
        response = client.getresponse()
        response.read()
        return response.headers["access-control-allow-origin"]

    assert allowed(served, "https://a.b") is None
    assert allowed(locked, "https://c.d") is None
    assert allowed(locked, "https://a.b") == "https://a.b"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer qz"}, 401),
        ({"Authorization": "Basic QZ"}, 401),
        ({"Authorization": "QZ"}, 401),
        ({"X-Api-Key": ""}, 401),
        ({"Authorization": "Bearer QZ"}, 200),
        ({"Authorization": "bearer QZ "}, 200),
        ({"X-Api-Key": "QZ"}, 200),
        ({"X-Api-Key": "ß2"}, 200),  # in Latin-1
        ({"X-Api-Key": "ß2".encode()}, 200),
        ({"Authorization": "Bearer 密2".encode()}, 200),
        ({"Authorization": "Bearer 密3".encode()}, 401),
        ({"X-Api-Key": b"\xe92"}, 200),
    ],
)
def test_each_route_but_health_needs_a_key(locked, headers, status):
    for path, body in ((PATH, BODY), ("/v1/models", None), ("/metrics", None), ("/openapi.json", None)):
        with locked.response(path, body, **headers) as response:
            assert response.status == status
            response.read()
    assert locked.ask("/health")[0] == 200


def test_a_body_has_a_limit_of_size_however_it_is_sent(locked):
    headers = {"Authorization": "Bearer QZ"}
    assert locked.ask(PATH, b"x" * 1001, **headers)[0] == 413
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: QZ\r\n"
    assert raw(locked, head + "Content-Length: 99999999999999999999\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    chunk = "1f4\r\n" + "x" * 500 + "\r\n"
    assert raw(locked, head + "Transfer-Encoding: chunked\r\n\r\n" + chunk * 3).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_is_given_up(locked):
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: QZ\r\nContent-Length: 10\r\n\r\n"
    assert raw(locked, head).startswith(b"HTTP/1.1 408 ")


def raw(served: Served, sent: str) -> bytes:
    with socket.create_connection(("127.0.0.1", served.port), 60) as client:
        client.sendall(sent.encode())
        return client.recv(1000)
