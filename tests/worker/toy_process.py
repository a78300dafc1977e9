"""A toy worker as a process of its own that stops or kills itself at a named point of a handover.

`POINTS` wraps what the worker passes through at that point; nothing in the worker knows of it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from baton.common.clock import RealClock
from baton.common.messages import Commit, Committed, Filled, Reserve, Reserved
from baton.common.types import Role
from baton.engine.mailbox import FromSource, FromTarget, Inbox
from baton.protos.rpc import CalledStream
from baton.worker.assembly import Worker
from tests.toy import ToyEngine, worker_config

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Sick:
    """What the process is told: who it is, where it strikes itself (a key of `POINTS`), and by which signal."""

    name: str
    role: Role
    point: str
    signal: int
    handover: dict[str, object]


When = Callable[..., bool]


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

        def wrapped(*args: Any) -> Any:
            if when(*args):
                self()
            return original(*args)

        setattr(owner, name, wrapped)

    def after(self, owner: Any, name: str, when: When = lambda *_: True) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any) -> Any:
            result = original(*args)
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


Point = Callable[[Worker, Strike], None]

SOURCE: dict[str, Point] = {
    "about to ask": lambda w, s: s.before(w._targets, "send", _sends(Reserve)),
    "asked": lambda w, s: s.before(Inbox, "post", _posts(FromTarget, Reserved)),
    "before the first byte": lambda w, s: _giving(w, s, 1),
    "in mid-transfer": lambda w, s: _giving(w, s, 7),
    "in mid-transfer, a frame just sent": lambda w, s: _giving(w, s, 7, "after"),
    "all sent": _all_sent,
    "committing": _commit_written,
    "about to hear of the commit": lambda w, s: s.before(Inbox, "post", _posts(FromTarget, Committed)),
    "committed": lambda w, s: s.before(w.loop.context.outbox, "handed_over"),
}

TARGET: dict[str, Point] = {
    "asked": lambda w, s: s.before(Inbox, "post", _posts(FromSource, Reserve)),
    "reserved": lambda w, s: s.before(w._sources, "send", _sends(Reserved)),
    "before the first byte": lambda w, s: s.before(w.plane.inlet, "receive", _nth(1)),
    "in mid-transfer": lambda w, s: s.before(w.plane.inlet, "receive", _nth(7)),
    "about to copy": lambda w, s: _landing(w, s, "before"),
    "just copied": lambda w, s: _landing(w, s, "after"),
    "filled": lambda w, s: s.before(w.plane.inlet, "_post", lambda item: isinstance(item, Filled)),
    "about to hear of the commit": lambda w, s: s.before(Inbox, "post", _posts(FromSource, Commit)),
    "committed": lambda w, s: s.before(w._sources, "send", _sends(Committed)),
    "committed and said so": lambda w, s: s.after(w._sources, "send", _sends(Committed)),
}

POINTS = {Role.PREFILL: SOURCE, Role.DECODE: TARGET}


def main(sick: Sick, says: Connection) -> None:
    """Be that worker, until somebody ends this process. Says its `WorkerRef`, and "here" when it strikes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # stopped or not
    asyncio.run(_run(sick, says))


async def _run(sick: Sick, says: Connection) -> None:
    worker = Worker(worker_config(sick.name, sick.role, **sick.handover), ToyEngine(), RealClock())
    POINTS[sick.role][sick.point](worker, Strike(sick.signal, says))
    await worker.start()
    threading.Thread(target=worker.loop.run, args=(threading.Event(),), daemon=True).start()
    says.send(worker.ref)
    await asyncio.Event().wait()
