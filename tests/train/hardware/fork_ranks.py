"""Runs commands in several processes, as torchrun starts them, forked from one that has imported torch.

    python fork_ranks.py < requests

Each request is a line of JSON: "world", "command" and, if wanted, "before" (Python that each process executes first,
which knows its `rank`) and "kill" (a rank, and the file whose appearance is its end). Each answer is a line of JSON:
for each rank its exit status, negative for a signal, and its standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, and not in __all__

import pastkey.train.loop  # noqa: F401, imported once for all processes
from pastkey.__main__ import main


def answer(request: dict[str, Any]) -> list[tuple[int, str]]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun, outlives each rank
    children = []
    for rank in range(request["world"]):
        said = tempfile.TemporaryFile("w+")  # noqa: SIM115, read when the process has ended
        child = os.fork()
        if child == 0:
            be_rank(request, rank, store.port, said.fileno())
        children.append((child, said))
    if "kill" in request:
        rank, file = request["kill"]
        process, ended = children[rank][0], os.WEXITED | os.WNOHANG | os.WNOWAIT
        while not Path(file).exists() and os.waitid(os.P_PID, process, ended) is None:
            time.sleep(0.01)
        os.kill(process, signal.SIGKILL)
    answers = []
    for child, said in children:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        answers.append((status, said.read()))
        said.close()
    return answers


def be_rank(request: dict[str, Any], rank: int, port: int, said: int) -> None:
    status = 1
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(request["world"])}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        exec(request.get("before", ""), {"rank": rank})
        status = main(request["command"])
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
