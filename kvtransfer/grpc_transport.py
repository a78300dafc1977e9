"""KV bytes as raw gRPC messages: works everywhere, needs nothing, and is what other transports fall back to.

One stream for each target, apart from the control stream, so that a cancel overtakes the bulk. Each frame is answered
by an empty message, its credit: at most `window_frames` are under way, which bounds memory on both sides. The target
receives into blocks that it reserved; the source cannot write there.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgpack

from ..common.clock import Clock
from ..common.config import HandoverConfig
from ..common.errors import BatonError, DeadlineExceeded, HandoverFailed, InvalidRequest, WorkerLost
from ..common.types import WorkerRef
from ..protos.rpc import Peer, Stream
from . import wire
from .inlet import Inlet
from .trace import TransferTrace
from .transport import BlockStore, Offer

log = logging.getLogger(__name__)

_CREDIT = b"+"
HELLO_S = 5.0
"""How long a data stream may be open before it says whose it is."""


@dataclass(eq=False, slots=True)
class _Transfer:
    """A handover on its way. Whoever holds `lock` and finds it open may read its blocks."""

    id: int
    target: WorkerRef
    open: bool = True
    sent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class GrpcOutlet:
    """Sends what is offered. The engine loop calls `open`, `offer` and `close`; the rest runs on `loop`, the process's
    event loop. `broken(target)` is called where a data stream breaks."""

    def __init__(
        self, store: BlockStore, source: WorkerRef, config: HandoverConfig, cluster_token: str, clock: Clock,
        loop: asyncio.AbstractEventLoop, broken: Callable[[WorkerRef], None],
    ) -> None:  # fmt: skip
        self.trace = TransferTrace(clock)
        self._store = store
        self._source = source
        self._config = config
        self._token = cluster_token
        self._loop = loop
        self._broken = broken
        self._transfers: dict[int, _Transfer] = {}
        self._lanes: dict[WorkerRef, _Lane] = {}

    # --- called by the engine loop ---

    def open(self, handover_id: int, target: WorkerRef) -> None:
        self._transfers[handover_id] = _Transfer(handover_id, target)

    def offer(self, offer: Offer) -> None:
        self.trace.computed(offer.handover_id, offer.layer)
        transfer = self._transfers[offer.handover_id]
        self._loop.call_soon_threadsafe(self._enqueue, transfer, offer)

    def close(self, handover_id: int) -> None:
        transfer = self._transfers.pop(handover_id, None)
        if transfer is not None:
            with transfer.lock:
                transfer.open = False

    def bytes_sent(self, handover_id: int) -> int:
        return self._transfers[handover_id].sent

    # --- on the event loop ---

    async def stop(self) -> None:
        """End all streams."""
        for lane in list(self._lanes.values()):
            lane.task.cancel()
        await asyncio.gather(*(lane.task for lane in self._lanes.values()), return_exceptions=True)

    def _enqueue(self, transfer: _Transfer, offer: Offer) -> None:
        lane = self._lanes.get(transfer.target)
        if lane is None:
            lane = self._lanes[transfer.target] = _Lane(self._config.window_frames)
            lane.task = self._loop.create_task(self._run(transfer.target, lane))
        run = max(1, self._config.frame_bytes // self._store.block_bytes)
        for i in range(0, len(offer.blocks), run):
            part = Offer(offer.handover_id, offer.attempt, offer.layer, offer.first + i, offer.blocks[i : i + run])
            lane.queue.append((transfer, part))
        lane.wake.set()

    async def _run(self, target: WorkerRef, lane: _Lane) -> None:
        """The life of one lane: until the stream breaks or the process ends."""
        peer = Peer(target.address, self._token)
        stream = peer.data()
        credits = self._loop.create_task(_collect(stream, lane.credits))
        try:
            await stream.write(msgpack.packb((self._source.name, self._source.epoch)))
            while True:
                transfer, offer = await lane.next()
                async with asyncio.timeout(self._config.lease_s):
                    await lane.credits.acquire()
                frame = self._frame(transfer, offer)
                if frame is None:
                    lane.credits.release()
                    continue
                self.trace.left(offer.handover_id, offer.layer)
                async with asyncio.timeout(self._config.lease_s):
                    await stream.write(frame)
        except (BatonError, TimeoutError) as error:
            reason = error if isinstance(error, BatonError) else WorkerLost(f"{target.name} takes no bytes")
            log.warning("data stream to %s broke: %s", target.name, reason)
        finally:
            self._broken(target)
            self._lanes.pop(target, None)
            credits.cancel()
            stream.cancel()
            await peer.close()

    def _frame(self, transfer: _Transfer, offer: Offer) -> bytes | None:
        """Read the blocks of an offer, or nothing if its handover is over."""
        with transfer.lock:
            if not transfer.open:
                return None
            payload = self._store.gather(offer.layer, offer.blocks)
        transfer.sent += len(payload)
        header = wire.FrameHeader(
            offer.handover_id, offer.attempt, offer.layer, offer.first, len(offer.blocks), wire.checksum(payload)
        )
        return wire.pack(header, payload)


class _Lane:
    """What waits to go to one target. Its length is bounded by the handovers that the target has granted."""

    task: asyncio.Task[None]

    def __init__(self, window: int) -> None:
        self.queue: deque[tuple[_Transfer, Offer]] = deque()
        self.wake = asyncio.Event()
        self.credits = asyncio.Semaphore(window)

    async def next(self) -> tuple[_Transfer, Offer]:
        while not self.queue:
            self.wake.clear()
            await self.wake.wait()
        return self.queue.popleft()


async def _collect(stream: Stream[bytes, bytes], credits: asyncio.Semaphore) -> None:
    """Count the answers. When the stream breaks, the writer finds out by itself."""
    try:
        while await stream.read() is not None:
            credits.release()
    except BatonError as error:
        log.debug("no more credits: %s", error)


async def receive(stream: Stream[bytes, bytes], inlet: Inlet) -> None:
    """The target's end of a data stream: take frames into `inlet`, answer each with a credit. A frame that the inlet
    refuses costs its handover and not the stream. Raises `InvalidRequest` where the first message is no hello."""
    try:
        async with asyncio.timeout(HELLO_S):
            hello = await stream.read()
    except TimeoutError as error:
        raise DeadlineExceeded("a stream was opened and nothing was said") from error
    if hello is None:
        return
    try:
        name, epoch = msgpack.unpackb(hello)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise InvalidRequest("the first message of a data stream is (source name, epoch)") from error
    while (frame := await stream.read()) is not None:
        try:
            inlet.receive((name, epoch), frame)
        except HandoverFailed as error:
            log.error("frame from %s refused: %s", name, error)
        except BatonError as error:
            log.info("frame from %s dropped: %s", name, error)
        await stream.write(_CREDIT)
