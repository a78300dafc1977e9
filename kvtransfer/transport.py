"""What a transport is. Prefill and decode know this file and no transport.

    source's loop ── Outlet ── lane (thread) ── Giver ══ link ══▶ Taker ── Inlet ── target's loop

The source *offers* ranges of blocks as they are computed. An outlet keeps one lane for each rank of each target; its
thread cuts offers into frames and has a giver get them across. At the other end a taker obtains the bytes, the inlet
lets them into reserved blocks and nowhere else, and each frame is answered by a credit.

    name            frames go by     bytes
    shm             socket           are copied by the target, out of the source's pool that it sees read-only, as the
                                     source sums them
    cuda-ipc        socket           are copied by the target, within one GPU or over NVLink
    process-group   socket           torch.distributed send and receive: NCCL or gloo
    tcp             socket           follow their frame
    grpc            gRPC stream      follow their frame

Either way only the owner of a pool writes into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..common.kv_format import KvFormat
from ..common.messages import Endpoint, HandoverKey
from ..common.types import WorkerRef
from ..kernels.move import Flag
from .layout import Cut, Route
from .wire import Checksums, FrameHeader

Mark = Callable[[], None]
"""A point in the work that an engine has given to its device: calling it waits until the device is there. Raises
`TransportFailed` where that takes too long."""


class Store(Protocol):
    """The KV pool of one rank, as a transport sees it. All methods may be called on any thread."""

    @property
    def format(self) -> KvFormat: ...

    @property
    def rank(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def checked(self) -> bool:
        """Whether pieces are hashed; where they are not, all checksums are 0."""
        ...

    def mark(self) -> Mark:
        """Here, on the engine's thread: what it has computed may still be on its way into the pool."""
        ...

    def buffer(self, size: int) -> memoryview:
        """Host memory from which, and to which, this pool's bytes get quickly."""
        ...

    def pack(self, layers: range, part: Cut, route: Route, target: KvFormat, out: memoryview) -> Checksums:
        """Write the pieces that `part` covers, as `target` keeps them, one after the other to `out`."""
        ...

    def unpack(self, layers: range, blocks: Sequence[int], route: Route, data: memoryview) -> Checksums:
        """Write such pieces into our own blocks, one piece each; what they hash to, taken on the way."""
        ...

    def checksums(self, layers: range, blocks: Sequence[int], route: Route) -> Checksums:
        """What the pieces hash to that a peer fetches from these blocks."""
        ...

    def fetch(
        self, peer: Any, peer_format: KvFormat, peer_blocks: int, layers: range, theirs: Sequence[int],
        blocks: Sequence[int], route: Route,
    ) -> Checksums:  # fmt: skip
        """Copy pieces out of a peer's pool of `peer_blocks` blocks, which is memory of the kind that ours is and keeps
        rows as we do, into our own `blocks`; what they hash to. Raises `IndexError` where it has no such blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Offer:
    """Blocks whose content is final, or will be when the step that is planned has computed them: `cut` covers the
    target's blocks from number `first` of the sequence on."""

    handover_id: int
    first: int
    cut: Cut


class Outlet(Protocol):
    """The source's side. Called by the engine loop; must not block it."""

    def open(self, handover_id: int, attempt: int, target: Endpoint, transport: str) -> None:
        """A handover to `target` has been granted, and is to go by `transport`."""
        ...

    def stage(self, offers: Sequence[Offer]) -> None:
        """What the step that comes next will have computed, layer by layer."""
        ...

    def layer(self, layer: int) -> None:
        """The running step has computed this layer: its part of what was staged may leave."""
        ...

    def offer(self, offer: Offer) -> None:
        """All layers of these blocks are final."""
        ...

    def close(self, handover_id: int) -> None:
        """The handover is over, well or not. From here on a read of the source's blocks, should one be under way, can
        only be found void. No error if it is not known."""
        ...

    def progress(self, handover_id: int) -> int:
        """Bytes that got across so far."""
        ...

    def failed(self, target: WorkerRef) -> tuple[str, ...]:
        """Transports to this target that broke, and that handovers should avoid."""
        ...

    def forgive(self, target: WorkerRef) -> None:
        """Forget which broke: the pair starts afresh."""
        ...

    def pending(self, handover_id: int) -> int:
        """Frames that were offered and have not got across."""
        ...


class Inlet(Protocol):
    """The target's side. Called by the engine loop, which is told by `Filled` and `Spoiled` how it goes."""

    def open(self, key: HandoverKey, attempt: int, source: KvFormat, first: int, blocks: Sequence[int]) -> None:
        """Let bytes in for the sequence's blocks number `first` and on, which live in `blocks`."""
        ...

    def expect(self, key: HandoverKey, last: int) -> None:
        """The source is through: the handover is complete with the sequence's blocks up to number `last`, exclusive."""
        ...

    def close(self, key: HandoverKey) -> None:
        """Let nothing more in: when the blocks are next used, no write is under way. No error if it is not known."""
        ...

    def touched(self, key: HandoverKey) -> float | None:
        """When bytes last arrived; None if none have."""
        ...


class Giver(Protocol):
    """One lane's way of getting bytes across; used by the lane's thread only."""

    def prepare(self, handover_id: int, attempt: int, layers: range, first: int, part: Cut) -> FrameHeader:
        """Read the blocks, or make them readable. Called while the handover is surely open; must not wait."""
        ...

    def give(self, header: FrameHeader) -> None:
        """Send what was prepared. Raises `TransportFailed` or `WorkerLost` where it does not get across in time."""
        ...

    def withdraw(self, handover_id: int) -> None:
        """The handover is closed; called on the engine loop's thread, before its blocks are used for anything else."""
        ...

    def credits(self) -> int:
        """Wait for answers: how many frames have been taken in since the last call. Called on a thread of its own.
        Raises `WorkerLost` where the other end is gone."""
        ...

    def close(self) -> None:
        """Wake whoever waits here. Idempotent."""
        ...

    def release(self) -> None:
        """Once closed, and when nobody waits here any more: let go of what is held."""
        ...


class Taker(Protocol):
    """The receiving end of one lane; used by one thread only."""

    def fetch(self, header: FrameHeader) -> None:
        """Have the bytes at hand, or, where `land` lacked some, more of them. Nobody's lock is held: may wait for the
        source, but not for ever."""
        ...

    def land(self, store: Store, header: FrameHeader, blocks: Sequence[int], route: Route, over: Flag) -> bool:
        """Write the pieces into these reserved blocks, as far as they are at hand; whether that is all. Must not wait;
        what takes more than some milliseconds stops as soon as `over` says that the blocks are wanted back. Raises
        `CorruptBlock` where the pieces are not what was sent, `HandoverFailed` where the source's blocks may have
        changed meanwhile."""
        ...

    def leave(self, header: FrameHeader) -> None:
        """This frame is done with, taken in or refused."""
        ...

    def close(self) -> None: ...
