"""The block manager against a model that is too simple to be wrong."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from baton.common.errors import PoolFull
from baton.engine.block_manager import BlockLeak, BlockManager

BLOCKS = 8
HASHES = [bytes([i]) * 16 for i in range(12)]


class Books(RuleBasedStateMachine):
    """Random takers and givers. `self.content` is what each block must hold; a hash may be found only where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(BLOCKS)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        self.known: set[bytes] = set()

    def _hear(self) -> None:
        stored, evicted = self.manager.drain_events()
        assert not set(stored) & set(evicted)
        self.known = (self.known | set(stored)) - set(evicted)

    @rule(count=st.integers(0, BLOCKS + 1))
    def allocate(self, count: int) -> None:
        available = self.manager.available
        if count > available:
            with pytest.raises(PoolFull):
                self.manager.allocate(count)
            assert self.manager.available == available
        else:
            blocks = self.manager.allocate(count)
            assert len(set(blocks)) == count
            assert not set(blocks) & {b for blocks in self.held for b in blocks}
            for block in blocks:
                self.content.pop(block, None)
            self.held.append(blocks)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            self.manager.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(data=st.data(), block_hash=st.sampled_from(HASHES))
    def seal(self, data: st.DataObject, block_hash: bytes) -> None:
        blocks = sorted({b for blocks in self.held for b in blocks if b not in self.content})
        if blocks:
            block = data.draw(st.sampled_from(blocks))
            self.manager.seal(block, block_hash)
            if self.manager.match([block_hash]) == [block]:
                self.content[block] = block_hash

    @rule(hashes=st.lists(st.sampled_from(HASHES), max_size=4, unique=True))
    def reuse(self, hashes: list[bytes]) -> None:
        blocks = self.manager.match(hashes)
        assert [self.content[b] for b in blocks] == hashes[: len(blocks)]
        self.manager.acquire(blocks)
        self.held.append(blocks)

    @invariant()
    def balanced(self) -> None:
        self.manager.check(self.held)
        assert self.manager.free + self.manager.cached + self.manager.pinned == BLOCKS
        self._hear()
        assert self.known == set(self.manager.hashes())


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_least_recently_used_goes_first_and_tails_before_heads() -> None:
    manager = BlockManager(4)
    old, new = manager.allocate(2), manager.allocate(2)
    for block, block_hash in zip(old + new, HASHES, strict=False):
        manager.seal(block, block_hash)
    manager.release(old)
    manager.release(new)
    manager.acquire(manager.match(HASHES[:2]))  # used again: now the youngest
    manager.release(old)
    taken = manager.allocate(3)
    assert taken == [new[1], new[0], old[1]]
    assert manager.match(HASHES[:2]) == [old[0]]


def test_same_content_twice_keeps_one_name() -> None:
    manager = BlockManager(2)
    first, second = manager.allocate(2)
    manager.seal(first, HASHES[0])
    manager.seal(second, HASHES[0])
    manager.release([second])
    assert manager.match([HASHES[0]]) == [first] and manager.free == 1


@pytest.mark.parametrize("damage", ["lost", "twice", "unowned"])
def test_check_finds_what_is_wrong(damage: str) -> None:
    manager = BlockManager(3)
    (block,) = manager.allocate(1)
    owners = [[block]]
    match damage:
        case "lost":
            manager._free.pop()
        case "twice":
            manager._free.append(block)
        case "unowned":
            owners = []
    with pytest.raises(BlockLeak):
        manager.check(owners)


def test_release_once_too_often() -> None:
    manager = BlockManager(1)
    blocks = manager.allocate(1)
    manager.release(blocks)
    with pytest.raises(BlockLeak):
        manager.release(blocks)


def test_disowned_blocks_are_found_by_nobody() -> None:
    """Pinned ones stay with their owners, cached ones become free; the books balance."""
    manager = BlockManager(3)
    blocks = manager.allocate(2)
    for block in blocks:
        manager.seal(block, bytes([block]) * 16)
    manager.release(blocks[1:])
    manager.drain_events()
    manager.disown([*blocks, 0])
    assert manager.match([bytes([blocks[0]]) * 16]) == [] and manager.hashes() == ()
    assert (manager.free, manager.cached, manager.pinned) == (2, 0, 1)
    assert manager.drain_events() == ((), tuple(bytes([b]) * 16 for b in blocks))
    manager.check([blocks[:1]])
