"""Poison in every block that is given back or handed out: who reads one that was not written computes nonsense, and who
writes into one that is nobody's, or that lies in the cache, is found out when it is next used."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from numpy.typing import NDArray

from baton.engine.block_manager import BlockManager

POISON = 0xA5


class WrittenAfterRelease(AssertionError):
    pass


class Poison:
    """Watches `manager` and its `memory` [layers, blocks, ...]. For the worker's loop only, like the manager."""

    def __init__(self, manager: BlockManager, memory: NDArray[Any], value: float = POISON) -> None:
        self._manager = manager
        self._memory = memory
        self._value = value
        self._idle: dict[int, int] = {}
        self._allocate, self._acquire, self._release = manager.allocate, manager.acquire, manager.release
        manager.allocate, manager.acquire, manager.release = self.allocate, self.acquire, self.release  # type: ignore[method-assign]
        self._rest(range(manager.num_blocks))

    def allocate(self, count: int) -> list[int]:
        blocks = self._allocate(count)
        self._leave(blocks)
        self._memory[:, blocks] = self._value
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        blocks = list(blocks)
        self._leave(blocks)
        self._acquire(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        self._release(blocks)
        self._rest(b for b in blocks if self._manager._refs[b] == 0)

    def check(self) -> None:
        """Raises `WrittenAfterRelease` where a block that is nobody's is not as it was left."""
        for block, left in self._idle.items():
            if self._sum(block) != left:
                raise WrittenAfterRelease(f"block {block} was written while nobody owned it")

    def _rest(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if self._manager._hash[block] is None:
                self._memory[:, block] = self._value
            self._idle[block] = self._sum(block)

    def _leave(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            left = self._idle.pop(block, None)
            if left is not None and left != self._sum(block):
                raise WrittenAfterRelease(f"block {block} was written while nobody owned it")

    def _sum(self, block: int) -> int:
        return zlib.crc32(self._memory[:, block].tobytes())
