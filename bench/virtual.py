"""Virtual time, and a worker that lives in it: everything of a worker but its model, its threads and its sockets."""

from __future__ import annotations

import contextlib
import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np

from ..common.config import HandoverConfig
from ..common.errors import BatonError, Overloaded
from ..common.hashing import BlockHasher, cluster_key
from ..common.kv_format import KvFormat
from ..common.messages import Endpoint, Filled, Load, Renew, RouterMessage, Spoiled, StepReport
from ..common.types import Role, WorkerInfo, WorkerRef
from ..engine.block_table import BlockTable
from ..engine.loop import EngineLoop
from ..engine.mailbox import (
    FromRouter,
    FromSource,
    FromTarget,
    Inbox,
    InboxItem,
    Mail,
    Outbox,
    Recast,
    RouterGone,
    RouterJoined,
    SourceGone,
    TargetGone,
)
from ..engine.plan import Ended, Launched, OnLayer, StepPlan
from ..engine.role import Context, Limits
from ..kernels.move import Flag
from ..kvtransfer import wire
from ..kvtransfer.inlet import RankInlet
from ..kvtransfer.layout import Cut, Route
from ..kvtransfer.transport import Mark, Offer, Store
from ..kvtransfer.wire import Checksums
from ..worker.cast import Cast

ROUTER = "router"
LAYERS = 4
"""Enough to see layers leave while later ones compute."""
IDLE_S = 0.05
BEAT_S = 0.5
TURN_WITHIN_S = 60.0
"""How long a worker that is to be turned may take to be without requests."""
VOCABULARY = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What things cost: a step, each token in it, each message, each byte of KV. The defaults are of the order of the
    demo model on one core."""

    step_s: float = 0.03
    prefill_token_s: float = 0.003
    decode_token_s: float = 0.002
    message_s: float = 0.0005
    kv_bytes_per_token: int = 46_080
    kv_bytes_per_s: float = 1e9

    def step(self, plan: StepPlan) -> float:
        """Seconds of one step."""
        decodes = len(plan.decodes)
        return self.step_s + decodes * self.decode_token_s + (plan.tokens - decodes) * self.prefill_token_s


class World:
    """Now, and what happens next. Events of one moment happen in the order in which they were entered."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when, next(self._order), event))

    def every(self, period: float, event: Callable[[], None]) -> None:
        """Now, and again after each period, for ever."""

        def again() -> None:
            event()
            self.at(self.now + period, again)

        self.at(self.now, again)

    def run(self, done: Callable[[], bool], limit_s: float) -> None:
        """Let events happen until `done`. Raises `TimeoutError` where it is not by `limit_s` of virtual time."""
        while not done():
            self.now, _, event = heapq.heappop(self._heap)
            if self.now > limit_s:
                raise TimeoutError(f"not done after {limit_s:.0f} s of virtual time")
            event()


@dataclass(slots=True)
class _StepClock:
    """A worker's clock: the world's, and how far the running step is ahead of it."""

    world: World
    ahead: float = 0.0

    def now(self) -> float:
        return self.world.now + self.ahead


@dataclass(frozen=True, slots=True)
class _Runner:
    """Implements `engine.plan.Runner`: advances the clock layer by layer, and makes tokens up."""

    clock: _StepClock
    costs: Costs

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Launched:
        share = self.costs.step(plan) / LAYERS
        for layer in range(LAYERS):
            self.clock.ahead += share
            if on_layer is not None:
                on_layer(layer)
        return Ended([next_token(part.sequence.tokens) if part.samples else None for part in plan.parts])


def next_token(tokens: Sequence[int]) -> int:
    """What the simulated model says after `tokens`."""
    return (tokens[-1] * 31 + len(tokens) * 7 + 1) % VOCABULARY


