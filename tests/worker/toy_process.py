"""A toy worker as a process of its own that freezes or kills itself at a named point of a handover.

`POINTS` wraps what the worker passes through at that point; nothing in the worker knows of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from baton.common.clock import RealClock
from baton.common.messages import Commit, Committed, Filled, Move, Reserve, Reserved
from baton.common.types import Role
from baton.decode.role import DecodeRole
from baton.engine.mailbox import FromRouter, FromSource, FromTarget, Inbox
from baton.engine.plan import StepPlan
from baton.kvtransfer import pair
from baton.kvtransfer.host_store import HostStore
from baton.kvtransfer.pair import Pair
from baton.kvtransfer.process_group import ProcessGroups
from baton.protos.rpc import CalledStream
from baton.worker.assembly import Worker
from tests.toy import ToyEngine, worker_config

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Sick:
    """What the process is told: who it is, where it strikes itself (a key of `POINTS`), and by which signal. `step_s`:
    how long each of its steps takes at least. `reach`: see `Reach`; the process hears of another one by its pipe."""

    name: str
    role: Role
    point: str
    signal: int
    handover: dict[str, object]
    step_s: float = 0.0
    reach: float = math.inf


@dataclass
class Reach:
    """So many tokens a request may have, prompt and all, until it may have more: what shall happen while it runs
    happens before its end, however slow or fast the machine."""

    tokens: float = math.inf

    def of(self, worker: Worker) -> None:
        """Its decode role plans no token while one of its requests has as many."""
        for role in worker.loop.roles:
            if isinstance(role, DecodeRole):
                role.plan = partial(self._plan, role, role.plan)  # type: ignore[method-assign]

    def _plan(self, role: DecodeRole, plan: Callable[[StepPlan, float], None], step: StepPlan, now: float) -> None:
        if all(len(sequence.tokens) < self.tokens for sequence in role._planner.running):
            plan(step, now)


When = Callable[..., bool]
Point = Callable[[Worker, "Strike"], None]


@dataclass
class Strike:
    """Strikes once, after it has said so."""

    signal: int
    says: Connection
    done: bool = False

    def __call__(self) -> None:
        if not self.done:
            self.done = True
            self.says.send("here")
            os.kill(os.getpid(), self.signal)
            time.sleep(0.02)  # it reaches all threads in a moment

    def before(self, owner: Any, name: str, when: When = lambda *_: True) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **named: Any) -> Any:
            if when(*args):
                self()
            return original(*args, **named)

        setattr(owner, name, wrapped)

    def after(self, owner: Any, name: str, when: When = lambda *_: True) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **named: Any) -> Any:
            result = original(*args, **named)
            if when(*args):
                self()
            return result

        setattr(owner, name, wrapped)


def _nth(count: int) -> When:
    """True from call number `count` on."""
    calls = iter(range(1, 1 << 30))
    return lambda *_: next(calls) >= count


def _posts(wrapper: type, message: type) -> When:
    return lambda _, item: isinstance(item, wrapper) and isinstance(item.message, message)  # type: ignore[attr-defined]


def _sends(message: type) -> When:
    return lambda _, item: isinstance(item, message)


# --- at the source ---


def _giving(worker: Worker, strike: Strike, number: int, where: str = "before") -> None:
    """Around the frame of this number."""
    make, nth = worker.plane.outlet._make_giver, _nth(number)

    def made(*args: Any) -> Any:
        giver = make(*args)
        getattr(strike, where)(giver, "give", nth)
        return giver

    worker.plane.outlet._make_giver = made


def _all_sent(worker: Worker, strike: Strike) -> None:
    outlet = worker.plane.outlet

    def nothing_under_way(_: object, message: object) -> bool:
        if not isinstance(message, Commit):
            return False
        end = time.monotonic() + 1.0
        while outlet.pending(message.handover_id) and time.monotonic() < end:
            time.sleep(0.001)
        return True

    strike.before(worker._targets, "send", nothing_under_way)


def _commit_written(_: Worker, strike: Strike) -> None:
    write = CalledStream.write

    async def wrapped(self: Any, message: Any) -> None:
        await write(self, message)
        if isinstance(message, Commit):
            strike()

    CalledStream.write = wrapped  # type: ignore[method-assign]


# --- at the target ---


def _landing(worker: Worker, strike: Strike, where: str) -> None:
    """Around the copy of a frame's bytes, under the reservation's lock."""
    receive = worker.plane.inlet.receive

    def wrapped(source: Any, rank: int, header: Any, taker: Any) -> None:
        if not strike.done and "land" not in vars(taker):
            getattr(strike, where)(taker, "land")
        receive(source, rank, header, taker)

    worker.plane.inlet.receive = wrapped  # type: ignore[method-assign]


def _halfway(side: str) -> Point:
    """One piece of a frame has been summed, or copied, in step; the other end waits for more, or has gone on."""

    def lead(original: Any, strike: Strike) -> Any:
        def led(store: Any, ledger: Any, done: int, layers: range, blocks: Any, route: Any) -> int:
            if not strike.done and done == 0 and len(blocks) > 1:
                done = original(store, ledger, done, layers[:1], blocks[:1], route)
                strike()
            return int(original(store, ledger, done, layers, blocks, route))

        return led

    def follow(original: Any, strike: Strike) -> Any:
        def followed(store: Any, ledger: Any, done: int, *there: Any) -> int:
            *peer, layers, theirs, blocks, route, sums, over = there
            if not strike.done and done == 0 and len(blocks) > 1:
                some = tuple(each[:1] for each in sums)
                done = original(store, ledger, 0, *peer, layers[:1], theirs[:1], blocks[:1], route, some, over)
                strike()
            return int(original(store, ledger, done, *there))

        return followed

    def point(_: Worker, strike: Strike) -> None:
        name, made = ("lead", lead) if side == "source" else ("follow", follow)
        setattr(HostStore, name, made(getattr(HostStore, name), strike))

    return point


def _pausing(worker: Worker, strike: Strike) -> None:
    """A request that moves away has just left the batch."""
    (decode,) = (role for role in worker.loop.roles if isinstance(role, DecodeRole))
    strike.after(decode._planner, "pause")


SOURCE: dict[str, Point] = {
    "source: about to ask": lambda w, s: s.before(w._targets, "send", _sends(Reserve)),
    "source: asked": lambda w, s: s.before(Inbox, "post", _posts(FromTarget, Reserved)),
    "source: before the first byte": lambda w, s: _giving(w, s, 1),
    "source: in mid-transfer": lambda w, s: _giving(w, s, 7),
    "source: in mid-transfer, a frame just sent": lambda w, s: _giving(w, s, 7, "after"),
    "source: all sent": _all_sent,
    "source: committing": _commit_written,
    "source: about to hear of the commit": lambda w, s: s.before(Inbox, "post", _posts(FromTarget, Committed)),
    "source: committed": lambda w, s: s.before(w.loop.context.outbox, "handed_over"),
}

TARGET: dict[str, Point] = {
    "target: asked": lambda w, s: s.before(Inbox, "post", _posts(FromSource, Reserve)),
    "target: reserved": lambda w, s: s.before(w._sources, "send", _sends(Reserved)),
    "target: a lane comes": lambda w, s: s.before(w.plane._server, "admit"),
    "target: before the first byte": lambda w, s: s.before(w.plane.inlet, "receive", _nth(1)),
    "target: in mid-transfer": lambda w, s: s.before(w.plane.inlet, "receive", _nth(7)),
    "target: about to copy": lambda w, s: _landing(w, s, "before"),
    "target: just copied": lambda w, s: _landing(w, s, "after"),
    "target: filled": lambda w, s: s.before(w.plane.inlet, "_post", lambda item: isinstance(item, Filled)),
    "target: about to hear of the commit": lambda w, s: s.before(Inbox, "post", _posts(FromSource, Commit)),
    "target: committed": lambda w, s: s.before(w._sources, "send", _sends(Committed)),
    "target: committed and said so": lambda w, s: s.after(w._sources, "send", _sends(Committed)),
}

PAIR: dict[str, Point] = {
    "about to meet": lambda _, s: s.before(ProcessGroups, "pair"),
    "meeting": lambda _, s: s.before(pair._Meeting, "get"),
    "just met": lambda _, s: s.after(ProcessGroups, "pair"),
}
"""At either end of a lane by a process group."""

PAIR_SOURCE: dict[str, Point] = {
    "source: a frame announced, its bytes not sent": lambda _, s: s.before(Pair, "send", _nth(7)),
    "source: its bytes under way": lambda _, s: s.after(Pair, "send", _nth(7)),
}

PAIR_TARGET: dict[str, Point] = {
    "target: a frame announced, its bytes not asked for": lambda _, s: s.before(Pair, "receive", _nth(7)),
    "target: its bytes under way": lambda _, s: s.after(Pair, "receive", _nth(7)),
}

STEP: dict[str, Point] = {
    "source: halfway through a frame": _halfway("source"),
    "target: halfway through a frame": _halfway("target"),
}
"""At an end of a lane by shared memory whose frames hold several blocks."""

MOVING: dict[str, Point] = {
    "source: told to move": lambda _, s: s.before(Inbox, "post", _posts(FromRouter, Move)),
    "source: paused": _pausing,
}
"""At a decode worker that a running request leaves."""

POINTS = SOURCE | TARGET | PAIR | PAIR_SOURCE | PAIR_TARGET | STEP | MOVING


def toy_engine(lease_s: float, step_s: float = 0.0, num_blocks: int = 64, late: bool = False) -> ToyEngine:
    """One that can have process groups as well. Its steps take `step_s` seconds at least."""
    engine = ToyEngine(num_blocks, groups=ProcessGroups(torch.device("cpu"), "127.0.0.1", lease_s), late=late)
    engine.runner.before = lambda _: time.sleep(step_s)
    return engine


def main(sick: Sick, says: Connection) -> None:
    """Be that worker, until somebody ends this process. Says its `WorkerRef`, and "here" when it strikes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # stopped or not
    asyncio.run(_run(sick, says))


async def _run(sick: Sick, says: Connection) -> None:
    config = worker_config(sick.name, sick.role, **sick.handover)
    worker = Worker(config, toy_engine(config.handover.lease_s, sick.step_s), RealClock())
    POINTS[sick.point](worker, Strike(sick.signal, says))
    reach = Reach(sick.reach)
    reach.of(worker)
    threading.Thread(target=_heed, args=(reach, says), daemon=True).start()
    await worker.start()
    threading.Thread(target=worker.loop.run, args=(threading.Event(),), daemon=True).start()
    says.send(worker.ref)
    await asyncio.Event().wait()


def _heed(reach: Reach, says: Connection) -> None:
    with contextlib.suppress(EOFError):
        while True:
            reach.tokens = says.recv()
