"""The source's side of all transports: what is offered goes to lanes, one for each rank of each target.

The engine loop only puts things into queues; a lane's thread cuts, reads and sends. Of a lane, `window_frames` whole
frames are under way at most without their credit, or as many bytes in shorter ones: that bounds memory on both sides,
keeps both busy, and shares a target fairly among its sources. Control messages have a way of their own, so that a
cancel overtakes the bulk.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..common.clock import Clock
from ..common.config import HandoverConfig
from ..common.errors import BatonError, TransportFailed, WorkerLost
from ..common.messages import Endpoint, TransportBroken
from ..common.types import WorkerRef
from .layout import Cut, Route, count_frames, frames, piece_bytes, routes
from .trace import TransferTrace
from .transport import Giver, Mark, Offer, Store
from .wire import MAX_FRAME, MAX_PIECES

log = logging.getLogger(__name__)

AVOIDED_S = 30.0
"""How long a transport is avoided whose line between two workers broke, or never came about because one of them did not
answer: it may have been frozen, or the machine too busy."""

STOP_S = 1.0
"""How long the threads of lanes may take to end: one that is in a library's code when the interpreter goes takes the
process along with it."""

SHORTER = {"tcp": 2 << 20, "grpc": 8 << 20, "process-group": 8 << 20, "cuda-ipc": 32 << 20}
"""Bytes of a frame at most, by transports that pass it on as a whole: one end works on a frame while the other works on
the one before. By tcp it is copied twice at each end, and the second copy should find it in a cache; what is best by
CUDA IPC `bench/gpu_kvtransfer.py` will tell."""

LEAST_COUNTED = 8 << 20
"""Bytes that a frame counts as in a window, where frames are shorter for a cache's sake and not to send less ahead."""

MOST_UNDER_WAY = 16
"""Frames in flight at most, however small they are."""

MakeGiver = Callable[[str, Endpoint, Route], Giver]
"""(transport, target, route) → a giver to that rank of it, connected. Called on the lane's thread. Raises
`TransportFailed` or `WorkerLost`."""


