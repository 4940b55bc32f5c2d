"""One model under load: right texts, and nothing that grows. PASTKEY_SOAK_MINUTES=30 does it for half an hour."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer

from pastkey.contract.bundle import Bundle
from pastkey.runtime import load

from .soak import Soak

if TYPE_CHECKING:
    from .conftest import Tiny

MINUTES = float(os.environ.get("PASTKEY_SOAK_MINUTES", "0.25"))
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}.{% endfor %}<assistant>"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not hasattr(signal, "pthread_kill"), reason="reads /proc/self")
def test_sixteen_threads_leave_nothing_behind(
    tiny: Tiny, letters: Tokenizer, make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = make_bundle(tiny, "fused", tokenizer=letters, tokenizer_config={"chat_template": TEMPLATE})
    model, alone = load(bundle.path, threads=1), load(bundle.path, threads=1)
    soaked = Soak(model, alone, tmp_path).run(60 * MINUTES)
    print(f"\n{soaked.report()}")
    assert min(soaked.done[kind] for kind in ("generated", "streamed", "sessions", "chats", "interrupts", "forks")) > 0
    assert soaked.descriptors[0] == soaked.descriptors[1]
    assert soaked.threads[0] == soaked.threads[1]
    if MINUTES >= 5:
        assert soaked.slope < 1.0
