from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy
import pytest

import pastkey
from pastkey.errors import UntrustedBundleError
from pastkey.runtime.sandbox import process


def test_what_it_starts_with(monkeypatch, tmp_path):
    """No environment but what libraries need, no path but theirs, no terminal, not the folder where we are."""
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PASTKEY_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("print('mine')")
    shown = "import json, os, sys; alone = os.getsid(0) == os.getpid()\n"
    shown += "print(json.dumps([sorted(os.environ), sys.path, os.getcwd(), alone]))"
    monkeypatch.setattr(process, "BOOT", shown)
    started, lifeline = process.started("b")
    environment, paths, folder, alone = json.loads(started.communicate()[0])
    os.close(lifeline)
    kept = ("OMP_", "OPENBLAS_", "MKL_", "RAYON_", "TOKENIZERS_", "LD_LIBRARY_PATH", "LANG", "LC_", "TZ")
    assert all(name.startswith((*kept, "ORT_DISABLE_TELEMETRY", "PASTKEY_NATIVE")) for name in environment)
    assert not {"", str(tmp_path)} & {*paths}
    assert (folder, alone) == (os.sep, True)


def test_libraries_are_found_and_no_more_is_read_than_they():
    roots, rights = process.libraries()
    assert Path(roots[0]) == Path(pastkey.__file__).resolve().parent.parent
    places = {Path(place) for place, _ in rights}
    assert any(place in Path(numpy.__file__).parents for place in places)
    assert {kind for _, kind in rights} <= {"read", "list"}
    assert not any(Path.home() == Path(place) and kind == "read" for place, kind in rights)


def test_a_package_beside_other_things_is_read_alone(tmp_path, monkeypatch):
    (tmp_path / "jinja2").mkdir()
    (tmp_path / "jinja2" / "__init__.py").touch()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "jinja2")
    monkeypatch.syspath_prepend(tmp_path)
    roots, rights = process.libraries()
    assert str(tmp_path) in roots
    assert [str(tmp_path), "list"] in rights
    assert [str(tmp_path / "jinja2"), "read"] in rights
    assert [str(tmp_path), "read"] not in rights


def test_without_a_python_to_start(monkeypatch):
    monkeypatch.setattr(process.sys, "executable", "")
    with pytest.raises(UntrustedBundleError, match="the untrusted bundle b needs a process of its own"):
        process.started("b")
    monkeypatch.setattr(process.sys, "executable", "/nowhere/python")
    with pytest.raises(UntrustedBundleError, match=r"cannot be started \(No such file.*python must be"):
        process.started("b")
