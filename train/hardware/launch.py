"""Starts a command in several processes of this machine, by torchrun's own launcher but without its reports."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pastkey.command import say


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs `pastkey ARGUMENTS` in `processes` processes, and returns the status of the first one that failed, or 0.

    The one that fails says why. Of one that is killed, which cannot, the signal is said here.
    """
    logging.disable(logging.ERROR)  # the launcher's, which repeat these messages
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "pastkey", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            say(f"process {rank} of {processes} was ended by signal {-failure.exitcode}")
        return failure.exitcode if failure.exitcode > 0 else 2
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0
