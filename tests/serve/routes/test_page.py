"""The page that is a chat with the server: what is given. What it does is in tests/serve/test_chat_page.py."""

from __future__ import annotations

import re

from pastkey.serve.routes.page import FILES

from ..conftest import running


def test_the_files_of_the_page_are_given_with_or_without_a_key_and_no_others(served, bundle):
    with running(bundle, keys=("QZ",)) as locked:
        for server in (served, locked):
            for name, kind in FILES.items():
                with server.response(f"/{name}") as response:
                    assert response.status == 200
                    assert response.headers["content-type"].startswith(kind)
                    assert response.headers["content-security-policy"].startswith(
                        "default-src 'none'; script-src 'self'"
                    )
                    named = re.findall(r'(?:src|href)="([\w.]+)"|from "\./([\w.]+)"', response.read().decode())
                    assert all((one or other) in FILES for one, other in named)
            for path in ("/../conftest.py", "/page/chat.js", "/pastkey.json", "/index.html", "//etc/passwd"):
                assert server.ask(path)[0] == 404
