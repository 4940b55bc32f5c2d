"""Errors are one sentence each, and say how a missing package is installed."""

from __future__ import annotations

import inspect
import logging
import re
import subprocess
import sys
import tomllib
import warnings

import pytest

from pastkey import errors
from pastkey.errors import EXTRAS, ContextLengthError, MissingExtraError, PastkeyError, first_line, missing_extra
from pastkey.quiet import quiet

from ..shared import ROOT


def test_every_error_is_one_of_pastkey_and_a_builtin_too():
    kinds = {kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)}
    for kind in kinds - {PastkeyError} - {kind for kind in kinds if issubclass(kind, Warning)}:
        assert issubclass(kind, PastkeyError)
        assert issubclass(kind, (ValueError, TypeError, ArithmeticError, OSError, ImportError, RuntimeError))


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\n  first \nsecond"), "first"), (KeyError(), "KeyError"), (ValueError("x" * 400), "x" * 300)],
)
def test_of_a_librarys_error_the_first_line_is_told(error, line):
    assert first_line(error) == line


def test_a_context_error_has_the_longest_that_fits():
    error = ContextLengthError("512 tokens is the most", 512)
    assert (str(error), error.longest) == ("512 tokens is the most", 512)


def sentence(module: str, *needed_by: str) -> str:
    found = missing_extra(ModuleNotFoundError(name=module), *needed_by)
    assert isinstance(found, MissingExtraError)
    return str(found)


def test_the_extra_is_named_as_it_is_typed_in_a_checkout_and_with_a_wheel(monkeypatch):
    typed = r"'\.\[{0}\]'  in pastkey's checkout, or  pip install 'pastkey-\S+\.whl\[{0}\]'  with its wheel"
    assert re.search(typed.format("export"), sentence("onnx_ir.passes"))
    assert re.search(typed.format("chat"), sentence("jinja2", "export"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert re.search(typed.format("huggingface"), sentence("gguf", "export", "huggingface"))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert re.search(typed.format("export,huggingface"), sentence("gguf", "export", "huggingface"))
    error = ModuleNotFoundError(name="my_model.layers")  # none of ours
    assert missing_extra(error, "export") is error


def test_what_is_named_is_what_the_extras_bring():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for key, modules in EXTRAS.items():
        brought = {re.split(r"[<>=!\[]", requirement)[0] for requirement in extras[key]}
        assert {module.replace("_", "-") for module in modules} <= brought


@pytest.mark.parametrize("source", ["m.gguf", "hf", "org/name"])
def test_an_export_names_at_once_what_its_source_needs(tmp_path, source):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    modules = [*EXTRAS["export"], *EXTRAS["huggingface"]]
    program = (
        f"import sys\nsys.modules |= dict.fromkeys({modules})\nfrom pastkey.__main__ import main\n"
        f"sys.exit(main(['export', {source!r}, '--out', 'b']))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "type  pip install '.[export,huggingface]'  in" in done.stderr) == (2, True)


# --- ---------------------------------------------------------------------------------------------------------------
def test_what_a_library_says_is_held_back(capsys, caplog):
    with quiet():
        print("progress")
        print("remark", file=sys.stderr)
        warnings.warn("of a library", stacklevel=1)
        logging.getLogger("library").error("remark")
        logging.getLogger("library").critical("the machine is on fire")
    assert capsys.readouterr() == ("", "")
    assert [record.getMessage() for record in caplog.records] == ["the machine is on fire"]


def test_afterwards_everything_speaks_again(capsys):
    with pytest.raises(ValueError, match="passes"), quiet():
        raise ValueError("an error passes")
    print("said")
    assert capsys.readouterr().out == "said\n"
    assert logging.getLogger("library").isEnabledFor(logging.ERROR)
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)
