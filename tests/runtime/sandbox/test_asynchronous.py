"""An event loop waits for no process, whatever the process does."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import pytest

from pastkey.errors import InputError
from pastkey.runtime.sandbox import process
from pastkey.runtime.sandbox.model import SandboxedModel

from .conftest import hooked, opened, told

SILENT = "import time\nfrom pastkey.runtime.sandbox import server\n"


def silent(call: str) -> str:
    """The boot of a process that never answers this call."""
    hook = SILENT + f"server.Server.do_{call} = lambda self, **_: time.sleep(1000)\n"
    return hooked(hook)


def test_what_a_task_gets(untrusted, trusted):
    async def both() -> None:
        for options in ({"logprobs": 2}, {"stop": ["m"]}, {"max_new_tokens": 0}):
            mine, theirs = [await model.agenerate("hello", **options) for model in (untrusted, trusted)]
            assert told(mine) == told(theirs)
        chunks = [[chunk async for chunk in model.astream("hello")] for model in (untrusted, trusted)]
        assert chunks[0] == chunks[1]
        assert await untrusted.ascore("hello") == trusted.score("hello")
        with pytest.raises(InputError, match="each alone, or all to generate"):
            untrusted.astream(["a"])
        async with untrusted.astream("hello", max_new_tokens=500) as stream:
            await anext(stream)
        assert stream.completion is not None
        assert stream.completion.finish_reason == "cancelled"

    asyncio.run(both())


@pytest.mark.parametrize("call", ["stream", "next"])
def test_the_loop_goes_on_beside_a_silent_process(talking_bundle, monkeypatch, call):
    monkeypatch.setattr(process, "BOOT", silent(call))

    async def use(model: SandboxedModel) -> float:
        longest, last = 0.0, time.monotonic()

        async def ticks() -> AsyncIterator[None]:
            while True:
                await asyncio.sleep(0.01)
                yield

        async def generated() -> None:
            async with model.astream("hello", max_new_tokens=500) as stream:
                async for _ in stream:
                    pass

        task = asyncio.create_task(generated())
        count = 0
        async for _ in ticks():
            longest, last, count = max(longest, time.monotonic() - last), time.monotonic(), count + 1
            if count == 20:
                task.cancel()
            if count == 40:
                break
        with pytest.raises(asyncio.CancelledError):
            await task
        return longest

    with opened(talking_bundle.path) as model:
        assert asyncio.run(use(model)) < 5


def test_a_program_ends_while_a_process_is_silent(talking_bundle, tmp_path):
    program = f"""
import asyncio, sys, warnings
import pastkey
from pastkey.runtime import Limits
from pastkey.runtime.sandbox import process
warnings.simplefilter("ignore")
process.BOOT = {silent("next")!r}
lm = pastkey.load({str(talking_bundle.path)!r}, threads=1, trust=False, limits=Limits(seconds=100.0))
async def main():
    task = asyncio.create_task(lm.agenerate("hello"))
    await asyncio.sleep(0.3)
    task.cancel()
    await asyncio.wait([task])
asyncio.run(main())
sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (7, "")
