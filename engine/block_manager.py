"""Who owns which KV block: reference counts, and the prefix cache over the blocks that nobody owns.

A block is in exactly one of three states:

    free     no content worth keeping                    refs == 0, no hash
    cached   full, named by its hash, nobody uses it      refs == 0, hash, in the LRU order
    pinned   used by at least one sequence or handover    refs >= 1, hash or not

Only the worker's own loop calls this; no locks, no torch. The reference-counted, hash-addressed block pool is vLLM's
(PagedAttention, SOSP '23, and its automatic prefix caching).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from ..common.errors import PoolFull
from ..common.hashing import BlockHash


class BlockLeak(AssertionError):
    """The books do not balance: some block has an owner too many or too few."""


class BlockManager:
    """Hands out block ids 0 … `num_blocks` - 1."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._hash: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[BlockHash, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._events: dict[BlockHash, bool] = {}  # True: stored, False: evicted; the last one counts

    # --- taking and giving back ---

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give: free ones, and cached ones at the price of their content."""
        return len(self._free) + len(self._cached)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def pinned(self) -> int:
        return self.num_blocks - self.available

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of undefined content, each with one reference; evicts the least recently used cached blocks
        where the free ones do not suffice. Raises `PoolFull`, and takes nothing, if there are not enough."""
        if count > self.available:
            raise PoolFull(f"{count} KV blocks wanted, {self.available} of {self.num_blocks} available")
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these blocks, which must be cached or pinned."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each. The last of a sequence's blocks becomes the first to be evicted: a prefix is
        worth more than what follows it."""
        for block in reversed(blocks):
            if self._refs[block] == 0:
                raise BlockLeak(f"block {block} released once too often")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._hash[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    # --- the prefix cache ---

    def match(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Blocks that hold the longest known prefix of this chain. Takes no reference."""
        blocks = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def seal(self, block: int, block_hash: BlockHash) -> None:
        """Name a pinned block whose content is complete, so that others can find it. If the same content is known
        already, this copy stays nameless and is freed with its last reference."""
        if self._hash[block] is None and block_hash not in self._by_hash:
            self._hash[block] = block_hash
            self._by_hash[block_hash] = block
            self._events[block_hash] = True

    def disown(self, blocks: Iterable[int]) -> None:
        """Take these blocks' names away: what they hold is in doubt, and nobody else shall find it."""
        for block in blocks:
            block_hash = self._hash[block]
            if block_hash is not None:
                self._hash[block] = None
                del self._by_hash[block_hash]
                self._events[block_hash] = False
                if block in self._cached:
                    del self._cached[block]
                    self._free.append(block)

    def hashes(self) -> tuple[BlockHash, ...]:
        """All content that can be found here now."""
        return tuple(self._by_hash)

    def drain_events(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """(stored, evicted) since the last call."""
        stored = tuple(h for h, kept in self._events.items() if kept)
        evicted = tuple(h for h, kept in self._events.items() if not kept)
        self._events.clear()
        return stored, evicted

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        block_hash = self._hash[block]
        assert block_hash is not None
        self._hash[block] = None
        del self._by_hash[block_hash]
        self._events[block_hash] = False
        return block

    # --- proof ---

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Prove that `owners` (one list of blocks for each sequence or handover) are all that hold references, that
        each block is in exactly one state, and that the index is exact. Raises `BlockLeak`."""
        held = Counter(block for blocks in owners for block in blocks)
        for block, refs in enumerate(self._refs):
            if refs != held[block]:
                raise BlockLeak(f"block {block} has {refs} references but {held[block]} owners")
        free, cached = set(self._free), set(self._cached)
        if len(free) != len(self._free) or free & cached:
            raise BlockLeak("a block is free twice, or free and cached")
        for block in range(self.num_blocks):
            idle = self._refs[block] == 0
            if idle != (block in free or block in cached):
                raise BlockLeak(f"block {block} is {'lost' if idle else 'free though used'}")
            if (block in cached) != (idle and self._hash[block] is not None):
                raise BlockLeak(f"block {block} is in the wrong list")
        index = {h: b for b, h in enumerate(self._hash) if h is not None}
        if index != self._by_hash:
            raise BlockLeak("the hash index does not match the blocks")
