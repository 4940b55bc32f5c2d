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

Every change of the caches is the leader's, between two runs. `leave` never waits and takes no lock for certain, since a
collector may call it at any moment in any thread, the leader's too.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable

from pastkey.errors import InputError, NumericsError

from ..engine.decoder_graph import DecoderGraph, Logits
from ..engine.engine import Engine
from ..engine.slab import Slab
from ..generate import Generation
from .pace import Pace
from .prefix_store import PrefixStore

MAX_ROWS = 16  # that share a run; more take turns beside them
AHEAD = 4  # tokens that are decoded before somebody asks for them, where others are decoded anyway
STALLED = 16  # steps that a row which nobody reads stays among the others
PREFILL_BESIDE = 64  # tokens of a prompt in one step, where others wait for theirs
LOOK_SECONDS = 0.5  # how often whoever waits looks whether the leader is alive


_log = logging.getLogger("pastkey")


class _Lead:
    """The right to run steps. It ends with its thread, whatever interrupts it."""

    def __init__(self) -> None:
        self.led = self.over = False
        self.thread = threading.current_thread()

    @property
    def lives(self) -> bool:
        return not self.over and self.thread.is_alive()


_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


class Scheduler:
    """Runs the steps of the generations over one graph.

    Attributes:
        store: The caches of earlier texts.
        steps: How many steps were run.
        batched: How many tokens were decoded in runs of several rows.
    """

    def __init__(self, graph: DecoderGraph, store: PrefixStore, max_rows: int = MAX_ROWS) -> None:
        self.store = store
        self.steps = self.batched = 0
        # An interrupt may come inside a Condition's own Python, and leave its lock held: a lock and gates have none.
        self._mutex = threading.Lock()
        self._gates: list[threading.Lock] = []  # one for each thread that waits, opened when something has changed
        self._lead: _Lead | None = None
        self._asking: list[_Lead] = []  # who wants to lead alone, in order of arrival
        self._live: list[Generation] = []
        self._waiting: list[Generation] = []  # who has a thread that waits, in order of their last step
        self._left: list[Generation] = []  # to be taken out of the caches
        self._slab = Slab(graph, max_rows) if graph.batches and max_rows > 1 else None
        self._stalled: dict[int, int] = {}  # id of an engine in the slab -> steps without a token
        self._pace = Pace()
        self._held: dict[int, _Lead] = {}  # by thread that forks, of which several may
        self._clears = False  # whether the store is cleared at the end of the step
        _schedulers.add(self)

    # --- whoever waits for a token ------------------------------------------------------------------------------------
    def advance(self, generation: Generation) -> None:
        """Runs steps, or waits while another does, until the generation is `ready`."""
        self._require_outside()
        try:
            with self._mutex:
                if generation not in self._live:
                    self._live.append(generation)
                self._waiting.append(generation)
            while not generation.ready:
                self._lead_or_wait(generation)
        finally:
            with self._mutex:
                if generation in self._waiting:
                    self._waiting.remove(generation)
                self._open_gates()  # a follower leads now

    def _lead_or_wait(self, generation: Generation) -> None:
        """Runs steps until the generation is ready where nobody else does; else waits for the end of one."""
        lead = _Lead()
        try:
            gate = None
            with self._mutex:
                if generation.ready:
                    return
                if self._is_led or any(asking.lives for asking in self._asking):
                    gate = self._new_gate()
                else:
                    self._lead, lead.led = lead, True
            if gate is not None:
                gate.acquire(timeout=max(0.0, min(LOOK_SECONDS, generation.deadline - time.monotonic())))
                return
            self._step()
        finally:
            lead.over = True  # an interrupt may come as soon as something is called
            self._give_up(lead)

    def _new_gate(self) -> threading.Lock:
        """A lock that is opened when something has changed. With the mutex held; it is waited for without."""
        gate = threading.Lock()
        gate.acquire()
        self._gates.append(gate)
        return gate

    def _open_gates(self) -> None:
        """Lets all who wait look again. With the mutex held."""
        gates, self._gates = self._gates, []
        for gate in gates:
            gate.release()

    def _give_up(self, lead: _Lead) -> None:
        """Lets another lead, if this one did."""
        if lead.led or lead in self._asking:
            with self._mutex:
                self._forget_who_asked()
                if self._lead is lead:
                    self._sweep()
                    self._lead = None
                self._open_gates()

    def _forget_who_asked(self) -> None:
        """With the mutex held; others may append at any moment."""
        for lead in [asking for asking in self._asking if not asking.lives]:
            self._asking.remove(lead)

    def leave(self, generation: Generation) -> None:
        """Forgets a generation that is closed: now, or by the leader at the end of its step."""
        self._left.append(generation)
        if not self._mutex.locked():  # else this thread may hold it, below a collector's call
            with self._mutex:
                if not self._is_led:
                    self._sweep()

    def exclusively(self, action: Callable[[], object]) -> None:
        """Does something to the caches while no step runs. Raises InputError within a step."""
        self._require_outside()
        lead = _Lead()
        try:
            self._asking.append(lead)
            self._wait_for(lead)
            action()
        finally:
            lead.over = True
            self._give_up(lead)

    def _wait_for(self, lead: _Lead) -> None:
        """Waits for the lead, before all who want a step: these would never leave a gap."""
        while True:
            with self._mutex:
                if not self._is_led and next(other for other in self._asking if other.lives) is lead:
                    self._lead, lead.led = lead, True
                    self._sweep()
                    return
                gate = self._new_gate()
            gate.acquire(timeout=LOOK_SECONDS)

    @property
    def _is_led(self) -> bool:
        return self._lead is not None and self._lead.lives

    @property
    def _is_within(self) -> bool:
        """Whether this is called by a step of its own."""
        lead = self._lead
        return lead is not None and not lead.over and lead.thread is threading.current_thread()

    def _require_outside(self) -> None:
        if self._is_within:
            raise InputError(
                "the model was asked for something within one of its own steps, which would wait for itself: let a "
                "logits_processor use another model, or none"
            )

    def wake(self) -> None:
        """Lets those who wait look again at what they wait for: one was cancelled."""
        with self._mutex:
            self._open_gates()

    def close(self) -> None:
        """Ends all generations within one step, and lets go of all caches; of a step's own callback, at its end."""
        for generation in list(self._live):
            generation.cancel()
        if self._is_within:
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
        if self._is_within:
            return  # a step's own callback forks, or this is done already
        lead = self._held[threading.get_ident()] = _Lead()
        try:
            self._asking.append(lead)
            self._wait_for(lead)
        except BaseException:
            self.after_fork(child=False)
            raise

    def after_fork(self, *, child: bool) -> None:
        """Goes on. In the child nobody waits, and what other threads generated has ended."""
        held = self._held.get(threading.get_ident())
        if held is None:
            return
        held.over = True
        if child:
            self._lead, self._mutex = None, threading.Lock()
            self._waiting, self._asking, self._gates = [], [], []
            self._held = {}
        else:
            self._give_up(held)
            self._held.pop(threading.get_ident(), None)

    # --- the leader ---------------------------------------------------------------------------------------------------
    def _sweep(self) -> None:
        """Takes those that have left out of the slab, and hands their caches on."""
        # An interrupt may have come between the end of a generation and `leave`.
        self._left += [generation for generation in self._live if generation.closed and generation not in self._left]
        while self._left:
            generation = self._left[0]
            try:
                generation.retire()
            except Exception as error:
                _log.warning("the cache of a generation was lost: %s", error)
            for those in (self._live, self._waiting, self._left):
                if generation in those:
                    those.remove(generation)
        if self._clears:
            self._clears = False
            self.store.clear()

    def move_out(self, engine: Engine, *, keep: bool = True) -> None:
        """Takes a row out of the slab, with its cache or without. Between two runs only."""
        if self._slab is not None:
            self._stalled.pop(id(engine), None)
            self._slab.remove(engine, keep=keep)

    def shares_memory(self, engine: Engine) -> bool:
        """Whether an engine is in the slab."""
        return self._slab is not None and self._slab.holds(engine)

    def _step(self) -> None:
        """One chunk of a prefill, and one run that decodes."""
        self.steps += 1
        waiting = [g for g in self._waiting if not g.ended]
        live = [g for g in list(self._live) if not g.ended]
        for generation in waiting:
            self._guarded(generation, generation.begin)
        rows = [g for g in live if g.begun and not g.ended and g.pending == 1 and self._shares(g)]
        if len(rows) < 2 or self._pace.turns_pay(rows):
            rows = []
        reading = [g for g in rows if g.ahead < AHEAD]
        together = reading if len(reading) > 1 and any(g in waiting for g in reading) else []
        # Who is not decoded with others has a step of its own, one of them each time, in order.
        alone = next((g for g in waiting if g not in together and not g.ready), None)
        if alone is not None:
            beside = alone.pending > 1 and any(g is not alone and g.begun and g.pending == 1 for g in live)
            decodes, before, started = alone.begun and alone.pending == 1, len(alone.ids), time.perf_counter()
            self._guarded(alone, lambda: alone.step(PREFILL_BESIDE if beside else None))
            if decodes and len(alone.ids) > before:
                self._pace.note(1, time.perf_counter() - started, draft=alone.drafted)
            self._to_the_end(alone)
        if together:
            self._decode(together)
        self._park({id(g.engine) for g in together})

    def _shares(self, generation: Generation) -> bool:
        """Whether its next token can be decoded in a run with others."""
        slab, engine = self._slab, generation.engine
        return slab is not None and engine.length > 0 and not engine.decodes_in_int8 and slab.has_room(engine)

    def _decode(self, rows: list[Generation]) -> None:
        """One token for each of several rows, in one run."""
        assert self._slab is not None
        for generation in rows:
            self._guarded(generation, generation.settle)
            self._guarded(generation, lambda g=generation: g.kept.make_room(g.engine, 1))  # type: ignore[misc]
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
                generation.fail(error)
            return
        self._pace.note(len(rows), time.perf_counter() - started)
        self.batched += len(rows)
        for generation, row in zip(rows, logits, strict=True):
            self._guarded(generation, lambda g=generation, row=row: _take(g, row))  # type: ignore[misc]

    def _park(self, wanted: set[int]) -> None:
        """Moves rows out that have had no token for a while, so that the others do not run over them."""
        if self._slab is None or not self._slab.members:
            return
        for engine in list(self._slab.members):
            steps = 0 if id(engine) in wanted else self._stalled.get(id(engine), 0) + 1
            self._stalled[id(engine)] = steps
            if steps > STALLED:
                self._stalled.pop(id(engine))
                self._slab.remove(engine)

    def _to_the_end(self, generation: Generation) -> None:
        with self._mutex:
            if generation in self._waiting:
                self._waiting.remove(generation)
                self._waiting.append(generation)

    @staticmethod
    def _guarded(generation: Generation, action: Callable[[], object]) -> None:
        """An error belongs to the generation that it came of, whoever leads."""
        try:
            action()
        except Exception as error:
            generation.fail(error)


def _take(generation: Generation, logits: Logits) -> None:
    """Takes a token by the logits (V,) of a run of several rows, which its engine took in already."""
    engine = generation.engine
    try:
        engine.graph.check_finite(logits[None, None], engine.length - 1, 1)
    except NumericsError:
        engine.trim(engine.length - 1)
        raise
    generation.take_together(logits[None])


def _each(call: Callable[[Scheduler], None]) -> Callable[[], None]:
    def of_all() -> None:
        for scheduler in list(_schedulers):
            call(scheduler)

    return of_all


if hasattr(os, "register_at_fork"):
    for _ in range(2):  # an interrupt comes once, and ends one of the two: what is done already is not done again
        os.register_at_fork(
            before=_each(Scheduler.before_fork),
            after_in_parent=_each(lambda scheduler: scheduler.after_fork(child=False)),
            after_in_child=_each(lambda scheduler: scheduler.after_fork(child=True)),
        )
