"""Putting a worker together: one engine loop, the roles it plays, and the lines to others."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from ..common.clock import Clock
from ..common.config import WorkerConfig
from ..common.errors import DeadlineExceeded, InvalidRequest, NotReady
from ..common.hashing import BlockHasher, cluster_key
from ..common.messages import CheckReport, Endpoint, Load, Turn
from ..common.types import Role, WorkerInfo, WorkerRef
from ..engine.block_table import BlockTable
from ..engine.follower import READY
from ..engine.loop import EngineLoop
from ..engine.mailbox import Inbox, Inspect, Mail, Outbox, Recast
from ..engine.plan import Runner
from ..engine.role import Context, Limits
from ..kvtransfer.fetched import Shared
from ..kvtransfer.plane import Plane, this_host
from ..kvtransfer.transport import Inlet, Outlet, Store
from ..protos import rpc
from ..protos.convert import FromRouter, FromSource, FromTarget, FromWorker
from .cast import Cast
from .links import RouterLines, SourceLines, TargetLines
from .spread import SpreadInlet, SpreadOutlet

if TYPE_CHECKING:  # they need torch, and not all workers do
    from ..engine.follower import Followers
    from ..kvtransfer.process_group import ProcessGroups

log = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 10.0
"""How long an operator's question may wait for the loop to come round."""


class Computes(Protocol):
    """What a worker needs of the compute side: `engine.runner.Engine`, or a test's stand-in. No torch here."""

    @property
    def runner(self) -> Runner: ...
    @property
    def store(self) -> Store: ...
    @property
    def shared(self) -> Shared | None:
        """The pool's memory, where other processes of this machine may see it."""
        ...

    @property
    def groups(self) -> ProcessGroups | None:
        """What makes process groups, where the compute side can."""
        ...

    @property
    def followers(self) -> Followers | None:
        """The other ranks, where the worker has several. They are ready."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether a step may be planned while its device computes another, if the configuration does not say."""
        ...

    @property
    def eos_ids(self) -> frozenset[int]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...


def new_epoch() -> int:
    """A number that no other incarnation of any worker has."""
    return secrets.randbits(62) + 1


