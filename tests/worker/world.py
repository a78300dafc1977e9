"""Two workers without processes, threads or sockets, and the messages between them in the hand of a test: each may be
delivered, lost, doubled or overtaken, and either worker may die.

The roles, the loops, the inlet, givers and takers are the real ones; only the lanes are not. All blocks that nobody
owns hold poison, and whoever writes into one is found out at once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from baton.common.clock import ManualClock
from baton.common.config import HandoverConfig
from baton.common.errors import BatonError
from baton.common.hashing import BlockHasher
from baton.common.messages import Cancel, Endpoint, TokenOut
from baton.common.types import Role, WorkerRef
from baton.decode.role import DecodeRole
from baton.engine.block_table import BlockTable
from baton.engine.loop import EngineLoop
from baton.engine.mailbox import FromRouter, FromSource, FromTarget, Inbox, InboxItem, Mail, Outbox, RouterJoined
from baton.engine.role import Context, Limits
from baton.kernels.move import Flag
from baton.kvtransfer.fetched import FetchGiver, FetchTaker
from baton.kvtransfer.inlet import RankInlet
from baton.kvtransfer.inline import InlineGiver
from baton.kvtransfer.layout import Route
from baton.kvtransfer.transport import Giver, Offer, Store
from baton.kvtransfer.wire import FrameHeader
from baton.worker.cast import Cast
from tests.poison import Poison
from tests.toy import BLOCK_SIZE, EOS, FORMAT, VOCAB, ToyPool, ToyRunner, endpoint

LEASE_S = 2.0
WHOLE = Route(0, 0, 0, 0, 1)


@dataclass
class Held:
    """A taker whose bytes came with the message."""

    data: bytes

    def fetch(self, header: FrameHeader) -> None: ...

    def land(self, store: Store, header: FrameHeader, blocks: Sequence[int], route: Route, over: Flag) -> bool:
        header.confirm(store.unpack(header.all_layers, blocks, route, memoryview(self.data)))
        return True

    def leave(self, header: FrameHeader) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Transfer:
    attempt: int
    giver: Giver
    put: int = 0
    answered: int = 0
    across: int = 0


@dataclass
class Frames:
    """An outlet whose frames wait for the test: `flying` [(header, what came with it)]."""

    pool: ToyPool
    flying: list[tuple[FrameHeader, bytes]] = field(default_factory=list)
    _open: dict[int, _Transfer] = field(default_factory=dict)
    _staged: Sequence[Offer] = ()

    # --- transport.Outlet ---

    def open(self, handover_id: int, attempt: int, target: Endpoint, transport: str) -> None:
        link: Any = self
        giver: Giver = InlineGiver(link, self.pool.store, WHOLE, target.format)
        if transport == "shm":
            giver = FetchGiver(link, self.pool.store, self.pool.shared, WHOLE)
        self._open[handover_id] = _Transfer(attempt, giver)

    def stage(self, offers: Sequence[Offer]) -> None:
        self._staged = list(offers)

    def layer(self, layer: int) -> None:
        for offer in self._staged:
            self._give(offer, layer)

    def offer(self, offer: Offer) -> None:
        for layer in range(FORMAT.num_layers):
            self._give(offer, layer)

    def _give(self, offer: Offer, layer: int) -> None:
        if transfer := self._open.get(offer.handover_id):
            transfer.put += 1
            giver = transfer.giver
            giver.give(
                giver.prepare(offer.handover_id, transfer.attempt, range(layer, layer + 1), offer.first, offer.cut)
            )

    def close(self, handover_id: int) -> None:
        if transfer := self._open.pop(handover_id, None):
            transfer.giver.withdraw(handover_id)

    def progress(self, handover_id: int) -> int:
        return self._open[handover_id].across

    def pending(self, handover_id: int) -> int:
        return self._open[handover_id].put - self._open[handover_id].answered

    def failed(self, target: WorkerRef) -> tuple[str, ...]:
        return ()

    def forgive(self, target: WorkerRef) -> None: ...

    # --- inline.Link ---

    def send(self, header: FrameHeader, payload: memoryview | None = None) -> None:
        self.flying.append((header, bytes(payload or b"")))

    def credit(self, header: FrameHeader) -> None:
        if transfer := self._open.get(header.handover_id):
            transfer.answered += 1
            transfer.across += header.size


class Bench:
    """One worker. What it says to others is in `to_targets` and `to_sources`, what it tells the router in `told`."""

    def __init__(self, name: str, role: Role, clock: ManualClock, transport: str, overlap: bool) -> None:
        self.pool, self.inbox = ToyPool(12), Inbox()
        self.frames = Frames(self.pool)
        self.to_targets: list[Any] = []
        self.to_sources: list[Any] = []
        self.tokens: list[TokenOut] = []
        self.said: list[object] = []
        self.alive, self.busy = True, False
        door = {"tcp": name, "shm": self.pool.shared.address(12)}
        self.own = replace(endpoint(name, name), host="here", doors=(door,))
        limits = Limits(
            vocab_size=VOCAB, eos_ids=frozenset({EOS}), max_model_len=40, max_batch_tokens=16, max_running=4,
            max_waiting=9,
        )  # fmt: skip
        table = BlockTable(12, BlockHasher(BLOCK_SIZE))
        self.context = Context(
            endpoint=self.own, table=table, outbox=Outbox(), limits=limits,
            handover=HandoverConfig(lease_s=LEASE_S, transport=transport, headroom_tokens=8),
        )  # fmt: skip
        self.pool.store.checked = transport != "shm"  # there the seqlock alone has to do
        self.inlet = RankInlet(self.pool.store, clock, self.inbox.post)
        self.roles = Cast(self.context, self.inlet, self.frames).play(role)
        self.poison = Poison(table.manager, self.pool.shared.memory.reshape(FORMAT.num_layers, 12, -1))
        runner = ToyRunner(self.pool)
        self.loop = EngineLoop(self.context, self.roles, runner, self.inbox, clock, self._deliver, overlap)
        self.post(RouterJoined("router"))

    def _deliver(self, mail: Mail) -> None:
        self.to_targets += [message for _, message in mail.to_targets]
        self.to_sources += [message for _, message in mail.to_sources]
        for report in mail.reports.values():
            self.tokens += report.tokens
            self.said += [*report.handed_over, *report.finished, *report.failed, *report.stayed]

    def post(self, item: InboxItem) -> None:
        """Give it one message and let it go round once."""
        if self.alive:
            self.inbox.post(item)
            self.step()

    def step(self) -> None:
        if self.alive:
            self.busy = self.loop.step()
            self.poison.check()
            report = self.loop.inspect()
            assert report.ok, report.problem

    @property
    def running(self) -> bool:
        """Whether it draws tokens for somebody."""
        return any(role._planner.running for role in self.roles if isinstance(role, DecodeRole))

    def heard(self, kind: type) -> list[Any]:
        """What the router was told of this kind."""
        return [s for s in self.said if isinstance(s, kind)]


class World:
    """A source and a target. `moves` lists what may happen next, each with what it costs of a budget of faults. To be
    closed."""

    def __init__(self, source: Role, transport: str, overlap: bool = False) -> None:
        self.clock, self.cancelled = ManualClock(1.0), False
        self.source = Bench("source", source, self.clock, transport, overlap)
        self.target = Bench("target", Role.DECODE, self.clock, transport, overlap)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for bench in (self.source, self.target):
            os.close(bench.pool.shared._file)

    @property
    def channels(self) -> dict[str, tuple[list[Any], Callable[[Any], None]]]:
        source, target = self.source, self.target
        return {
            "control": (source.to_targets, lambda m: target.post(FromSource(source.own, m))),
            "answer": (target.to_sources, lambda m: source.post(FromTarget(target.own, m))),
            "frame": (source.frames.flying, self._land),
        }

    def moves(self) -> Iterator[tuple[str, str, int, int]]:
        """(what, channel, which message, cost)."""
        for name, (queue, _) in self.channels.items():
            for i in range(len(queue)):
                yield "deliver", name, i, int(i > 0)
                yield "lose", name, i, 1
                yield "double", name, i, 1
        if self.source.running or self.source.busy:
            yield "step", "source", 0, 0
        for share in (60, 100):
            yield "wait", "", share, 1
        if not self.cancelled:
            yield "cancel", "source", 0, 1
        for name in ("source", "target"):
            if getattr(self, name).alive:
                yield "die", name, 0, 1

    def play(self, what: str, where: str, which: int) -> None:
        if what == "wait":
            self.wait(LEASE_S * which / 100)
        elif what == "step":
            self.source.step()
        elif what == "cancel":
            self.cancelled = True
            self.source.post(FromRouter("router", Cancel(1)))
        elif what == "die":
            self.die(where)
        else:
            queue, deliver = self.channels[where]
            message = queue[which]
            if what != "double":
                del queue[which]
            if what != "lose":
                deliver(message)

    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.source.step()
        self.target.step()

    def die(self, name: str) -> None:
        """At once, and nobody is told: the lease has to do."""
        bench: Bench = getattr(self, name)
        bench.alive = False

    def silence(self) -> None:
        """From here on nothing arrives any more."""
        for queue, _ in self.channels.values():
            queue.clear()

    def _land(self, frame: tuple[FrameHeader, bytes]) -> None:
        """What `LaneServer.take` does."""
        header, data = frame
        if not self.target.alive:
            return
        shared = self.source.pool.shared
        fetching = FetchTaker(shared.peer(shared.address(12), FORMAT), FORMAT)
        taker: Any = Held(data) if data else fetching
        with contextlib.suppress(BatonError):
            self.target.inlet.receive((self.source.own.ref.name, self.source.own.ref.epoch), 0, header, taker)
        self.source.frames.credit(header)
        self.target.step()

    def key(self) -> tuple[object, ...]:
        """Two worlds with the same key go on alike."""
        s, t = self.source, self.target
        return (
            *(self.clock.now(), self.cancelled, s.alive, t.alive, s.busy, t.busy),
            repr(s.to_targets), repr(t.to_sources), repr(s.tokens), repr(t.tokens),
            repr(s.said), repr(t.said), *[(h, d) for h, d in s.frames.flying],
            [(k, v.state, v.filled, v.pending) for k, v in _handovers(t)], [(k, v.state) for k, v in _handovers(s)],
            [(k, r.arrived.tobytes(), r.expected) for k, r in t.inlet._reservations.items()],
        )  # fmt: skip


def _handovers(bench: Bench) -> list[Any]:
    found = []
    for role in bench.roles:
        found += [(k, i.state) for k, i in getattr(role, "_incoming", {}).items()] if hasattr(role, "_over") else []
        for holder in (role, getattr(role, "_moves", None)):
            if sender := getattr(holder, "_sender", None):
                found += [(o.id, o.state) for o in sender.all()]
    return found
