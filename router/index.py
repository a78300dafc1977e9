"""Which worker caches which prefix: an approximate, bounded mirror of the workers' prefix caches.

Fed by the workers' own stored and evicted events, so that it knows what is there and not what was once sent there
(vLLM's KV events, as Dynamo's router uses them). Entries are chained block hashes: equal hash, equal prefix.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..common.hashing import BlockHash
from ..common.messages import KvEvents


@dataclass(slots=True)
class _Cache:
    """What is known of one worker. `next_seq` None: nothing is, until it sends the whole set."""

    next_seq: int | None = None
    blocks: OrderedDict[BlockHash, None] = field(default_factory=OrderedDict)
    """Least recently touched first. A chain's end is older than its head, so that heads outlive their ends."""


class PrefixIndex:
    """One ordered set of hashes for each worker, so that losing a worker costs nothing for the others.

    At most `max_entries` (hash, worker) pairs, about 250 bytes each; when full, the worker with the most entries
    gives up its least recently touched one.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._caches: dict[str, _Cache] = {}
        self._entries = 0

    def __len__(self) -> int:
        return self._entries

    def apply(self, worker: str, events: KvEvents) -> bool:
        """Take in one event. True: an event was missed, all of this worker's entries are dropped, and a resync is
        wanted; what comes before its reset is ignored."""
        cache = self._caches.setdefault(worker, _Cache())
        if events.reset:
            self._clear(cache)
        elif cache.next_seq is None:
            return False  # the resync is on its way
        elif events.seq != cache.next_seq:
            self._clear(cache)
            cache.next_seq = None
            return True
        cache.next_seq = events.seq + 1
        for block_hash in events.evicted:
            if block_hash in cache.blocks:
                del cache.blocks[block_hash]
                self._entries -= 1
        for block_hash in reversed(events.stored):
            if block_hash not in cache.blocks:
                cache.blocks[block_hash] = None
                self._entries += 1
        while self._entries > self._max_entries:
            max(self._caches.values(), key=lambda c: len(c.blocks)).blocks.popitem(last=False)
            self._entries -= 1
        return False

    def match(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """For each worker that holds any of it: how many blocks, from the first on, it caches of this chain."""
        found = {}
        for worker, cache in self._caches.items():
            count = 0
            for block_hash in hashes:
                if block_hash not in cache.blocks:
                    break
                count += 1
            if count:
                found[worker] = count
        return found

    def touch(self, worker: str, hashes: Sequence[BlockHash]) -> None:
        """These blocks of this worker are in use: keep them longest."""
        if (cache := self._caches.get(worker)) is None:
            return
        for block_hash in reversed(hashes):
            if block_hash in cache.blocks:
                cache.blocks.move_to_end(block_hash)

    def blocks(self, worker: str) -> int:
        """Entries of this worker."""
        cache = self._caches.get(worker)
        return len(cache.blocks) if cache else 0

    def drop_worker(self, worker: str) -> None:
        """Forget it: it is gone, or begins anew."""
        if (cache := self._caches.pop(worker, None)) is not None:
            self._entries -= len(cache.blocks)

    def _clear(self, cache: _Cache) -> None:
        self._entries -= len(cache.blocks)
        cache.blocks = OrderedDict()
