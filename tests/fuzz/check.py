"""One input to one reader: a value or a sentence is well, and all else is a finding."""

from __future__ import annotations

import contextlib
import io
import random
import time
import traceback
from dataclasses import dataclass

from pastkey.errors import PastkeyError

from .reader import Target

MOST_SECONDS = 2.0  # of processor time, for files below 1 MB


@dataclass(frozen=True)
class Outcome:
    """What came of one input: "value", "sentence", "traceback" or "slow"."""

    kind: str
    told: str = ""

    @property
    def well(self) -> bool:
        return self.kind in ("value", "sentence")


def input_of(target: Target, seed: int) -> bytes:
    """The input of a seed, always the same."""
    rng = random.Random(seed)
    return target.mutate(rng, target.valid())


def outcome(target: Target, content: bytes) -> Outcome:
    """Reads `content`. What the reader prints is dropped."""
    started = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            target.read(content)
        found = Outcome("value")
    except PastkeyError as error:
        sentence = str(error)
        found = Outcome("sentence", sentence)
        printed = sentence.encode(errors="replace").decode()
        if not sentence.strip() or len(sentence) > 4000 or printed != sentence:
            found = Outcome("traceback", f"no sentence: {sentence!r:.200}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        found = Outcome("traceback", "".join(traceback.format_exception(error))[-3000:])
    seconds = time.process_time() - started
    if found.well and seconds > MOST_SECONDS:
        return Outcome("slow", f"{seconds:.1f} s of processor time, then: {found.told}")
    return found
