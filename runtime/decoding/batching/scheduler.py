"""Run the steps of all requests of one graph, and decode them in one batch where possible.

1. A thread that needs a token calls `advance`. No thread runs in the background: one of the callers leads and runs a
   step for all requests; the others wait until it ends.
2. The first step of a request calls `Generation.begin`, which gets a KV cache that may hold a prefix of the prompt.
3. Prefill: each step runs one chunk of one prompt, a small one (PREFILL_BESIDE) while other requests decode.
4. Decode: each step also runs one batch with a token of each request that can share it. Their caches move into a Slab.
   A batch decodes up to AHEAD tokens more than were read, so that threads which return one after another, or one
   thread that reads several streams, still form batches. After STALLED more steps an unread request leaves the Slab.
   Each adapter has a separate graph, and so separate batches. The batch of the request that has waited longest is next.
5. A request decodes outside the batch, with drafts, if it is alone, if it is one of two whose drafts pay (TURNS), or if
   it cannot share a run: standard or static graph, another device than the CPU. Such requests alternate, one step
   each.
6. `leave` removes a closed request between two steps: it leaves the Slab and its cache goes to the PrefixStore.

Only the leader changes caches, between two runs. If an exception leaves a step, the step's caches are dropped and their
requests run their ids again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from itertools import chain

from pastkey.errors import InputError, QueueFullError

from ...engine.caches.slab import Slab
from ...engine.decoder_graph import DecoderGraph, Logits
from ...engine.engine import Engine
from ..generation import Generation
from .activity import TOTALS, Activity
from .prefix_cache import PrefixStore

MAX_ROWS = 16  # largest batch; further requests alternate
AHEAD = 4  # tokens that a batch may decode before they are read
TURNS = 3.0  # tokens per step with drafts from which two rows alternate: a batch of two decodes 1.8 times one's tokens
STALLED = 16  # steps without a token after which a sequence leaves the slab
PREFILL_BESIDE = 64  # prompt tokens per step while other requests decode
LOOK_SECONDS = 0.5  # a waiting thread looks again after this time: an interrupt may have lost its notification

_log = logging.getLogger("pastkey")
_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


class Scheduler:
    """Runs the steps of all generations of one model: over its graph, and over that of each adapter.

    Attributes:
        store: The caches of ended requests.
        steps: Number of steps.
        batched: Number of tokens that were decoded in batches.
        closed: Whether `close` was called.
    """

    def __init__(self, store: PrefixStore, max_rows: int = MAX_ROWS, max_queue: int | None = None) -> None:
        self.store = store
        self._most = None if max_queue is None else max_rows + max_queue  # open requests
        self._open: dict[Generation, None] = {}
        self._totals: Counter[str] = Counter()
        self.steps = self.batched = 0
        self.closed = False
        self._new_lock()
        self._leader: int | None = None  # the thread that runs a step or changes the caches
        self._asking: list[object] = []  # tickets of threads in `_lead_alone`, in order of arrival
        self._live: dict[Generation, None] = {}
        self._waiting: list[Generation] = []  # generations with a waiting thread, in order of their last step
        self._max_rows = max_rows
        self._slabs: dict[DecoderGraph, Slab] = {}  # those with members
        self._forks = False  # whether the leader is about to fork
        self._clears = False  # whether the end of the step clears the store
        _schedulers.add(self)

    def _new_lock(self) -> None:
        # `with` on the lock itself runs in C, so no interrupt can come between.
        self._mutex = threading.RLock()
        self._changed = threading.Condition(self._mutex)  # notified at the end of a step

    # --- requests ----------------------------------------------------------------------------------------------------
    def admit(self, generation: Generation, *, bounded: bool = True) -> None:
        """Counts a request until it leaves. Raises QueueFullError if it is `bounded` and too many are open."""
        with self._mutex:
            if bounded and self._most is not None and len(self._open) >= self._most:
                raise QueueFullError(
                    f"{len(self._open)} requests are open and the queue is full: ask again later, or load the model "
                    "with a larger max_queue"
                )
            self._open[generation] = None

    def activity(self) -> Activity:
        """How busy the model is, at this moment."""
        requests = list(self._open)
        begun = [generation for generation in requests if generation.begun]
        alone = [generation.engine for generation in begun if not self.shares_memory(generation.engine)]
        return Activity(
            running=len(begun),
            waiting=len(requests) - len(begun),
            cache_bytes=sum(slab.nbytes for slab in [*self._slabs.values()]) + sum(engine.nbytes for engine in alone),
            prefix_bytes=self.store.nbytes,
            cached_prefixes=len(self.store),
            steps=self.steps,
            batched_tokens=self.batched,
            **{name: self._totals[name] for name in TOTALS},
        )

    @property
    def is_busy(self) -> bool:
        """Whether a thread runs a step or changes the caches, and not only readers are waited for."""
        return self._leader is not None

    # --- threads that need a token ------------------------------------------------------------------------------------
    def advance(self, generation: Generation) -> None:
        """Runs steps, or waits while another thread does, until the generation is `ready`."""
        self._require_outside()
        me = threading.get_ident()
        try:
            with self._mutex:
                self._live[generation] = None
                self._waiting.append(generation)
            while True:
                with self._mutex:
                    if generation.ready:
                        break
                    if self._leader is not None or self._asking:
                        self._changed.wait(max(0.0, min(LOOK_SECONDS, generation.deadline - time.monotonic())))
                        continue
                    self._leader = me
                self._step()
                self._leader = None
                if len(self._live) > 1 or self._asking or self._clears:
                    self._tidy()
        finally:
            if self._leader == me:
                self._leader = None  # first, before a call that an interrupt could abort
            with self._mutex:
                if generation in self._waiting:
                    self._waiting.remove(generation)
                if self._waiting or self._asking:  # each thread that waits is in one of them
                    self._changed.notify_all()  # another thread leads now
            self._retire()

    def _lead_alone(self) -> None:
        """Waits for the lead, with priority over threads that need steps, which would never leave a gap."""
        ticket = object()
        with self._mutex:
            try:
                self._asking.append(ticket)
                while self._leader is not None or self._asking[0] is not ticket:
                    self._changed.wait(LOOK_SECONDS)
                self._sweep()
                self._leader = threading.get_ident()
            finally:
                if ticket in self._asking:
                    self._asking.remove(ticket)
                self._changed.notify_all()

    def _tidy(self) -> None:
        """Retires closed generations and lets another thread lead."""
        with self._mutex:
            if self._leader is None:
                self._sweep()
            self._changed.notify_all()

    def leave(self, generation: Generation) -> None:
        """Removes a closed generation, at once or at the end of the running step.

        Never waits: the garbage collector may call it at any moment, in a thread that leads or holds the lock.
        """
        self._live[generation] = None
        self._open.pop(generation, None)
        self._retire()

    def _retire(self) -> None:
        """Retires closed generations, unless a thread leads or holds the lock, which then does it after that."""
        while self._leader is None and any(generation.closed for generation in list(self._live)):
            if not self._mutex.acquire(blocking=False):
                return
            try:
                if self._leader is None:
                    self._sweep()
            finally:
                self._mutex.release()

    def exclusively(self, action: Callable[[], object]) -> None:
        """Calls `action`, which changes caches, while no step runs. Raises InputError when called within a step."""
        self._require_outside()
        me = threading.get_ident()
        try:
            self._lead_alone()
            action()
        finally:
            if self._leader == me:
                self._leader = None
            self._tidy()

    def _require_outside(self) -> None:
        if self._leader == threading.get_ident():
            raise InputError(
                "the model was asked for something within one of its own steps, which would wait for itself: use "
                "another model in the logits_processor, or none"
            )

    def wake(self) -> None:
        """Wakes the waiting threads after a cancel."""
        with self._mutex:
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all generations within one step and releases all caches; within a step's own callback, at its end."""
        self.closed = True
        for generation in list(self._live):
            generation.cancel()
        if self._leader == threading.get_ident():
            self._clears = True
        else:
            self.exclusively(self.store.clear)

    @property
    def live(self) -> int:
        """Number of running generations."""
        return len(self._live)

    # --- fork ---------------------------------------------------------------------------------------------------------
    def before_fork(self) -> None:
        """Waits until no step runs: the child would wait forever for its end."""
        if self._leader != threading.get_ident():  # else a callback within a step forks
            self._lead_alone()
            self._forks = True

    def after_fork(self, *, child: bool) -> None:
        """Releases the lead. The child has no waiting threads, and generations of other threads have ended there."""
        mine = self._leader == threading.get_ident()
        if child:
            self._new_lock()
            self._asking, self._open = [], {}
            if self._forks or not mine:
                self._waiting, self._leader = [], None
        elif self._forks and mine:
            self._leader = None
            self._tidy()
        if mine:
            self._forks = False

    # --- the leader ---------------------------------------------------------------------------------------------------
    def _sweep(self) -> None:
        """Retires closed generations, which passes their caches on. The caller holds the lock; no thread leads."""
        closed = [generation for generation in list(self._live) if generation.closed]
        if not closed and not self._clears:
            return
        self._leader = threading.get_ident()  # the garbage collector may call `leave` meanwhile
        try:
            for generation in closed:
                try:
                    generation.retire()
                except Exception as error:
                    _log.warning("the cache of a generation was lost: %s", error)
                self._live.pop(generation, None)
                if generation.begun:
                    self._totals["requests"] += 1
                    self._totals.update({name: getattr(generation, name) for name in TOTALS[1:]})
            if self._clears:
                self._clears = False
                self.store.clear()
        finally:
            self._leader = None

    def move_out(self, engine: Engine, *, keep: bool = True) -> None:
        """Moves an engine out of the slab, with its cache or without. Only between two runs."""
        if (slab := self._slabs.get(engine.graph)) is not None:
            slab.remove(engine, keep=keep)
            if not slab.members:
                self._slabs.pop(engine.graph, None)

    def shares_memory(self, engine: Engine) -> bool:
        """Whether an engine is in a slab."""
        slab = self._slabs.get(engine.graph)
        return slab is not None and slab.holds(engine)

    def _drop(self, generation: Generation) -> None:
        """Drops the cache of a generation that an exception left in an unknown state."""
        self.move_out(generation.engine, keep=False)
        generation.restart()

    def _step(self) -> None:
        """Runs one generation's own step, mostly a chunk of its prefill, and one batch that decodes."""
        self.steps += 1
        bound: list[Generation] = []
        try:
            waiting = [g for g in self._waiting if not g.ended]
            for generation in waiting:
                if not generation.begun:
                    self._guarded(generation, generation.begin)
            batches = self._batches(waiting) if len(self._live) > 1 else []
            together = batches[0] if batches else []
            # Of the generations outside the batches, one runs a separate step each time, in turn.
            batched = set(chain(*batches))
            bound += together
            for alone in waiting:
                if alone in batched or alone.ready:
                    continue
                bound.append(alone)
                small = alone.pending > 1 and self._decodes_beside(alone)
                try:
                    alone.step(PREFILL_BESIDE if small else None)
                except Exception as error:
                    self._fail(alone, error)
                if len(waiting) > 1:
                    self._to_the_end(alone)
                break
            if together:
                self._decode(together)
            for generation in together if len(batches) > 1 else ():
                self._to_the_end(generation)
            for graph, slab in list(self._slabs.items()):
                self._park(slab, {g.engine for g in together})
                if not slab.members:
                    self._slabs.pop(graph, None)
        except BaseException:
            for generation in bound:
                self._drop(generation)
            raise

    def _batches(self, waiting: list[Generation]) -> list[list[Generation]]:
        """The generations of each graph's next batch, first the batch with the one that has waited longest."""
        live = [g for g in list(self._live) if g.begun and not g.ended]
        graphs = dict.fromkeys(g.engine.graph for g in live if g.engine.graph.batches)
        found = [self._sharing(waiting, [g for g in live if g.engine.graph is graph], graph) for graph in graphs]
        return sorted(filter(None, found), key=lambda batch: min(waiting.index(g) for g in batch if g in waiting))

    def _sharing(self, waiting: list[Generation], live: list[Generation], graph: DecoderGraph) -> list[Generation]:
        """The generations of the next batch of one graph."""
        if self._max_rows == 1:
            return []
        rows = [g for g in live if g.pending == 1 and g.engine.length > 0]
        # The slab has no room for these.
        members = self._slabs[graph].members if graph in self._slabs else []
        excess = [g for g in rows if g.engine not in members][self._max_rows - len(members) :]
        rows = [g for g in rows if g not in excess]
        if len(rows) < 2 or (len(rows) == 2 and sum(row.tokens_per_step for row in rows) > 2 * TURNS):
            return []
        reading = [g for g in rows if g.ahead < AHEAD]
        return reading if len(reading) > 1 and any(g in waiting for g in reading) else []

    def _decodes_beside(self, alone: Generation) -> bool:
        """Whether other generations decode meanwhile."""
        return any(g is not alone and g.begun and g.pending == 1 and not g.ended for g in list(self._live))

    def _decode(self, rows: list[Generation]) -> None:
        """Decodes one token of each generation in one run."""
        for generation in rows:
            self._guarded(generation, generation.make_ready)
        rows = [generation for generation in rows if not generation.ended and generation.pending == 1]
        if not rows:
            return
        graph = rows[0].engine.graph
        slab = self._slabs.get(graph) or self._slabs.setdefault(graph, Slab(graph, self._max_rows))
        try:
            logits = slab.decode([g.engine for g in rows], [g.ids[-1] for g in rows])
        except Exception as error:
            for generation in rows:
                self._fail(generation, error)
            return
        self.batched += len(rows)
        for generation, row in zip(rows, logits, strict=True):
            self._guarded(generation, lambda g=generation, row=row: _take(g, row, slab.finite))  # type: ignore[misc]

    def _park(self, slab: Slab, wanted: set[Engine]) -> None:
        """Moves out sequences that had no token for STALLED steps, so that batches do not compute their rows."""
        for engine in list(slab.members):
            slab.idle[engine] = 0 if engine in wanted else slab.idle.get(engine, 0) + 1
            if slab.idle[engine] > STALLED:
                self.move_out(engine)

    def _to_the_end(self, generation: Generation) -> None:
        with self._mutex:
            if generation in self._waiting:
                self._waiting.remove(generation)
                self._waiting.append(generation)

    def _guarded(self, generation: Generation, action: Callable[[], object]) -> None:
        """Runs `action`. An exception fails only this generation, not the thread that leads."""
        try:
            action()
        except Exception as error:
            self._fail(generation, error)

    def _fail(self, generation: Generation, error: Exception) -> None:
        self._drop(generation)
        generation.fail(error)


def _take(generation: Generation, logits: Logits, finite: bool) -> None:
    """Samples a token from the logits (V,) of a batched run. The engine's cache has advanced already.

    `finite`: whether those of all rows are. Else these are checked.
    """
    engine = generation.engine
    if not finite:
        engine.graph.check_finite(logits[None, None], engine.length - 1, 1)
    generation.take_together(logits[None])


def _each(call: Callable[[Scheduler], None]) -> Callable[[], None]:
    def of_all() -> None:
        for scheduler in list(_schedulers):
            call(scheduler)

    return of_all


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_each(Scheduler.before_fork),
        after_in_parent=_each(lambda scheduler: scheduler.after_fork(child=False)),
        after_in_child=_each(lambda scheduler: scheduler.after_fork(child=True)),
    )