@dataclass(eq=False, slots=True)
class _Transfer:
    """A handover on its way. Whoever holds `lock` and finds it open may read its blocks, or vouch for them; what is
    read once it has been closed is void."""

    id: int
    attempt: int
    lanes: list[_Lane]
    open: bool = True
    put: int = 0
    """Frames offered; the engine loop counts."""
    answered: int = 0
    """Frames that got across; lanes count, under `lock`."""
    across: int = 0
    """Their bytes."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class LaneOutlet:
    """Implements `transport.Outlet` for one rank. `broken` is told, on any thread, when bytes stop flowing."""

    def __init__(
        self, store: Store, config: HandoverConfig, clock: Clock, make_giver: MakeGiver,
        broken: Callable[[TransportBroken], None],
    ) -> None:  # fmt: skip
        self.trace = TransferTrace(clock)
        self._store = store
        self._config = config
        self._make_giver = make_giver
        self._broken = broken
        self._failed: dict[WorkerRef, dict[str, float]] = {}
        self._noting = threading.Lock()
        self._clock = clock
        self._transfers: dict[int, _Transfer] = {}
        self._lanes: dict[tuple[WorkerRef, int, str], _Lane] = {}
        self._staged: list[Offer] = []

    # --- called by the engine loop ---

    def open(self, handover_id: int, attempt: int, target: Endpoint, transport: str) -> None:
        mine = [r for r in routes(self._store.format, target.format) if r.source_rank == self._store.rank]
        lanes = [self._lane(target, route, transport) for route in mine]
        self._transfers[handover_id] = _Transfer(handover_id, attempt, lanes)

    def stage(self, offers: Sequence[Offer]) -> None:
        self._staged = list(offers)

    def layer(self, layer: int) -> None:
        if self._staged:
            computed = self._store.mark()
            for offer in self._staged:
                self._put(offer, range(layer, layer + 1), computed)

    def offer(self, offer: Offer) -> None:
        self._put(offer, range(self._store.format.num_layers), self._store.mark())

    def close(self, handover_id: int) -> None:
        transfer = self._transfers.pop(handover_id, None)
        if transfer is not None:
            with transfer.lock:
                transfer.open = False
            for lane in transfer.lanes:
                lane.withdraw(handover_id)

    def progress(self, handover_id: int) -> int:
        return self._transfers[handover_id].across

    def pending(self, handover_id: int) -> int:
        transfer = self._transfers[handover_id]
        return transfer.put - transfer.answered

    def failed(self, target: WorkerRef) -> tuple[str, ...]:
        now = self._clock.now()
        failed = self._failed.get(target, {}).copy()  # lanes' threads add to it
        return tuple(sorted(name for name, until in failed.items() if now < until))

    def forgive(self, target: WorkerRef) -> None:
        self._failed.pop(target, None)

    def fell(self, event: TransportBroken) -> None:
        """On any thread: bytes do not flow any more. Told once for as long as the transport is avoided; loudly where it
        can not be had, for a line that breaks is also what a worker leaves behind that has ended."""
        if event.transport not in self.failed(event.target):
            level = logging.WARNING if event.lasting else logging.INFO
            log.log(level, "%s to %s broke, falling back: %s", event.transport, event.target.name, event.message)
        now = self._clock.now()
        with self._noting:
            for target in [ref for ref, names in self._failed.items() if _outdated(ref, names, event.target, now)]:
                self._failed.pop(target, None)  # the loop may just have forgiven it
            self._failed.setdefault(event.target, {})[event.transport] = math.inf if event.lasting else now + AVOIDED_S
        self._broken(event)

    def _put(self, offer: Offer, layers: range, computed: Mark) -> None:
        transfer = self._transfers.get(offer.handover_id)
        if transfer is None:  # it was closed while its step was planned
            return
        self.trace.computed(offer.handover_id, layers)
        for lane in transfer.lanes:
            lane.put(transfer, offer, layers, computed)

    def _lane(self, target: Endpoint, route: Route, transport: str) -> _Lane:
        key = (target.ref, route.target_rank, transport)
        lane = self._lanes.get(key)
        if lane is None or lane.dead:
            lane = self._lanes[key] = _Lane(
                self._store, self._config, target, route, transport, self.trace, self._make_giver, self.fell
            )
            for old in [k for k, other in self._lanes.items() if other.dead]:
                del self._lanes[old]
        return lane

    def stop(self) -> None:
        """End all lanes. Not on the event loop that lanes over gRPC wait for."""
        lanes = list(self._lanes.values())  # an engine loop that did not end in time may add to them
        for lane in lanes:
            lane.stop()
        deadline = time.monotonic() + STOP_S
        for lane in lanes:
            lane.join(deadline)


def _outdated(ref: WorkerRef, failed: dict[str, float], target: WorkerRef, now: float) -> bool:
    """Whether nothing of this need be known when `target` fails: its time is over, or its incarnation is."""
    return max(failed.values()) <= now or (ref.name == target.name and ref != target)


@dataclass(frozen=True, slots=True)
class _Share:
    """What a lane is given of an offer: blocks that are as they should be, in these layers, from `computed` on."""

    transfer: _Transfer
    offer: Offer
    layers: range
    computed: Mark


class _Lane:
    """A queue of what is to be sent to one rank of one target, and the two threads that empty it: one sends, one counts
    credits. The queue's length is bounded by the handovers that the target has granted."""

    def __init__(
        self, store: Store, config: HandoverConfig, target: Endpoint, route: Route, transport: str,
        trace: TransferTrace, make_giver: MakeGiver, broken: Callable[[TransportBroken], None],
    ) -> None:  # fmt: skip
        self.dead = False
        self._store = store
        self._target = target
        self._route = route
        self._transport = transport
        self._patience = config.lease_s
        self._trace = trace
        self._make_giver = make_giver
        self._broken = broken
        self._piece = piece_bytes(target.format, route)
        frame = min(config.frame_bytes, SHORTER.get(transport, config.frame_bytes))
        self._run_of = min(MAX_PIECES, max(1, frame // self._piece))
        self._queue: deque[_Share] = deque()
        self._under_way: deque[tuple[_Transfer, int]] = deque()
        counted = max(frame, min(config.frame_bytes, LEAST_COUNTED), self._piece)
        self._window = self._room = config.window_frames * counted
        self._change = threading.Condition()
        self._giver: Giver | None = None
        self._stopped = False
        self._threads = [threading.Thread(target=self._run, name=f"lane to {target.ref.name}", daemon=True)]
        self._threads[0].start()

    @property
    def _ended(self) -> bool:
        return self._stopped or self.dead

    # --- called by the engine loop ---

    def put(self, transfer: _Transfer, offer: Offer, layers: range, computed: Mark) -> None:
        """The first bytes leave at once, so the frames are made by the thread that sends them."""
        transfer.put += count_frames(len(layers), offer.cut.count, self._run_of)
        with self._change:
            self._queue.append(_Share(transfer, offer, layers, computed))
            self._change.notify_all()

    def withdraw(self, handover_id: int) -> None:
        giver = self._giver
        if giver is not None:
            giver.withdraw(handover_id)

    def stop(self) -> None:
        with self._change:
            self._stopped = True
            self._change.notify_all()
        if self._giver is not None:
            self._giver.close()

    def join(self, deadline: float) -> None:
        """Once stopped: wait for the threads to end, until `deadline` at most."""
        for thread in self._threads:  # the first adds the other, if any, before it ends
            thread.join(max(0.0, deadline - time.monotonic()))

    # --- the sending thread ---

    def _run(self) -> None:
        with self._edge():
            giver = self._giver = self._connect()
            counting = threading.Thread(target=self._count, args=(giver,), name="credits", daemon=True)
            counting.start()
            self._threads.append(counting)
            while (share := self._next()) is not None:
                self._send_all(giver, share)
        if self._giver is not None:
            self._giver.close()
            for thread in self._threads[1:]:
                thread.join(STOP_S)
            self._giver.release()

    def _connect(self) -> Giver:
        """Raises `TransportFailed` where that can not be, `WorkerLost` where the target may just be frozen."""
        if self._piece > MAX_FRAME:
            raise TransportFailed(f"{self._piece} bytes, one block of the target, are more than a frame holds")
        try:
            return self._make_giver(self._transport, self._target, self._route)
        except WorkerLost as error:
            log.warning("no lane to %s by %s: %s", self._target.ref.name, self._transport, error)
            raise

    def _next(self) -> _Share | None:
        """What is to be sent next, once there is anything. None: stop."""
        with self._change:
            self._change.wait_for(lambda: self._queue or self._ended)
            return None if self._ended else self._queue.popleft()

    def _send_all(self, giver: Giver, share: _Share) -> None:
        cut = replace(share.offer.cut, blocks=array("q", share.offer.cut.blocks))  # which is cut and sent in no time
        sizes = (self._store.format.block_size, self._target.format.block_size)
        share.computed()  # without the lock, which the engine loop may want
        for layers, i, part in frames(share.layers, cut, *sizes, self._run_of):
            if not self._has_room(len(layers) * part.count * self._piece):
                return
            if not self._send(giver, share.transfer, layers, share.offer.first + i, part):
                return

    def _has_room(self, size: int) -> bool:
        """Wait until the window has room for a frame of so many bytes. False: stop."""
        with self._change:
            if not self._change.wait_for(lambda: self._fits(size) or self._ended, self._patience):
                raise WorkerLost(f"{len(self._under_way)} frames are under way and no answer comes")
            return not self._ended

    def _fits(self, size: int) -> bool:
        return size <= self._room and len(self._under_way) < MOST_UNDER_WAY

    def _send(self, giver: Giver, transfer: _Transfer, layers: range, first: int, part: Cut) -> bool:
        """Whether the handover is still open."""
        with transfer.lock:
            if not transfer.open:
                return False
            header = giver.prepare(transfer.id, transfer.attempt, layers, first, part)
        self._trace.left(transfer.id, layers)
        with self._change:
            self._under_way.append((transfer, header.size))
            self._room -= header.size
        giver.give(header)
        return True

    # --- the counting thread ---

    def _count(self, giver: Giver) -> None:
        with self._edge():
            while True:
                self._credit(giver.credits())

    def _credit(self, count: int) -> None:
        with self._change:
            if count > len(self._under_way):
                raise TransportFailed("more answers than frames")
            answered = [self._under_way.popleft() for _ in range(count)]
            self._room += sum(size for _, size in answered)
            self._change.notify_all()
        for transfer, size in answered:  # without what the engine loop wants: a frame that is made has this lock
            with transfer.lock:
                transfer.answered += 1
                transfer.across += size

    # --- the end of either ---

    @contextlib.contextmanager
    def _edge(self) -> Iterator[None]:
        """What ends one of the two threads ends the lane."""
        try:
            yield
        except BatonError as error:
            self._end(error)
        except Exception as error:  # a thread's edge: without it, handovers would wait for a lane that is no more
            log.exception("a lane to %s failed in our own code", self._target.ref.name)
            self._end(TransportFailed(f"{type(error).__name__}: {error}"))

    def _end(self, error: BatonError) -> None:
        """The lane is of no more use: say so, once."""
        with self._change:
            told = self.dead or self._stopped
            self.dead = True
            self._change.notify_all()
        if not told:
            lasting = isinstance(error, TransportFailed)
            self._broken(TransportBroken(self._target.ref, self._transport, error.message, lasting))
