"""A toy worker of one or two ranks, each a process. The second has half of every entry: rank 0 asks it for that before
it draws a token, as the ranks of a real engine add up what each has."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import queue
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baton.common.clock import RealClock
from baton.common.errors import EngineBroken, WorkerLost
from baton.common.types import Role, WorkerRef
from baton.engine.follower import READY, Follower, Followers
from baton.engine.plan import OnLayer
from baton.kvtransfer.plane import Plane
from baton.worker.assembly import Worker
from baton.worker.rank_plane import reached_by_grpc
from baton.worker.spread import LATE_S, commands, reports
from tests.toy import BLOCK_SIZE, Told, ToyEngine, ToyPool, ToyRunner, worker_config

HEADS = 2
BLOCKS = 80
TIMEOUT_S = 5.0
STEP_S = 0.003
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Spec:
    """What the processes of a worker are told."""

    name: str
    role: Role
    tp: int
    epoch: int
    handover: dict[str, object]


class FirstRunner(ToyRunner):
    """Rank 0's: the other rank is told of each step, and asked for what it has."""

    def __init__(self, pool: ToyPool, followers: Followers) -> None:
        super().__init__(pool)
        self._followers = followers
        self._theirs: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
        followers.subscribe("read", lambda _, halves: self._theirs.put(halves))

    def forward(self, parts: Sequence[Told], on_layer: OnLayer | None) -> None:
        told = [(part.tokens, part.blocks, part.start, part.end, part.samples) for part in parts]
        self._followers.send("run", told)
        super().forward(parts, on_layer)
        try:
            self._halves = iter(self._theirs.get(timeout=TIMEOUT_S))
        except queue.Empty as error:
            raise EngineBroken("the other rank does not answer") from error

    def kv(self, part: Told) -> NDArray[np.uint8]:
        ours = super().kv(part)
        theirs = np.frombuffer(next(self._halves), np.uint8).reshape(ours.shape)
        return np.concatenate((ours, theirs), axis=3)


def second(spec: Spec, address: str, token: str) -> None:
    """Be rank 1 until rank 0 hangs up."""
    config = worker_config(spec.name, spec.role, **spec.handover)
    pool = ToyPool(BLOCKS, BLOCK_SIZE, HEADS, 2, 1)
    runner = ToyRunner(pool)
    follower = Follower(address, token, 1, TIMEOUT_S)

    def make_plane(events: asyncio.AbstractEventLoop, grpc: str) -> Plane:
        return Plane(
            WorkerRef(spec.name, "", spec.epoch), pool.store, config.handover, config.cluster_token, config.host,
            RealClock(), events, reports(follower), pool.shared, grpc, late_s=LATE_S,
        )  # fmt: skip

    def run(told: list[Any]) -> None:
        parts = [Told(None, *each) for each in told]
        runner.forward(parts, plane.outlet.layer)
        follower.report("read", [runner.kv(part).tobytes() for part in parts if part.samples])

    with contextlib.suppress(WorkerLost), reached_by_grpc(config.host, config.cluster_token, make_plane) as plane:
        follower.report(READY, dict(plane.door))
        follower.follow({"run": run, **commands(plane)})


def first(spec: Spec, says: Connection) -> None:
    """Be rank 0 until it is ended, or the other rank is. Says where the other rank finds it, and its `WorkerRef`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    followers = Followers(1, TIMEOUT_S) if spec.tp == 2 else None
    if followers is not None:
        says.send((followers.address, followers.token))
        followers.wait_for(READY)
        followers.lost.add_done_callback(lambda _: os._exit(1))
    asyncio.run(_run(spec, followers, says))


async def _run(spec: Spec, followers: Followers | None, says: Connection) -> None:
    engine = ToyEngine(BLOCKS, heads=HEADS, followers=followers)
    if followers is not None:
        engine.runner = FirstRunner(engine.pool, followers)
    engine.runner.before = lambda _: time.sleep(STEP_S)
    worker = Worker(worker_config(spec.name, spec.role, **spec.handover), engine, RealClock(), spec.epoch)
    await worker.start()
    threading.Thread(target=worker.loop.run, args=(threading.Event(),), daemon=True).start()
    says.send(worker.ref)
    await asyncio.Event().wait()
