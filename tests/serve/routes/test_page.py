"""The page of the web package, where it is there."""

from __future__ import annotations

import sys
import types

from ..conftest import running


def test_without_the_page_the_root_says_what_this_is(served, monkeypatch):
    monkeypatch.setitem(sys.modules, "pastkey.web", None)
    served.service.site = None
    with served.response("/") as response:
        assert response.status == 200
        assert response.read().startswith(b"pastkey serve: tiny. ")


def test_the_files_of_the_page_are_given_and_no_others(bundle, tmp_path, monkeypatch):
    (tmp_path / "run.mjs").write_text("1", encoding="utf-8")
    web = types.ModuleType("pastkey.web")
    web.site = lambda bundle: {"index.html": b"<p>", "a/run.mjs": tmp_path / "run.mjs"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pastkey.web", web)
    with running(bundle) as served:
        for path, kind, content in (("/", "text/html", b"<p>"), ("/a/run.mjs", "text/javascript", b"1")):
            with served.response(path) as response:
                assert response.status == 200
                assert response.headers["content-type"].startswith(kind)
                assert response.headers["cross-origin-embedder-policy"] == "require-corp"
                assert response.read() == content
        for path in ("/../conftest.py", "/a/../../pastkey.json", "/pastkey.json", "//etc/passwd"):
            assert served.ask(path)[0] == 404
