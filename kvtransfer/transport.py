"""What a transport is. Prefill and decode know this file and no transport.

The source *offers* ranges of blocks as they are computed; how the bytes get across is the transport's business: on
message transports the source sends and the target's side of the transport receives into the `Inlet`; on shared memory
the offer itself is the message and the target copies. Either way only the owner of the memory writes into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..common.types import WorkerRef


class BlockStore(Protocol):
    """The paged KV pool, as bytes. `engine.kv_pool.KvPool` is one; so is a list of bytearrays in a test."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer, K and V."""
        ...

    def gather(self, layer: int, blocks: Sequence[int]) -> memoryview:
        """A contiguous copy of these blocks of one layer, in order."""
        ...

    def scatter(self, layer: int, blocks: Sequence[int], data: bytes | memoryview) -> None:
        """Write such a copy into these blocks. Raises `HandoverFailed` if its length is wrong."""
        ...


@dataclass(frozen=True, slots=True)
class Offer:
    """Blocks of one layer whose content is final: numbers `first`, `first + 1` … of the sequence, in `blocks`."""

    handover_id: int
    attempt: int
    layer: int
    first: int
    blocks: tuple[int, ...]


class Outlet(Protocol):
    """The source's side of a transport. Called by the engine loop; must not block it."""

    def open(self, handover_id: int, target: WorkerRef) -> None:
        """A handover to `target` has been granted."""
        ...

    def offer(self, offer: Offer) -> None: ...

    def close(self, handover_id: int) -> None:
        """The handover is over, well or not. When this returns, the source's blocks are not read any more."""
        ...

    def bytes_sent(self, handover_id: int) -> int: ...