class Worker:
    """A whole worker but for its process: `start` listens, `loop.run` (on a thread of its own) works.

    Everything but the loop runs on the event loop that is running when it is made. `epoch`: the number of this
    incarnation, where somebody knows it already.
    """

    def __init__(self, config: WorkerConfig, engine: Computes, clock: Clock, epoch: int | None = None) -> None:
        self._config = config
        self._clock = clock
        self._events = asyncio.get_running_loop()
        self.inbox = Inbox()
        self._server = rpc.make_server(
            config.cluster_token,
            rpc.worker_handlers(self),
            rpc.data_handlers(lambda stream: self.plane.serve_grpc(stream)),
        )
        address = rpc.listen(self._server, config.host, config.port)
        self.ref = WorkerRef(config.name, address, epoch or new_epoch())
        table = BlockTable(engine.num_blocks, BlockHasher(config.engine.block_size, cluster_key(config.cluster_token)))
        limits = Limits(
            vocab_size=engine.vocab_size,
            eos_ids=engine.eos_ids,
            max_model_len=min(engine.max_model_len, engine.num_blocks * config.engine.block_size),
            max_batch_tokens=config.engine.max_batch_tokens,
            max_running=min(config.engine.max_running, config.engine.max_batch_tokens),  # a step must hold them all
            max_waiting=config.max_waiting,
        )
        inlet, outlet, doors = self._planes(engine, address)
        own = Endpoint(self.ref, engine.fingerprint, engine.store.format, this_host(), doors)
        context = Context(endpoint=own, table=table, outbox=Outbox(), limits=limits, handover=config.handover)
        self.role = config.role
        self._cast = Cast(context, inlet, outlet)
        self._turning: asyncio.Future[None] | None = None
        overlap = config.engine.overlap == "on" or (config.engine.overlap == "auto" and engine.overlaps)
        roles = self._cast.play(config.role)
        self.loop = EngineLoop(context, roles, engine.runner, self.inbox, clock, self._deliver, overlap)
        info = WorkerInfo(
            ref=self.ref,
            role=config.role,
            fingerprint=engine.fingerprint,
            model=config.model_name,
            block_size=config.engine.block_size,
            total_blocks=engine.num_blocks,
            max_model_len=engine.max_model_len,
            kv_bytes_per_token=engine.store.format.bytes_per_token,
            vocab_size=engine.vocab_size,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        self._routers = RouterLines(info, self.inbox, self.load, config.heartbeat_s, config.lease_s)
        self._sources = SourceLines(own, self.inbox, config.heartbeat_s, config.lease_s)
        self._targets = TargetLines(own, self.inbox, config.cluster_token, config.handover.lease_s)

    def _planes(self, engine: Computes, grpc: str) -> tuple[Inlet, Outlet, tuple[Mapping[str, str], ...]]:
        """What moves KV in and out of all ranks, and where each is reached."""
        config, format, followers = self._config, engine.store.format, engine.followers
        spread = None if followers is None else SpreadInlet(followers, format.tp, self.inbox.post)
        self.plane = Plane(
            self.ref, engine.store, config.handover, config.cluster_token, config.host, self._clock, self._events,
            self.inbox.post if spread is None else spread.of_rank_0, engine.shared, grpc, engine.groups,
        )  # fmt: skip
        if followers is None or spread is None:
            return self.plane.inlet, self.plane.outlet, (self.plane.door,)
        spread.local = self.plane.inlet
        others = [door for (door,) in followers.wait_for(READY)]
        return spread, SpreadOutlet(followers, self.plane.outlet, format), (self.plane.door, *others)

    @property
    def asked(self) -> bool:
        """Whether any router is there that could ask something."""
        return bool(self.loop.context.outbox.routers)

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        """Hang up on everybody. The loop should have ended: it opens lanes."""
        await self._server.stop(grace=0)
        await self._targets.stop()
        await asyncio.to_thread(self.plane.stop)  # it waits for lanes, and those over gRPC wait for this event loop

    # --- rpc.WorkerService ---

    async def session(self, stream: rpc.Stream[FromRouter, FromWorker]) -> None:
        await self._routers.serve(stream)

    async def control(self, stream: rpc.Stream[FromSource, FromTarget]) -> None:
        await self._sources.serve(stream)

    async def turn(self, order: Turn) -> None:
        """See `Turn`. Raises `NotReady` where another turn is under way, `DeadlineExceeded` where there are requests
        all the time."""
        if order.role not in [role.value for role in Role]:
            raise InvalidRequest(f"{order.role!r} is no role", param="role")
        if self._turning is not None:
            raise NotReady("it is being turned already")
        role, turned = Role(order.role), self._events.create_future()
        if role is self.role:
            return
        self._turning = turned
        until = self._clock.now() + order.within_s
        self.inbox.post(Recast(lambda: self._cast.play(role), until, lambda ok: self._post(self._turned, role, ok)))
        try:
            async with asyncio.timeout(order.within_s + CHECK_TIMEOUT_S):
                await asyncio.shield(turned)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the engine loop has not come round for {CHECK_TIMEOUT_S:.0f} s") from error
        if self.role is not role:
            raise DeadlineExceeded(f"it has not been without requests for {order.within_s:.0f} s")

    def _turned(self, role: Role, done: bool) -> None:
        """The loop's word on a turn, whether or not somebody still waits for it. Routers come anew, and learn of it."""
        if done:
            self.role = role
            log.info("a %s worker from here on", role)
            self._routers.renew(role)
        turning, self._turning = self._turning, None
        if turning is not None and not turning.done():
            turning.set_result(None)

    async def check(self) -> CheckReport:
        """The loop's own books. Raises `DeadlineExceeded` where the loop does not come round."""
        reply: asyncio.Future[CheckReport] = self._events.create_future()
        self.inbox.post(Inspect(lambda report: self._post(_resolve, reply, report)))
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                return await reply
        except TimeoutError as error:
            raise DeadlineExceeded(f"the engine loop has not come round for {CHECK_TIMEOUT_S:.0f} s") from error

    # --- from the loop's thread to the event loop ---

    def _deliver(self, mail: Mail) -> None:
        self._post(self._send, mail)

    def _post(self, call: Any, *args: Any) -> None:
        if not self._events.is_closed():
            self._events.call_soon_threadsafe(call, *args)

    def _send(self, mail: Mail) -> None:
        for router, report in mail.reports.items():
            self._routers.tell(router, report)
        for target, to_target in mail.to_targets:
            self._targets.send(target, to_target)
        for source, to_source in mail.to_sources:
            self._sources.send(source, to_source)

    def load(self) -> Load:
        """The load after the loop's last round, with the time since then."""
        return replace(self.loop.last_load, loop_age_s=max(0.0, self._clock.now() - self.loop.last_round))


def _resolve(reply: asyncio.Future[CheckReport], report: CheckReport) -> None:
    if not reply.done():
        reply.set_result(report)
