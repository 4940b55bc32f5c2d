"""Sixteen threads do everything that a model can do at the same time: right texts, and nothing that grows.

Each text is compared with that of the same call run separately. Meanwhile the main thread is interrupted, and forks.
PASTKEY_SOAK_MINUTES=30 does it for half an hour.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pastkey.runtime import LanguageModel, load

from .conftest import ids_in

MINUTES = float(os.environ.get("PASTKEY_SOAK_MINUTES", "0.06"))
SAMPLES = 200  # of the memory, over the whole time


class Soak:
    """One model under load, and another one of the same bundle for the expected texts."""

    def __init__(self, model: LanguageModel, alone: LanguageModel, folder: Path) -> None:
        """`folder` is for saved sessions."""
        self.model, self.folder, self.mutex = model, folder, threading.Lock()
        rng = random.Random(0)
        self.given = [self._call(rng) for _ in range(40)]
        self.expected = [alone.generate(prompt, **settings).ids for prompt, settings in self.given]
        self.talks = [[rng.choice("abcdefgh") * rng.randrange(1, 9) for _ in range(3)] for _ in range(8)]
        self.answers = [self._converse(alone, talk) for talk in self.talks]
        self.done: Counter[str] = Counter()
        self.memory: list[tuple[int, int]] = []  # texts made so far, resident bytes

    @staticmethod
    def _call(rng: random.Random) -> tuple[list[int], dict[str, Any]]:
        prompt = [rng.randrange(37) for _ in range(rng.choice([1, 2, 3, 20, 70, 150]))]
        return prompt, {
            "max_new_tokens": rng.choice([1, 3, 10, 40]),
            "temperature": rng.choice([0, 0.5, 1.0, 2.0]),
            "top_k": rng.choice([0, 5]),
            "repetition_penalty": rng.choice([1.0, 1.3]),
            "seed": rng.randrange(1000),
            "prompt_lookup": rng.random() < 0.7,
        }

    def run(self, seconds: float, *, most: float = math.inf, watched: bool = True) -> None:
        """Raises whatever a thread raises, and AssertionError for a wrong text.

        `most`: ends after so many texts. `watched`: interrupts, forks, and looks at the memory, as Linux tells it.
        """
        end, stop = time.monotonic() + seconds, threading.Event()
        kinds = [self._generate] * 5 + [self._stream] * 9 + [self._session, self._session, self._chat]

        def work(number: int) -> None:
            rng = random.Random(number)
            try:
                while time.monotonic() < end and self.done.total() < most and not stop.is_set():
                    self._did(rng.choice(kinds), rng)
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(16) as pool:
            futures = [pool.submit(work, number) for number in range(16)]
            for turn in itertools.count() if watched else ():
                if time.monotonic() >= end or stop.is_set():
                    break
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                self.memory.append((self.done.total(), pages * os.sysconf("SC_PAGE_SIZE")))
                self._did(self._interrupted, random.Random(turn))
                if turn % 10 == 0:
                    self._did(self._forked, random.Random(turn))
                stop.wait(seconds / SAMPLES)
        for future in futures:
            future.result()
        gc.collect()
        self.model.scheduler.exclusively(lambda: None)
        assert self.model.scheduler.live == 0

    def _did(self, action: Any, rng: random.Random) -> None:
        action(rng)
        with self.mutex:
            self.done[action.__name__] += 1

    # --- what the main thread does ------------------------------------------------------------------------------------
    def _interrupted(self, rng: random.Random) -> None:
        main, before = threading.main_thread().ident, signal.signal(signal.SIGINT, signal.default_int_handler)
        timer = threading.Timer(rng.random() * 0.05, signal.pthread_kill, (main, signal.SIGINT))
        try:
            timer.start()
            while True:
                self._generate(rng)
        except KeyboardInterrupt:
            timer.join()
        finally:
            signal.signal(signal.SIGINT, before)

    def _forked(self, rng: random.Random) -> None:
        """A child generates while its parent's threads do."""
        child = os.fork()
        if child == 0:
            try:
                self._generate(rng)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "a child's text was another one"

    # --- what a thread does -------------------------------------------------------------------------------------------
    def _some(self, rng: random.Random) -> tuple[list[int], dict[str, Any], list[int]]:
        which = rng.randrange(len(self.given))
        return *self.given[which], self.expected[which]

    def _generate(self, rng: random.Random) -> None:
        prompt, settings, expected = self._some(rng)
        found = self.model.generate(prompt, **settings, reuse_prefix=rng.random() < 0.5).ids
        assert found == expected, (prompt, settings)

    def _stream(self, rng: random.Random) -> None:
        """Read to its end, left, closed, or cancelled by another thread."""
        prompt, settings, expected = self._some(rng)
        stream, end = self.model.stream(prompt, **settings), rng.choice(["", "", "left", "close", "cancel"])
        timer = threading.Timer(rng.random() * 0.02, stream.cancel)
        if end == "cancel":
            timer.start()
        most = rng.randrange(5) if end in ("left", "close") else None
        found = ids_in(itertools.islice(stream, most))
        assert found == expected[: len(found) if end == "cancel" else most], (prompt, settings)
        if end == "cancel":
            timer.join()
        elif end == "close":
            stream.close()

    def _session(self, rng: random.Random) -> None:
        """Appended in two parts, forked, saved and loaded, and trimmed for another time."""
        prompt, settings, expected = self._some(rng)
        file, half = self.folder / f"{threading.get_ident()}.session", len(prompt) // 2 or 1
        with self.model.session() as session:
            for part in filter(None, (prompt[:half], prompt[half:])):
                session.append(part)
            session.save(file)
            with session.fork() as fork, self.model.load_session(file) as loaded:
                for each in (fork, loaded, session):
                    assert each.generate(**settings).ids == expected, (prompt, settings)
                session.trim(len(prompt))
                assert session.generate(**settings).ids == expected, (prompt, settings)

    def _chat(self, rng: random.Random) -> None:
        which = rng.randrange(len(self.talks))
        assert self._converse(self.model, self.talks[which]) == self.answers[which]

    @staticmethod
    def _converse(model: LanguageModel, talk: list[str]) -> list[dict[str, Any]]:
        chat = model.chat()
        for text in talk:
            chat.ask(text, max_new_tokens=8, temperature=1.0, seed=5)
        return chat.messages


def left_open() -> tuple[int, int]:
    """How many files, pipes and sockets this process holds open, and its threads."""
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir()), threading.active_count()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not hasattr(signal, "pthread_kill"), reason="reads /proc/self")
def test_sixteen_threads_leave_nothing_behind(talking, tmp_path):
    soak = Soak(load(talking, threads=1), load(talking, threads=1), tmp_path)
    before = left_open()
    soak.run(60 * MINUTES)
    assert left_open() == before
    assert soak.done.keys() == {"_generate", "_stream", "_session", "_chat", "_interrupted", "_forked"}
    texts, sizes = np.array(soak.memory[SAMPLES // 4 :] or soak.memory, float).T  # arenas and stores fill first
    slope = np.polyfit(texts / 1000, sizes / 2**20, 1)[0]
    print(f"\n{dict(soak.done)}\nresident {sizes[-1] / 2**20:.1f} MiB, slope {slope:+.3f} MiB for 1,000 texts")
    assert MINUTES < 5 or slope < 1.0
