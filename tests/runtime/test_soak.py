"""One model under load: right texts, and nothing that grows. PASTKEY_SOAK_MINUTES=30 does it for half an hour."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from pastkey.runtime import load

from .soak import Soak

MINUTES = float(os.environ.get("PASTKEY_SOAK_MINUTES", "0.06"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not hasattr(signal, "pthread_kill"), reason="reads /proc/self")
def test_sixteen_threads_leave_nothing_behind(talking, tmp_path):
    model, alone = load(talking, threads=1), load(talking, threads=1)
    soaked = Soak(model, alone, tmp_path).run(60 * MINUTES)
    print(f"\n{soaked.report()}")
    assert min(soaked.done[kind] for kind in ("generated", "streamed", "sessions", "chats", "interrupts", "forks")) > 0
    assert soaked.descriptors[0] == soaked.descriptors[1]
    assert soaked.threads[0] == soaked.threads[1]
    if MINUTES >= 5:
        assert soaked.slope < 1.0
