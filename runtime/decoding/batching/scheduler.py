"""Who runs a step, and for whom: generations over one graph that run at the same time are decoded together.

No thread runs in the background. Whoever waits for the next token of a generation leads: it runs the step for all
that are alive, and the others wait for its end. A step is at most one chunk of one prompt's prefill, and one run that
decodes a token of each row that can take one. So a late-comer is read chunk by chunk between the tokens of the others.

Rows are decoded ahead of those who read them, by AHEAD tokens at most: threads that come back from their last token one
after another would otherwise find only themselves, and streams that one thread reads in turn would never meet. A stream
that nobody reads stops there, and after STALLED steps more its row leaves the shared memory.

A row that is alone runs its own steps with drafts. So do a few whose drafts bring more than a common run does (`Pace`),
and those that cannot share a run: on the standard and the static graph, on another device, after a long text whose
cache is int8. These take turns, one step each.

Every change of the caches is the leader's, between two runs. The ids of a generation are the truth: whatever exception
leaves a step, the caches that the step had bound are dropped, and each of their generations runs its ids again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable

from pastkey.errors import InputError

from ...engine.caches.slab import Slab
from ...engine.decoder_graph import DecoderGraph, Logits
from ...engine.engine import Engine
from ..generation import Generation
from .pace import Pace
from .prefix_cache import PrefixStore

MAX_ROWS = 16  # that share a run; more take turns beside them
AHEAD = 4  # tokens that are decoded before somebody asks for them, where others are decoded anyway
STALLED = 16  # steps that a row which nobody reads stays among the others
PREFILL_BESIDE = 64  # tokens of a prompt in one step, where others wait for theirs
LOOK_SECONDS = 0.5  # after which a thread that waits looks again, should an interrupt have kept another from telling it

_log = logging.getLogger("pastkey")
_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


class Scheduler:
    """Runs the steps of the generations over one graph.

    Attributes:
        store: The caches of earlier texts.
        steps: How many steps were run.
        batched: How many tokens were decoded in runs of several rows.
        closed: Whether `close` was called.
    """

    def __init__(self, graph: DecoderGraph, store: PrefixStore, max_rows: int = MAX_ROWS) -> None:
        self.store = store
        self.steps = self.batched = 0
        self.closed = False
        self._new_lock()
        self._leader: int | None = None  # the thread that runs a step, or changes the caches
        self._asking: list[object] = []  # who wants to lead alone, in order of arrival
        self._live: dict[Generation, None] = {}
        self._waiting: list[Generation] = []  # who has a thread that waits, in order of their last step
        self._slab = Slab(graph, max_rows) if graph.batches and max_rows > 1 else None
        self._stalled: dict[int, int] = {}  # id of an engine in the slab -> steps without a token
        self._pace = Pace()
        self._forks = False  # whether the leader is about to fork
        self._clears = False  # whether the store is cleared at the end of the step
        _schedulers.add(self)

    def _new_lock(self) -> None:
        # The lock by itself is entered and left in C, where no interrupt comes between.
        self._mutex = threading.RLock()
        self._changed = threading.Condition(self._mutex)  # tells those who wait of the end of a step

    # --- whoever waits for a token ------------------------------------------------------------------------------------
    def advance(self, generation: Generation) -> None:
        """Runs steps, or waits while another does, until the generation is `ready`."""
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
                self._tidy()
        finally:
            if self._leader == me:
                self._leader = None  # before an interrupt can come within a call
            with self._mutex:
                if generation in self._waiting:
                    self._waiting.remove(generation)
                self._changed.notify_all()  # a follower leads now

    def _lead_alone(self) -> None:
        """Waits for the lead, before all who want a step: these would never leave a gap."""
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
        """Looks after those that have left, and lets another lead."""
        with self._mutex:
            if self._leader is None:
                self._sweep()
            self._changed.notify_all()

    def leave(self, generation: Generation) -> None:
        """Forgets a generation that is closed: now, or at the end of the step that runs.

        Never waits, since a collector may call it at any moment, in a thread that leads or has the lock.
        """
        self._live[generation] = None
        if self._mutex.acquire(blocking=False):
            try:
                if self._leader is None:
                    self._sweep()
            finally:
                self._mutex.release()

    def exclusively(self, action: Callable[[], object]) -> None:
        """Does something to the caches while no step runs. Raises InputError within a step."""
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
                "the model was asked for something within one of its own steps, which would wait for itself: let a "
                "logits_processor use another model, or none"
            )

    def wake(self) -> None:
        """Lets those who wait look again at what they wait for: one was cancelled."""
        with self._mutex:
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all generations within one step, and lets go of all caches; of a step's own callback, at its end."""
        self.closed = True
        for generation in list(self._live):
            generation.cancel()
        if self._leader == threading.get_ident():
            self._clears = True
        else:
            self.exclusively(self.store.clear)

    @property
    def live(self) -> int:
        """How many generations have begun and not ended."""
        return len(self._live)

    # --- a process that forks -----------------------------------------------------------------------------------------
    def before_fork(self) -> None:
        """Waits until no step runs: a child would wait for its end for ever."""
        if self._leader != threading.get_ident():  # else a step's own callback forks
            self._lead_alone()
            self._forks = True

    def after_fork(self, *, child: bool) -> None:
        """Goes on. In the child nobody waits, and what other threads generated has ended."""
        mine = self._leader == threading.get_ident()
        if child:
            self._new_lock()
            self._asking = []
            if self._forks or not mine:
                self._waiting, self._leader = [], None
        elif self._forks and mine:
            self._leader = None
            self._tidy()
        if mine:
            self._forks = False

    # --- the leader ---------------------------------------------------------------------------------------------------
    def _sweep(self) -> None:
        """Takes those that have left out of the slab, and hands their caches on. With the lock held, and no leader."""
        closed = [generation for generation in list(self._live) if generation.closed]
        if not closed and not self._clears:
            return
        self._leader = threading.get_ident()  # a collector may call `leave` within this
        try:
            for generation in closed:
                try:
                    generation.retire()
                except Exception as error:
                    _log.warning("the cache of a generation was lost: %s", error)
                self._live.pop(generation, None)
            if self._clears:
                self._clears = False
                self.store.clear()
        finally:
            self._leader = None

    def move_out(self, engine: Engine, *, keep: bool = True) -> None:
        """Takes a row out of the slab, with its cache or without. Between two runs only."""
        if self._slab is not None:
            self._stalled.pop(id(engine), None)
            self._slab.remove(engine, keep=keep)

    def shares_memory(self, engine: Engine) -> bool:
        """Whether an engine is in the slab."""
        return self._slab is not None and self._slab.holds(engine)

    def _drop(self, generation: Generation) -> None:
        """The rule of what an exception leaves: a cache that was bound is dropped."""
        self.move_out(generation.engine, keep=False)
        generation.restart()

    def _step(self) -> None:
        """One chunk of a prefill, and one run that decodes."""
        self.steps += 1
        bound: list[Generation] = []
        try:
            waiting = [g for g in self._waiting if not g.ended]
            for generation in waiting:
                if not generation.begun:
                    self._guarded(generation, generation.begin)
            together = self._sharing(waiting) if len(self._live) > 1 else []
            # Who is not decoded with others has a step of its own, one of them each time, in order.
            alone = next((g for g in waiting if g not in together and not g.ready), None)
            bound += together
            if alone is not None:
                bound.append(alone)
                decodes, before, started = alone.pending == 1, len(alone.ids), time.perf_counter()
                try:
                    alone.step(None if decodes or not self._decodes_beside(alone) else PREFILL_BESIDE)
                except Exception as error:
                    self._fail(alone, error)
                if decodes and len(alone.ids) > before:
                    self._pace.note(1, time.perf_counter() - started, draft=alone.drafted)
                if len(waiting) > 1:
                    self._to_the_end(alone)
            if together:
                self._decode(together)
            if self._slab is not None and self._slab.members:
                self._park(self._slab, {id(g.engine) for g in together})
        except BaseException:
            for generation in bound:
                self._drop(generation)
            raise

    def _sharing(self, waiting: list[Generation]) -> list[Generation]:
        """Those whose next tokens are decoded in one run."""
        live = [g for g in list(self._live) if g.begun and not g.ended]
        rows = [g for g in live if g.pending == 1 and self._shares(g)]
        if len(rows) < 2 or self._pace.turns_pay(rows):
            return []
        reading = [g for g in rows if g.ahead < AHEAD]
        return reading if len(reading) > 1 and any(g in waiting for g in reading) else []

    def _decodes_beside(self, alone: Generation) -> bool:
        """Whether others wait for tokens meanwhile."""
        return any(g is not alone and g.begun and g.pending == 1 and not g.ended for g in list(self._live))

    def _shares(self, generation: Generation) -> bool:
        """Whether its next token can be decoded in a run with others."""
        slab, engine = self._slab, generation.engine
        return slab is not None and engine.length > 0 and not engine.decodes_in_int8 and slab.has_room(engine)

    def _decode(self, rows: list[Generation]) -> None:
        """One token for each of several rows, in one run."""
        assert self._slab is not None
        for generation in rows:
            self._guarded(generation, generation.make_ready)
        rows = [generation for generation in rows if not generation.ended and generation.pending == 1]
        if not rows:
            return
        joining = 0
        for generation in list(rows):  # room was looked at for each alone
            joining += not self._slab.holds(generation.engine)
            if len(self._slab.members) + joining > self._slab.most and not self._slab.holds(generation.engine):
                rows.remove(generation)
        started = time.perf_counter()
        try:
            logits = self._slab.decode([g.engine for g in rows], [g.ids[-1] for g in rows])
        except Exception as error:
            for generation in rows:
                self._fail(generation, error)
            return
        self._pace.note(len(rows), time.perf_counter() - started)
        self.batched += len(rows)
        for generation, row in zip(rows, logits, strict=True):
            self._guarded(generation, lambda g=generation, row=row: _take(g, row))  # type: ignore[misc]

    def _park(self, slab: Slab, wanted: set[int]) -> None:
        """Moves rows out that have had no token for a while, so that the others do not run over them."""
        for engine in list(slab.members):
            steps = 0 if id(engine) in wanted else self._stalled.get(id(engine), 0) + 1
            self._stalled[id(engine)] = steps
            if steps > STALLED:
                self._stalled.pop(id(engine))
                slab.remove(engine)

    def _to_the_end(self, generation: Generation) -> None:
        with self._mutex:
            if generation in self._waiting:
                self._waiting.remove(generation)
                self._waiting.append(generation)

    def _guarded(self, generation: Generation, action: Callable[[], object]) -> None:
        """An error belongs to the generation that it came of, whoever leads."""
        try:
            action()
        except Exception as error:
            self._fail(generation, error)

    def _fail(self, generation: Generation, error: Exception) -> None:
        self._drop(generation)
        generation.fail(error)


def _take(generation: Generation, logits: Logits) -> None:
    """Takes a token by the logits (V,) of a run of several rows, which its engine took in already."""
    engine = generation.engine
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
