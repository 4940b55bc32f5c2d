"""The libraries are imported beside the event loop, not in it."""

from __future__ import annotations

import subprocess
import sys

# Prints what the loop's own thread imports, and then what there is.
PROGRAM = """
import asyncio, sys, threading
import pastkey
LIBRARIES = {{"numpy", "onnxruntime", "tokenizers", "pastkey.runtime.loading"}}

class Spy:
    def find_spec(self, name, path, target=None):
        if name in LIBRARIES and threading.current_thread() is threading.main_thread():
            print(name)

async def main():
    sys.meta_path.insert(0, Spy())
    assert not LIBRARIES & set(sys.modules)
    with await pastkey.aload({path!r}, threads=1) as model:
        print(LIBRARIES <= set(sys.modules), len(model.generate([1, 2], max_new_tokens=3).ids))

asyncio.run(main())
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100)
    return done.stdout if done.returncode == 0 else done.stderr


def test_the_first_load_of_a_process_imports_nothing_heavy_in_the_loop(fused_bundle):
    assert run(PROGRAM.format(path=str(fused_bundle.path))) == "True 3\n"
