from __future__ import annotations

import subprocess
import sys

import pytest

import pastkey.runtime

PROGRAM = """
import sys
import {before}
before = set(sys.modules)
import {module}
print(*sys.modules.keys() - before)
"""


def test_everything_that_is_offered_is_there():
    offered: list[str] = vars(pastkey.runtime)["__all__"]
    for name in offered:
        assert getattr(pastkey.runtime, name).__name__.rpartition(".")[2] == name
    assert set(offered) <= set(dir(pastkey.runtime))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pastkey.runtime.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("module", "before", "limit"),
    [
        ("pastkey", "sys", 60),  # 6 to 38 by what Python itself has imported at its start
        ("pastkey.runtime", "sys", 60),
        ("pastkey.runtime.model.language_model", "numpy, onnxruntime, tokenizers", 190),  # 80 of them pastkey's
    ],
)
def test_imports_are_few(module, before, limit):
    program = PROGRAM.format(module=module, before=before)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    brought = done.stdout.split()
    assert module in brought
    assert {name.partition(".")[0] for name in brought} - sys.stdlib_module_names <= {"pastkey", *before.split(", ")}
    assert len(brought) < limit