@dataclass(frozen=True, slots=True)
class _Store:
    """A `kvtransfer.transport.Store` that keeps nothing: what the bytes cost is the wire's business."""

    format: KvFormat
    num_blocks: int
    rank: int = 0
    checked: bool = False

    def mark(self) -> Mark:
        return lambda: None

    def buffer(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def pack(self, layers: range, part: Cut, route: Route, target: KvFormat, out: memoryview) -> Checksums:
        return np.zeros(len(layers) * part.count, dtype=np.uint64)

    def unpack(self, layers: range, blocks: Sequence[int], route: Route, data: memoryview) -> Checksums:
        return np.zeros(len(layers) * len(blocks), dtype=np.uint64)

    def checksums(self, layers: range, blocks: Sequence[int], route: Route) -> Checksums:
        return np.zeros(len(layers) * len(blocks), dtype=np.uint64)

    def fetch(
        self, peer: Any, peer_format: KvFormat, peer_blocks: int, layers: range, theirs: Sequence[int],
        blocks: Sequence[int], route: Route,
    ) -> Checksums:  # fmt: skip
        return np.zeros(len(layers) * len(blocks), dtype=np.uint64)


class _Taker:
    """A `kvtransfer.transport.Taker` of nothing."""

    def fetch(self, header: wire.FrameHeader) -> None:
        """Nothing travels."""

    def land(self, store: Store, header: wire.FrameHeader, blocks: Sequence[int], route: Route, over: Flag) -> bool:
        return True

    def leave(self, header: wire.FrameHeader) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is held."""


@dataclass(slots=True)
class _Outlet:
    """Implements `kvtransfer.transport.Outlet`: one wire out of each worker, one frame on it at a time."""

    worker: SimWorker
    free_at: float = 0.0
    attempts: dict[int, int] = field(default_factory=dict)
    targets: dict[int, WorkerRef] = field(default_factory=dict)
    across: dict[int, int] = field(default_factory=dict)
    under_way: dict[int, int] = field(default_factory=dict)
    staged: Sequence[Offer] = ()

    def open(self, handover_id: int, attempt: int, target: Endpoint, transport: str) -> None:
        self.attempts[handover_id], self.targets[handover_id], self.across[handover_id] = attempt, target.ref, 0
        self.under_way[handover_id] = 0

    def stage(self, offers: Sequence[Offer]) -> None:
        self.staged = offers

    def layer(self, layer: int) -> None:
        for offer in self.staged:
            self._leave(offer, layer)

    def offer(self, offer: Offer) -> None:
        for layer in range(LAYERS):
            self._leave(offer, layer)

    def close(self, handover_id: int) -> None:
        for known in (self.attempts, self.targets, self.across, self.under_way):
            known.pop(handover_id, None)

    def progress(self, handover_id: int) -> int:
        return self.across[handover_id]

    def failed(self, target: WorkerRef) -> tuple[str, ...]:
        return ()

    def forgive(self, target: WorkerRef) -> None:
        """Nothing breaks."""

    def pending(self, handover_id: int) -> int:
        return self.under_way[handover_id]

    def _leave(self, offer: Offer, layer: int) -> None:
        worker, costs = self.worker, self.worker.costs
        size = offer.cut.count * worker.info.block_size * costs.kv_bytes_per_token // LAYERS
        self.free_at = max(self.free_at, worker.clock.now()) + size / costs.kv_bytes_per_s
        self.across[offer.handover_id] += size
        self.under_way[offer.handover_id] += 1
        worker.world.at(self.free_at + costs.message_s, lambda: self._arrive(offer, layer))

    def _arrive(self, offer: Offer, layer: int) -> None:
        target = self.targets.get(offer.handover_id)
        if target is None:
            return  # closed meanwhile: its blocks may not be read any more
        self.under_way[offer.handover_id] -= 1
        count = offer.cut.count
        header = wire.FrameHeader(
            offer.handover_id, self.attempts[offer.handover_id], layer, 1, offer.first, count,
            count * self.worker.store.format.block_bytes, bytes(8 * count),
        )  # fmt: skip
        self.worker.peers[target.name].take(self.worker.info.ref, header)


class SimWorker:
    """One worker in virtual time. `tell_router` takes its reports, at the moment at which they arrive there. `session`
    counts its lines to the router: what is on its way when one breaks is lost."""

    def __init__(
        self, world: World, costs: Costs, info: WorkerInfo, limits: Limits, peers: dict[str, SimWorker],
        tell_router: Callable[[str, StepReport], None],
    ) -> None:  # fmt: skip
        self.world, self.costs, self.info, self.peers = world, costs, info, peers
        self.clock = _StepClock(world)
        self.store = _Store(KvFormat(LAYERS, 1, 1, info.block_size, "int8"), info.total_blocks)
        self.endpoint = Endpoint(info.ref, info.fingerprint, self.store.format, "", ({"tcp": info.ref.address},))
        self._tell_router = tell_router
        self._inbox = Inbox()
        self._arrived: deque[InboxItem] = deque()  # what the inbox has no room for yet: its senders wait
        self._wakes = 0  # counts, so that a wake-up that was overtaken is known
        self._asleep = False
        self.late_frames = 0
        table = BlockTable(info.total_blocks, BlockHasher(info.block_size, cluster_key(ROUTER)))
        context = Context(
            endpoint=self.endpoint, table=table, outbox=Outbox(), limits=limits, handover=HandoverConfig()
        )
        self.session = 0
        self._ended = False
        self._inlet = RankInlet(self.store, self.clock, self.post)
        self._outlet = _Outlet(self)
        self._cast = Cast(context, self._inlet, self._outlet)
        roles = self._cast.play(info.role)
        self.loop = EngineLoop(context, roles, _Runner(self.clock, costs), self._inbox, self.clock, self._deliver)
        self.post(RouterJoined(ROUTER))
        world.at(world.now, self._round)
        world.every(BEAT_S, self._beat)

    def post(self, item: InboxItem | Filled | Spoiled) -> None:
        """Something has arrived. A worker that sleeps wakes up; one that computes sees it after its step."""
        if self._ended:
            return
        self._arrived.append(item)
        self._read()
        if self._asleep:
            self._asleep = False
            self._schedule(0.0)

    def _read(self) -> None:
        """Take in what has arrived, in order, as far as there is room for it."""
        with contextlib.suppress(Overloaded):
            while self._arrived:
                self._inbox.post(self._arrived[0])
                self._arrived.popleft()

    def send(self, message: RouterMessage) -> None:
        """A message of the router's sets out for here."""
        self._later(lambda: self.post(FromRouter(ROUTER, message)))

    def turn(self, role: Role, done: Callable[[bool], None]) -> None:
        """Change the role at the first moment at which nothing is held; `done` is told whether there was one soon. The
        line to the router is broken then; `joined` is how it comes back."""

        def reply(turned: bool) -> None:
            if turned:
                self.info = replace(self.info, role=role)
                self.session += 1
                self.post(RouterGone(ROUTER))
            done(turned)

        self._later(lambda: self.post(Recast(lambda: self._cast.play(role), self.clock.now() + TURN_WITHIN_S, reply)))

    def joined(self) -> None:
        """The router's line stands again."""
        self.post(RouterJoined(ROUTER))

    def end(self) -> None:
        """The process is gone, and all others notice."""
        self._ended = True
        self.session += 1
        for peer in self.peers.values():
            peer.post(TargetGone(self.info.ref))
            peer.post(SourceGone(self.info.ref))

    @property
    def load(self) -> Load:
        return self.loop.load()

    def take(self, source: WorkerRef, header: wire.FrameHeader) -> None:
        """A frame of KV has arrived."""
        if self._ended:
            return
        try:
            self._inlet.receive((source.name, source.epoch), 0, header, _Taker())
        except BatonError:  # for a handover that is over: the source learns from the control messages
            self.late_frames += 1

    def _schedule(self, delay: float) -> None:
        self._wakes += 1
        wake = self._wakes
        self.world.at(self.world.now + delay, lambda: self._round() if wake == self._wakes else None)

    def _round(self) -> None:
        """One round of the loop. It happens in no time; what it costs, the worker then is not to be had."""
        if self._ended:
            return
        self.clock.ahead, self._asleep = 0.0, False
        self._read()
        computed = self.loop.step()
        cost, self.clock.ahead = self.clock.ahead, 0.0
        self._schedule(cost if computed else IDLE_S)
        self._asleep = not computed

    def _later(self, event: Callable[[], None]) -> None:
        """After the wire's delay, if the line to the router is the same then. Called inside a step, its time counts."""
        session = self.session
        arrival = self.clock.now() + self.costs.message_s
        self.world.at(arrival, lambda: event() if session == self.session else None)

    def _report(self, report: StepReport) -> None:
        self._later(lambda: self._tell_router(self.info.ref.name, report))

    def _deliver(self, mail: Mail) -> None:
        """Called inside a step: what is said now arrives after the wire's delay."""
        arrival = self.clock.now() + self.costs.message_s
        for report in mail.reports.values():
            self._report(report)
        for target, to_target in mail.to_targets:
            self._send(arrival, target, FromSource(self.endpoint, to_target))
        for source, to_source in mail.to_sources:
            self._send(arrival, source, FromTarget(self.endpoint, to_source))

    def _send(self, arrival: float, to: WorkerRef, item: InboxItem) -> None:
        self.world.at(arrival, lambda: self.peers[to.name].post(item))

    def _beat(self) -> None:
        """What a worker's lines say in between: its load to the router, and that its handovers live."""
        if self._ended:
            return
        arrival = self.world.now + self.costs.message_s
        self._report(StepReport(load=self.load))
        by_target: dict[WorkerRef, list[int]] = {}
        for handover_id, target in self._outlet.targets.items():
            by_target.setdefault(target, []).append(handover_id)
        for target, ids in by_target.items():
            self._send(arrival, target, FromSource(self.endpoint, Renew(tuple(ids))))


def sim_info(name: str, role: Role, epoch: int, blocks: int, block_size: int, longest: int, costs: Costs) -> WorkerInfo:
    """The handshake of a simulated worker."""
    return WorkerInfo(
        ref=WorkerRef(name, name, epoch), role=role, fingerprint="simulated", model="simulated", block_size=block_size,
        total_blocks=blocks, max_model_len=longest, kv_bytes_per_token=costs.kv_bytes_per_token, vocab_size=VOCABULARY,
    )  # fmt: skip
