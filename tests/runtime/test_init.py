from __future__ import annotations

import subprocess
import sys

import pytest

import pastkey.runtime

PROGRAM = """
import sys, time
import {before}
start = time.process_time()  # a busy machine does not count
import {module}
print(time.process_time() - start)
"""


def seconds_to_import(module: str, before: str) -> float:
    program = PROGRAM.format(module=module, before=before)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_everything_that_is_offered_is_there() -> None:
    for name in pastkey.runtime.__all__:
        assert getattr(pastkey.runtime, name).__name__ == name
    assert set(pastkey.runtime.__all__) <= set(dir(pastkey.runtime))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pastkey.runtime.nothing


@pytest.mark.parametrize(
    ("module", "limit"),
    [
        ("pastkey", 0.05),
        ("pastkey.runtime", 0.05),
        ("pastkey.runtime.language_model", 0.2),  # 20 to 55 ms by machine: only something heavy shows
    ],
)
def test_importing_takes_little_more_than_what_it_stands_on(module: str, limit: float) -> None:
    before = "sys" if module == "pastkey" else "numpy, onnxruntime, tokenizers"
    assert min(seconds_to_import(module, before) for _ in range(3)) < limit


def test_a_run_imports_neither_torch_nor_onnx() -> None:
    program = (
        "import sys, pastkey.runtime.language_model, pastkey.runtime.bench, pastkey.runtime.placement\n"
        "print(sorted({'torch', 'onnx', 'transformers', 'pastkey.train', 'pastkey.export'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
