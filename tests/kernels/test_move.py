"""Copies and their checksums against numpy and the xxhash package."""

from __future__ import annotations

import mmap
import platform
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from baton.kernels import move

MEMORY = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8)
SIZES = st.one_of(st.integers(0, 40).map(lambda n: 64 * n), st.integers(0, 2500), st.sampled_from([8192, 24_576]))

BUILDS = {"cached": (), "streamed": ()}  # flags of the compiler
if platform.machine() == "x86_64":
    BUILDS |= {"without AVX-512": ("-mno-avx512f",), "without AVX2": ("-mno-avx2",)}
    BUILDS |= {"without vectors": ("-mno-avx2", "-U__SSE2__")}


@pytest.fixture(params=[*BUILDS, "no compiler"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, each way that a call can take."""
    library = move._library(*BUILDS[request.param]) if request.param in BUILDS else None
    if request.param in BUILDS and library is None:
        pytest.skip("there is no C compiler")
    monkeypatch.setattr(move, "_library", lambda: library)
    monkeypatch.setattr(move, "_STREAM_FROM", 1 << 60 if request.param == "cached" else 0)


def aligned(size: int, shift: int = 0) -> move.Memory:
    """Zeroed memory that begins `shift` bytes behind a multiple of 64."""
    memory = np.zeros(size + 64 + shift, np.uint8)
    begin = -memory.ctypes.data % 64 + shift
    return memory[begin : begin + size]


def expected_checksums(memory: move.Memory, at: move.Places, size: int) -> list[int]:
    return [
        xxhash.xxh3_64_intdigest(b"".join(bytes(memory[begin : begin + size]) for begin in piece))
        for piece in at.offsets()
    ]


def every(stride: int, blocks: int) -> move.Places:
    """All blocks of a grid, of one segment each."""
    return move.Places(move.Grid(0, stride, 0, 1, blocks), np.arange(blocks))


def scattered(
    blocks: int, segments: int, size: int, seed: int, step: int, layers: int = 1
) -> tuple[move.Places, move.Places]:
    """Places in MEMORY, which may overlap, and in a target of their size with gaps, which do not."""
    random = np.random.default_rng(seed)
    count = blocks + 2
    room = (MEMORY.size - size) // (count + segments + layers + 1)
    begin, stride, gap, layer = (int(n) for n in random.integers(0, room, 4))
    source = move.Grid(begin, stride, gap, segments, count, layers, layer)
    apart = -(-(size + 1) // step) * step
    target = move.Grid(0, segments * apart, apart, segments, blocks, layers, blocks * segments * apart)
    return move.Places(source, random.integers(0, count, blocks)), move.Places(target, random.permutation(blocks))


def test_places_one_by_one() -> None:
    at = move.Places(move.Grid(100, 30, 7, 2, 4), np.array([3, 0]))
    assert at.offsets().tolist() == [[190, 197], [100, 107]] and at.pieces == 2
    both = move.Places(replace(at.grid, layers=2, layer=500), at.blocks)
    assert both.offsets().tolist() == [[190, 197], [100, 107], [690, 697], [600, 607]] and both.pieces == 4
    for wrong in (4, -1):
        with pytest.raises(IndexError, match="where there are 4"):
            move.Places(at.grid, np.array([0, wrong])).offsets()


# Hypothesis and a fixture that changes between examples do not go together; this one is the same for all of them.
@given(
    size=SIZES, blocks=st.integers(0, 9), layers=st.integers(1, 3), segments=st.integers(0, 5),
    shift=st.sampled_from([0, 1, 32]),
    step=st.sampled_from([1, 64]), seed=st.integers(0, 99), checked=st.booleans(),
    passing=st.booleans(),
)  # fmt: skip
def copies_are_right(
    size: int, blocks: int, layers: int, segments: int, shift: int, step: int, seed: int, checked: bool, passing: bool
) -> None:
    source_at, target_at = scattered(blocks, segments, size, seed, step, layers)
    pieces = layers * blocks
    target = aligned(pieces * segments * (size + step) + 1, shift)
    expected = target.copy()
    for one, other in zip(source_at.offsets().flat, target_at.offsets().flat, strict=True):
        expected[other : other + size] = MEMORY[one : one + size]
    sums = move.copy(MEMORY, source_at, target, target_at, size, checked=checked, passing=passing)
    assert np.array_equal(target, expected), "these bytes, and no others"
    right = expected_checksums(MEMORY, source_at, size)
    assert sums.dtype == np.uint64
    assert sums.tolist() == (right if checked else [0] * pieces)
    assert move.checksums(MEMORY, source_at, size).tolist() == right


def test_every_size_and_place(way: None) -> None:
    copies_are_right()


@pytest.mark.parametrize("stripes", [1, 4, 5, 15, 16, 17, 31, 32, 33, 34, 100])
@pytest.mark.parametrize("segments", [1, 2, 3, 16, 17])
def test_where_blocks_of_stripes_end(way: None, stripes: int, segments: int) -> None:
    size = 64 * stripes
    source_at, target_at = scattered(5, segments, size, seed=stripes, step=64)
    target = aligned(5 * segments * (size + 64))
    right = expected_checksums(MEMORY, source_at, size)
    assert move.copy(MEMORY, source_at, target, target_at, size).tolist() == right
    assert expected_checksums(target, target_at, size) == right


def test_memory_of_another_process_that_may_only_be_read(way: None, tmp_path: Path) -> None:
    file = tmp_path / "pool"
    file.write_bytes(MEMORY.tobytes())
    with file.open("rb") as handle:
        source = np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    places, target = move.Places(move.Grid(64, 4096, 1024, 2, 3), np.array([2, 0])), aligned(16_384)
    sums = move.copy(source, places, target, places, 1024)
    assert sums.tolist() == move.checksums(source, places, 1024).tolist() == expected_checksums(MEMORY, places, 1024)
    with pytest.raises(ValueError, match="read-only"):
        move.copy(target, places, source, places, 1024)


@pytest.mark.parametrize("size", [64, 100, 1024])
@pytest.mark.parametrize("wrong", [-1, 4, 1 << 62, -(1 << 62), -(1 << 63)])
def test_a_block_that_is_not_there_is_refused_before_anything_is_copied(way: None, size: int, wrong: int) -> None:
    grid = move.Grid(7, 2048, 0, 1, 4)
    memory = MEMORY[: 7 + 3 * 2048 + size].copy()  # holds the grid, and not a byte more
    good, bad = (move.Places(grid, np.array([0, last])) for last in (3, wrong))
    target = np.zeros_like(memory)
    for source_at, target_at in ((good, bad), (bad, good)):
        with pytest.raises(IndexError, match=f"{wrong} to|to {wrong}"):
            move.copy(memory, source_at, target, target_at, size)
    with pytest.raises(IndexError):
        move.checksums(memory, bad, size)
    assert not target.any()
    move.copy(memory, good, target, good, size)
    assert target[-size:].tolist() == memory[-size:].tolist()


@pytest.mark.parametrize("grid", [(0, 64, 0, 1, 65), (1, 64, 0, 1, 64), (0, 63, 64, 2, 64), (1 << 62, 64, 0, 1, 1)])
def test_a_grid_larger_than_its_memory_is_refused(way: None, grid: tuple[int, int, int, int, int]) -> None:
    memory, first = aligned(64 * 64), np.zeros(1, np.int64)
    good, bad = (move.Places(move.Grid(*g), first) for g in ((0, 64, 0, grid[3], 1), grid))
    for source_at, target_at in ((good, bad), (bad, good)):
        with pytest.raises(IndexError, match="in a memory of 4096 bytes"):
            move.copy(memory, source_at, aligned(64 * 64), target_at, 64)
    with pytest.raises(IndexError, match="in a memory"):
        move.checksums(memory, bad, 64)


def test_arguments_that_do_not_fit_together() -> None:
    at, target = every(64, 1), aligned(4096)
    with pytest.raises(ValueError, match="to 2 × 1 places"):
        move.copy(MEMORY, at, target, every(64, 2), 64)
    with pytest.raises(ValueError, match="to 1 × 2 places"):
        move.copy(MEMORY, at, target, move.Places(move.Grid(0, 64, 0, 2, 1), at.blocks), 64)
    with pytest.raises(ValueError, match="contiguous bytes"):
        move.checksums(MEMORY[::2], at, 64)
    with pytest.raises(ValueError, match="contiguous bytes"):
        move.checksums(MEMORY.view(np.int8), at, 64)  # type: ignore[arg-type]
    for blocks in (at.blocks.astype(np.int32), np.arange(4)[::2], at.blocks[None]):
        with pytest.raises(ValueError, match="int64"):
            move.checksums(MEMORY, move.Places(at.grid, blocks), 64)
    with pytest.raises(ValueError, match="-1 bytes"):
        move.checksums(MEMORY, at, -1)
    with pytest.raises(ValueError, match="contiguous bytes"):
        move.checksums(MEMORY[:4096].reshape(64, 64), at, 64)
    for name in ("begin", "stride", "step", "segments", "blocks"):
        with pytest.raises(ValueError, match=f"{name}=-64"):
            move.checksums(MEMORY, replace(every(64, 2), grid=replace(at.grid, **{name: -64})), 64)


def test_several_threads_at_once(way: None) -> None:
    places = move.Places(move.Grid(0, 32_768, 4096, 8, 8), np.arange(8))
    right, found = expected_checksums(MEMORY, places, 4096), []

    def work() -> None:
        target = aligned(MEMORY.size)
        found.extend(move.copy(MEMORY, places, target, places, 4096).tolist() for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [right] * 20


@pytest.mark.parametrize("way", BUILDS, indirect=True)
def test_sums_are_those_of_what_was_stored_while_somebody_writes_to_the_source(way: None) -> None:
    """So long that both threads meet: a copy that reads a number twice, for its sum and to store it, is seen."""
    size, pieces = 256, 20_000
    source, target, others = aligned(4 * size), aligned(pieces * size), MEMORY[: 8 * size]
    there, into = (move.Places(move.Grid(0, size, 0, 1, n), np.arange(pieces) % n) for n in (4, pieces))
    by_turns = move.Places(move.Grid(0, size, 0, 1, 8), np.arange(pieces) % 8)
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            move.copy(others, by_turns, source, there, size, checked=False, passing=True)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(30):
            sums = move.copy(source, there, target, into, size)
            assert np.array_equal(sums, move.checksums(target, into, size))
    finally:
        over.set()
        writer.join(60)


def test_without_a_compiler_there_is_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert move._library.__wrapped__() is None
    assert "no C compiler" in caplog.text


def test_a_hint_to_stream_is_not_followed_where_the_target_is_not_aligned() -> None:
    """Streaming stores to such an address would end the process."""
    places, target = every(4096, 64), aligned(MEMORY.size, shift=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(move, "_STREAM_FROM", 0)
        move.copy(MEMORY, places, target, places, 4096)
    assert np.array_equal(target[:262_144], MEMORY[:262_144])


def test_what_is_read_again_at_once_stays_in_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed: list[bool] = []
    spy = SimpleNamespace(move=lambda *arguments: streamed.append(arguments[5]) or True)
    monkeypatch.setattr(move, "_library", lambda: spy)
    memory, places = aligned(move._STREAM_FROM + 64), every(64, 1)
    for passing in (False, True):
        move.copy(memory, places, memory, places, memory.size, passing=passing)
    assert streamed == [True, False]


# --- in step ---


class Shared:
    """What the two ends share, in memory of this process."""

    def __init__(self, ring: int, ahead: int, begin: int = 0) -> None:
        self.summed, self.taken = np.full(1, begin, np.uint64), np.full(1, begin, np.uint64)
        self.sums = np.zeros(ring, np.uint64)
        pointers = (array.ctypes.data for array in (self.summed, self.taken, self.sums))
        self.ledger = move.Counters(*pointers, ring, ahead)


needs_compiler = pytest.mark.skipif(not move.keeps_step(2, 64 * 3), reason="there is no C compiler")
GOING_ON = np.zeros(1, np.int32)


@needs_compiler
@given(
    stripes=st.integers(4, 40), blocks=st.integers(1, 30), layers=st.integers(1, 3), segments=st.integers(1, 3),
    turn=st.integers(1, 9), ahead=st.integers(1, 20), begin=st.sampled_from([0, 1000, 2**63 - 5]),
    shift=st.sampled_from([0, 32]), seed=st.integers(0, 99),
)  # fmt: skip
def test_one_end_sums_and_the_other_copies(
    stripes: int, blocks: int, layers: int, segments: int, turn: int, ahead: int, begin: int, shift: int, seed: int
) -> None:
    """By turns, each as far as the other lets it, wherever the counters are."""
    size, pieces = 64 * stripes, layers * blocks
    source_at, target_at = scattered(blocks, segments, size, seed, 64, layers)
    target = aligned(pieces * segments * (size + 64), shift)
    shared, ours, theirs = Shared(32, ahead, begin), np.zeros(pieces, np.uint64), np.zeros(pieces, np.uint64)
    summed = taken = 0
    while taken < pieces:
        summed = move.lead(MEMORY, source_at, size, summed, shared.ledger, begin, turn)
        assert summed == min(pieces, taken + ahead) and shared.summed[0] == begin + summed
        taken = move.follow(
            MEMORY, source_at, target, target_at, size, taken, shared.ledger, begin, turn, (ours, theirs), GOING_ON
        )
        assert taken == summed and shared.taken[0] == begin + taken
    assert ours.tolist() == theirs.tolist() == expected_checksums(MEMORY, source_at, size)
    assert expected_checksums(target, target_at, size) == ours.tolist()


@needs_compiler
def test_two_threads_in_step() -> None:
    """Neither overtakes the other, and no sum is overwritten before it is read, in a ring that is just large enough."""
    size, blocks, layers = 4096, 60, 5
    source_at, target_at = scattered(blocks, 2, size, 3, 64, layers)
    target, shared = aligned(layers * blocks * 2 * (size + 64)), Shared(16, 12)
    pieces, right = layers * blocks, expected_checksums(MEMORY, source_at, size)

    def lead() -> None:
        for frame in range(20):
            done = 0
            while done < pieces:
                done = move.lead(MEMORY, source_at, size, done, shared.ledger, frame * pieces, 4)

    source = threading.Thread(target=lead, daemon=True)
    source.start()
    for frame in range(20):
        ours, theirs, done = np.zeros(pieces, np.uint64), np.zeros(pieces, np.uint64), 0
        while done < pieces:
            done = move.follow(
                *(MEMORY, source_at, target, target_at, size, done, shared.ledger, frame * pieces, 4),
                (ours, theirs), GOING_ON,
            )  # fmt: skip
        assert ours.tolist() == theirs.tolist() == right, frame
        target[:] = 0
    source.join(20)
    assert not source.is_alive()


@needs_compiler
def test_who_is_told_that_it_is_over_copies_no_more() -> None:
    source_at, target_at = scattered(8, 1, 4096, 1, 64)
    target, shared, sums = aligned(8 * (4096 + 64)), Shared(32, 16), (np.zeros(8, np.uint64), np.zeros(8, np.uint64))
    assert move.lead(MEMORY, source_at, 4096, 0, shared.ledger, 0, 4) == 8
    over = np.ones(1, np.int32)
    assert move.follow(MEMORY, source_at, target, target_at, 4096, 0, shared.ledger, 0, 4, sums, over) == 0
    assert not target.any() and shared.taken[0] == 0


@needs_compiler
@pytest.mark.parametrize("summed", [0, 5, 2**64 - 1])
def test_a_counter_that_goes_back_leaves_nothing_to_copy(summed: int) -> None:
    source_at, target_at = scattered(8, 1, 4096, 1, 64)
    target, shared, sums = aligned(8 * (4096 + 64)), Shared(32, 16), (np.zeros(8, np.uint64), np.zeros(8, np.uint64))
    shared.summed[0] = summed
    assert move.follow(MEMORY, source_at, target, target_at, 4096, 0, shared.ledger, 10, 4, sums, GOING_ON) == 0
    assert not target.any()


@needs_compiler
def test_blocks_that_are_not_there_are_neither_summed_nor_copied() -> None:
    grid, shared = move.Grid(0, 4096, 2048, 2, 5, 2, 20_480), Shared(32, 16)
    bad, good = move.Places(grid, np.array([4, 5])), move.Places(grid, np.array([4, 3]))
    target, sums = aligned(MEMORY.size), (np.zeros(4, np.uint64), np.zeros(4, np.uint64))
    with pytest.raises(IndexError):
        move.lead(MEMORY, bad, 2048, 0, shared.ledger, 0, 4)
    shared.summed[0] = 4
    for source_at, target_at in ((bad, good), (good, bad)):
        with pytest.raises(IndexError):
            move.follow(MEMORY, source_at, target, target_at, 2048, 0, shared.ledger, 0, 4, sums, GOING_ON)
    assert shared.taken[0] == 0 and not target.any()
    with pytest.raises(ValueError, match="places"):
        move.follow(MEMORY, good, target, good, 2048, 0, shared.ledger, 0, 4, (sums[0][:1], sums[1]), GOING_ON)
    for size in (64, 2047):
        with pytest.raises(ValueError, match="in step"):
            move.lead(MEMORY, good, size, 0, shared.ledger, 0, 4)
        with pytest.raises(ValueError, match="in step"):
            move.follow(MEMORY, good, target, good, size, 0, shared.ledger, 0, 4, sums, GOING_ON)
