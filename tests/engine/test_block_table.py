from __future__ import annotations

from baton.common.hashing import BlockHasher
from baton.engine.block_table import BlockTable
from baton.engine.sequence import Sequence
from tests.toy import request

SIZE = 4


def table(blocks: int = 8) -> BlockTable:
    return BlockTable(blocks, BlockHasher(SIZE, b"key"))


def sequence(ticket: int, tokens: list[int], tenant: str = "") -> Sequence:
    from dataclasses import replace

    what = replace(request(str(ticket), tokens, 10), tenant=tenant)
    return Sequence(("r", ticket), what, 1, 0.0, 99.0)


def test_computed_blocks_are_found_by_the_same_tenant_only() -> None:
    books, tokens = table(), list(range(10))
    first = sequence(1, tokens)
    assert books.admit(first, 9, 10) and first.computed == 0
    books.advance(first, 10)
    mine, other = sequence(2, tokens), sequence(3, tokens, tenant="another")
    assert books.admit(mine, 9, 10) and mine.computed == 8 and mine.blocks[:2] == first.blocks[:2]
    assert books.admit(other, 9, 10) and other.computed == 0
    for held in (first, mine, other):
        books.drop(held)
    books.check()
    assert books.manager.pinned == 0


def test_nothing_is_found_before_it_is_computed() -> None:
    books, tokens = table(), list(range(8))
    first, second = sequence(1, tokens), sequence(2, tokens)
    books.admit(first, 7, 8)
    books.advance(first, 3)  # the first block is not full yet
    assert books.cached_prefix(second, 8) == []
    books.advance(first, 1)
    assert len(books.cached_prefix(second, 8)) == 1


def test_a_refused_admission_takes_nothing() -> None:
    books = table(blocks=3)
    first = sequence(1, list(range(8)))
    books.admit(first, 7, 8)
    books.advance(first, 8)
    second = sequence(2, list(range(16)))
    assert not books.admit(second, 15, 16)
    assert not books.grow(first, 17)
    books.check()
    assert not second.blocks and len(first.blocks) == 2


def test_generated_tokens_extend_the_chain() -> None:
    books = table()
    first = sequence(1, list(range(6)))
    books.admit(first, 5, 6)
    books.advance(first, 6)
    first.tokens += [6, 7]
    books.grow(first, 8)
    books.advance(first, 2)
    books.drop(first)
    again = sequence(2, list(range(9)))
    assert books.admit(again, 8, 9) and again.computed == 8
