"""The data planes of all ranks of a worker, as its loop sees them: one inlet and one outlet.

Rank 0 decides and has a plane of its own; what it tells that one it tells the other ranks as well, as commands in the
same ordered stream as the steps (`engine/follower.py`). So a rank opens a reservation before a step reads its blocks,
and closes one before a step writes them for somebody else. What their planes have to say comes back as reports; a
handover is complete with its last rank.

    rank 0: SpreadInlet, SpreadOutlet ── commands ──▶ rank n: `commands` of its plane
            ◀───────────────── filled, spoiled, broken ─────────────────
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

from ..common.kv_format import KvFormat
from ..common.messages import Endpoint, Filled, HandoverKey, Spoiled, TransportBroken
from ..common.types import WorkerRef
from ..engine.follower import Follower, Followers, Handler
from ..kvtransfer.layout import Cut, piece_bytes, routes
from ..kvtransfer.outlet import LaneOutlet
from ..kvtransfer.plane import Event, Plane
from ..kvtransfer.transport import Inlet, Offer
from ..protos.convert import FROM_SOURCE

LATE_S = 0.5
"""On ranks that follow, news of a reservation may come later than its first bytes: how long these wait for it."""


class SpreadInlet:
    """Implements `transport.Inlet` for all ranks. `local` is rank 0's own, which posts to `of_rank_0`; `post`
    gets what concerns the loop."""

    def __init__(self, followers: Followers, ranks: int, post: Callable[[Event], None]) -> None:
        self.local: Inlet | None = None
        self._followers = followers
        self._ranks = ranks
        self._post = post
        self._filled: dict[HandoverKey, set[int]] = {}
        self._lock = threading.Lock()
        followers.subscribe("filled", lambda rank, *key: self.filled(rank, (key[0], key[1], key[2])))
        followers.subscribe("spoiled", lambda _, *it: post(Spoiled((it[0], it[1], it[2]), it[3], it[4])))

    def open(self, key: HandoverKey, attempt: int, source: KvFormat, first: int, blocks: Sequence[int]) -> None:
        with self._lock:
            self._filled[key] = set()
        self._followers.send("in.open", key, attempt, astuple(source), first, list(blocks))
        self._own.open(key, attempt, source, first, blocks)

    def expect(self, key: HandoverKey, last: int) -> None:
        self._followers.send("in.expect", key, last)
        self._own.expect(key, last)

    def close(self, key: HandoverKey) -> None:
        with self._lock:
            self._filled.pop(key, None)
        self._followers.send("in.close", key)
        self._own.close(key)

    def touched(self, key: HandoverKey) -> float | None:
        return self._own.touched(key)

    def filled(self, rank: int, key: HandoverKey) -> None:
        """A rank has all its bytes."""
        with self._lock:
            ranks = self._filled.get(key)
            if ranks is None or rank in ranks:
                return
            ranks.add(rank)
            complete = len(ranks) == self._ranks
        if complete:
            self._post(Filled(key))

    def of_rank_0(self, event: Event) -> None:
        """What rank 0's plane has to say."""
        if isinstance(event, Filled):
            self.filled(0, event.key)
        else:
            self._post(event)

    @property
    def _own(self) -> Inlet:
        assert self.local is not None
        return self.local


class SpreadOutlet:
    """Implements `transport.Outlet` for all ranks. `local` is rank 0's own, whose steps call `layer` here."""

    def __init__(self, followers: Followers, local: LaneOutlet, format: KvFormat) -> None:
        self._followers = followers
        self._local = local
        self._format = format
        self._ratio: dict[int, float] = {}
        self._staged = False
        followers.subscribe("broken", lambda _, ref, *it: local.fell(TransportBroken(WorkerRef(*ref), *it)))

    def open(self, handover_id: int, attempt: int, target: Endpoint, transport: str) -> None:
        sizes = [(r.source_rank, piece_bytes(target.format, r)) for r in routes(self._format, target.format)]
        own, whole = sum(size for rank, size in sizes if rank == 0), sum(size for _, size in sizes)
        self._ratio[handover_id] = whole / own
        self._followers.send("out.open", handover_id, attempt, FROM_SOURCE.encode(target), transport)
        self._local.open(handover_id, attempt, target, transport)

    def stage(self, offers: Sequence[Offer]) -> None:
        if offers or self._staged:
            self._followers.send("out.stage", [astuple(offer) for offer in offers])
        self._staged = bool(offers)
        self._local.stage(offers)

    def layer(self, layer: int) -> None:
        self._local.layer(layer)

    def offer(self, offer: Offer) -> None:
        self._followers.send("out.offer", astuple(offer))
        self._local.offer(offer)

    def close(self, handover_id: int) -> None:
        self._ratio.pop(handover_id, None)
        self._followers.send("out.close", handover_id)
        self._local.close(handover_id)

    def progress(self, handover_id: int) -> int:
        """Of all ranks, if they are as far as rank 0."""
        return round(self._local.progress(handover_id) * self._ratio[handover_id])

    def pending(self, handover_id: int) -> int:
        """Of rank 0: what the others still have to send, the commit waits for at the target."""
        return self._local.pending(handover_id)

    def failed(self, target: WorkerRef) -> tuple[str, ...]:
        return self._local.failed(target)

    def forgive(self, target: WorkerRef) -> None:
        self._local.forgive(target)


def commands(plane: Plane) -> dict[str, Handler]:
    """What rank 0 has this rank's plane do, for `Follower.follow`."""
    inlet, outlet = plane.inlet, plane.outlet

    def open_outlet(handover_id: int, attempt: int, target: bytes, transport: str) -> None:
        endpoint = FROM_SOURCE.decode(target)
        assert isinstance(endpoint, Endpoint)
        outlet.open(handover_id, attempt, endpoint, transport)

    return {
        "in.open": lambda key, attempt, source, first, blocks: inlet.open(
            tuple(key), attempt, KvFormat(*source), first, blocks
        ),
        "in.expect": lambda key, last: inlet.expect(tuple(key), last),
        "in.close": lambda key: inlet.close(tuple(key)),
        "out.open": open_outlet,
        "out.stage": lambda offers: outlet.stage([_offer(o) for o in offers]),
        "out.offer": lambda offer: outlet.offer(_offer(offer)),
        "out.close": outlet.close,
    }


def reports(follower: Follower) -> Callable[[Event], None]:
    """Tells rank 0 what this rank's plane has to say."""

    def report(event: Event) -> None:
        match event:
            case Filled(key):
                follower.report("filled", *key)
            case Spoiled(key, message, code):
                follower.report("spoiled", *key, message, code)
            case TransportBroken(target, transport, message, lasting):
                follower.report("broken", astuple(target), transport, message, lasting)

    return report


def _offer(fields: Sequence[Any]) -> Offer:
    handover_id, first, (blocks, offset, count) = fields
    return Offer(handover_id, first, Cut(tuple(blocks), offset, count))
