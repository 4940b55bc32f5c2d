"""Sixteen threads do everything that a model can do at the same time, for as long as they are let.

Each text is compared with that of the same call alone. Beside the threads the main one is interrupted, and forks.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pastkey.runtime import LanguageModel

Settings = dict[str, Any]
SAMPLES = 200  # of the memory, over the whole time
SETTLED = 0.25  # the share of the time after which memory is looked at: arenas and stores fill first


@dataclass
class Soaked:
    """What was done, and what it has left."""

    done: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[int, int]] = field(default_factory=list)  # texts made so far, resident bytes
    descriptors: tuple[int, int] = (0, 0)  # before and after
    threads: tuple[int, int] = (0, 0)

    @property
    def slope(self) -> float:
        """MiB for 1,000 texts, by least squares, after the first part."""
        texts, sizes = np.array(self.memory[int(len(self.memory) * SETTLED) :], float).T
        return float(np.polyfit(texts / 1000, sizes / 2**20, 1)[0])

    def report(self) -> str:
        done = ", ".join(f"{count} {name}" for name, count in sorted(self.done.items()))
        first, last = self.memory[0][1] / 2**20, self.memory[-1][1] / 2**20
        return (
            f"{sum(self.done.values())} texts: {done}\n"
            f"resident {first:.1f} MiB at first, {last:.1f} at last, slope {self.slope:+.3f} MiB for 1,000 texts\n"
            f"descriptors {self.descriptors[0]} and {self.descriptors[1]}, threads {self.threads[0]} and "
            f"{self.threads[1]}"
        )


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_descriptors() -> int:
    """How many files, pipes and sockets this process holds open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class Soak:
    """One model under load, and another one of the same bundle for what its texts should be."""

    def __init__(self, model: LanguageModel, alone: LanguageModel, folder: Path, seed: int = 0) -> None:
        """`folder` is for saved sessions."""
        self.model, self.folder = model, folder
        rng = random.Random(seed)
        self.given = [self._call(rng) for _ in range(40)]
        self.expected = [alone.generate(prompt, **settings).ids for prompt, settings in self.given]
        self.talks = [[rng.choice("abcdefgh") * rng.randrange(1, 9) for _ in range(3)] for _ in range(8)]
        self.answers = [self._converse(alone, talk) for talk in self.talks]
        self.done: Counter[str] = Counter()
        self._mutex = threading.Lock()

    @staticmethod
    def _call(rng: random.Random) -> tuple[list[int], Settings]:
        prompt = [rng.randrange(37) for _ in range(rng.choice([1, 2, 3, 20, 70, 150]))]
        return prompt, {
            "max_new_tokens": rng.choice([1, 3, 10, 40]),
            "temperature": rng.choice([0, 0.5, 1.0, 2.0]),
            "top_k": rng.choice([0, 5]),
            "repetition_penalty": rng.choice([1.0, 1.3]),
            "seed": rng.randrange(1000),
            "prompt_lookup": rng.random() < 0.7,
        }

    def run(self, seconds: float, threads: int = 16, *, most: float = math.inf, watched: bool = True) -> Soaked:
        """Raises whatever a thread raises, and AssertionError for a wrong text.

        `most`: ends after so many texts. `watched`: interrupts, forks, and looks at what is left, which Linux alone
        tells.
        """
        found = Soaked()
        self._settle()
        before = (open_descriptors() if watched else 0), threading.active_count()
        end, stop = time.monotonic() + seconds, threading.Event()

        def work(number: int) -> None:
            rng = random.Random(number)
            try:
                while time.monotonic() < end and self.done.total() < most and not stop.is_set():
                    kind = rng.choices(list(self._kinds), [weight for weight, _ in self._kinds.values()])[0]
                    self._kinds[kind][1](self, rng)
                    with self._mutex:
                        self.done[kind] += 1
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(work, number) for number in range(threads)]
            if watched:
                self._beside(end, stop, seconds / SAMPLES, found.memory)
        for future in futures:
            future.result()
        self._settle()
        found.done = self.done
        if watched:
            found.memory.append((self.done.total(), resident()))
        after = (open_descriptors() if watched else 0), threading.active_count()
        found.descriptors, found.threads = (before[0], after[0]), (before[1], after[1])
        assert self.model.scheduler.live == 0
        return found

    def _settle(self) -> None:
        gc.collect()
        self.model.scheduler.exclusively(lambda: None)

    def _beside(self, end: float, stop: threading.Event, pause: float, memory: list[tuple[int, int]]) -> None:
        """The main thread: it samples the memory, is interrupted in a generation, and forks."""
        rng, before = random.Random(-1), signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            for turn in itertools.count():
                if time.monotonic() >= end or stop.is_set():
                    return
                memory.append((self.done.total(), resident()))
                self._interrupted(rng)
                if turn % 10 == 0:
                    self._forked(rng)
                stop.wait(pause)
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupted(self, rng: random.Random) -> None:
        main = threading.main_thread().ident
        assert main is not None
        timer = threading.Timer(rng.random() * 0.05, signal.pthread_kill, (main, signal.SIGINT))
        try:
            timer.start()
            while True:
                self._generate(rng)
        except KeyboardInterrupt:
            self.done["interrupts"] += 1
        timer.join()

    def _forked(self, rng: random.Random) -> None:
        """A child generates while its parent's threads do."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                self._generate(rng)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, "a child's text was another one"
        self.done["forks"] += 1

    # --- what a thread does -------------------------------------------------------------------------------------------
    def _generate(self, rng: random.Random) -> None:
        which = rng.randrange(len(self.given))
        prompt, settings = self.given[which]
        found = self.model.generate(prompt, **settings, reuse_prefix=rng.random() < 0.5).ids
        assert found == self.expected[which], (prompt, settings)

    def _stream(self, rng: random.Random) -> None:
        which = rng.randrange(len(self.given))
        prompt, settings = self.given[which]
        found = [token for chunk in self.model.stream(prompt, **settings) for token in chunk.ids]
        assert found == self.expected[which], (prompt, settings)

    def _leave(self, rng: random.Random) -> None:
        which, most = rng.randrange(len(self.given)), rng.randrange(5)
        prompt, settings = self.given[which]
        stream = self.model.stream(prompt, **settings)
        found = [token for chunk in itertools.islice(stream, most) for token in chunk.ids]
        assert found == self.expected[which][:most]
        if rng.random() < 0.5:
            stream.close()

    def _cancel(self, rng: random.Random) -> None:
        which = rng.randrange(len(self.given))
        prompt, settings = self.given[which]
        stream = self.model.stream(prompt, **settings)
        timer = threading.Timer(rng.random() * 0.02, stream.cancel)
        timer.start()
        found = [token for chunk in stream for token in chunk.ids]
        timer.join()
        assert found == self.expected[which][: len(found)]

    def _session(self, rng: random.Random) -> None:
        """Appended in two parts, forked, saved and loaded again."""
        which = rng.randrange(len(self.given))
        prompt, settings = self.given[which]
        file = self.folder / f"{threading.get_ident()}.session"
        with self.model.session() as session:
            session.append(prompt[: len(prompt) // 2 or 1])
            if prompt[len(prompt) // 2 or 1 :]:
                session.append(prompt[len(prompt) // 2 or 1 :])
            session.save(file)
            with session.fork() as fork, self.model.load_session(file) as loaded:
                for each in (fork, loaded, session):
                    assert each.generate(**settings).ids == self.expected[which], (prompt, settings)

    def _chat(self, rng: random.Random) -> None:
        which = rng.randrange(len(self.talks))
        assert self._converse(self.model, self.talks[which]) == self.answers[which]

    @staticmethod
    def _converse(model: LanguageModel, talk: list[str]) -> list[dict[str, Any]]:
        chat = model.chat()
        for text in talk:
            chat.ask(text, max_new_tokens=8, temperature=1.0, seed=5)
        return chat.messages

    _kinds: ClassVar[dict[str, tuple[int, Callable[[Soak, random.Random], None]]]] = {
        "generated": (5, _generate),
        "streamed": (5, _stream),
        "left": (2, _leave),
        "cancelled": (2, _cancel),
        "sessions": (1, _session),
        "chats": (1, _chat),
    }
