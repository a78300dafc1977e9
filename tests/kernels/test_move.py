"""Copies and their checksums against numpy and the xxhash package."""

from __future__ import annotations

import mmap
import platform
import threading
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
    BUILDS |= {"without AVX2": ("-mno-avx2",), "without vectors": ("-mno-avx2", "-U__SSE2__")}


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


def expected_checksums(memory: move.Memory, places: move.Places, size: int) -> list[int]:
    return [xxhash.xxh3_64_intdigest(b"".join(bytes(memory[at : at + size]) for at in piece)) for piece in places]


def scattered(pieces: int, segments: int, size: int, seed: int, step: int) -> tuple[move.Places, move.Places]:
    """Places in MEMORY, which may overlap, and in a target of their size with gaps, which do not."""
    random = np.random.default_rng(seed)
    count, stride = pieces * segments, -(-(size + 1) // step) * step
    source_at = random.integers(0, MEMORY.size - size + 1, (pieces, segments))
    return source_at, random.permutation(count).reshape(pieces, segments) * stride


# Hypothesis and a fixture that changes between examples do not go together; this one is the same for all of them.
@given(
    size=SIZES, pieces=st.integers(0, 4), segments=st.integers(0, 5), shift=st.sampled_from([0, 1, 32]),
    step=st.sampled_from([1, 64]), seed=st.integers(0, 99), checked=st.booleans(),
    passing=st.booleans(),
)  # fmt: skip
def copies_are_right(
    size: int, pieces: int, segments: int, shift: int, step: int, seed: int, checked: bool, passing: bool
) -> None:
    source_at, target_at = scattered(pieces, segments, size, seed, step)
    target = aligned(pieces * segments * (size + step) + 1, shift)
    expected = target.copy()
    for one, other in zip(source_at.flat, target_at.flat, strict=True):
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
    source_at, target_at = scattered(2, segments, size, seed=stripes, step=64)
    target = aligned(2 * segments * (size + 64))
    right = expected_checksums(MEMORY, source_at, size)
    assert move.copy(MEMORY, source_at, target, target_at, size).tolist() == right
    assert expected_checksums(target, target_at, size) == right


def test_memory_of_another_process_that_may_only_be_read(way: None, tmp_path: Path) -> None:
    file = tmp_path / "pool"
    file.write_bytes(MEMORY.tobytes())
    with file.open("rb") as handle:
        source = np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    places, target = np.array([[0, 4096], [8192, 640]]), aligned(16_384)
    sums = move.copy(source, places, target, places, 1024)
    assert sums.tolist() == move.checksums(source, places, 1024).tolist() == expected_checksums(MEMORY, places, 1024)
    with pytest.raises(ValueError, match="read-only"):
        move.copy(target, places, source, places, 1024)


@pytest.mark.parametrize("size", [64, 100, 1024])
@pytest.mark.parametrize("wrong", [-1, 8192, 1 << 62, -(1 << 62)])
def test_a_place_outside_is_refused_before_anything_is_copied(way: None, size: int, wrong: int) -> None:
    memory = MEMORY[: 8191 + size].copy()
    good, bad, target = np.array([[0], [8191]]), np.array([[0], [wrong]]), aligned(8191 + size)
    for source_at, target_at in ((good, bad), (bad, good)):
        with pytest.raises(IndexError, match=f"{wrong} in a memory|{wrong} to"):
            move.copy(memory, source_at, target, target_at, size)
    with pytest.raises(IndexError):
        move.checksums(memory, bad, size)
    assert not target.any()
    move.copy(memory, good, target, good, size)
    assert target[8191:].tolist() == memory[8191:].tolist()


def test_a_segment_larger_than_the_memory_is_refused(way: None) -> None:
    with pytest.raises(IndexError):
        move.checksums(MEMORY, np.array([[0]]), MEMORY.size + 1)


def test_arguments_that_do_not_fit_together() -> None:
    places, target = np.array([[0]]), aligned(4096)
    with pytest.raises(ValueError, match="to places"):
        move.copy(MEMORY, places, target, np.array([[0, 64]]), 64)
    with pytest.raises(ValueError, match="contiguous bytes"):
        move.checksums(MEMORY[::2], places, 64)
    with pytest.raises(ValueError, match="contiguous bytes"):
        move.checksums(MEMORY.view(np.int8), places, 64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int64"):
        move.checksums(MEMORY, places.astype(np.int32), 64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size -1"):
        move.checksums(MEMORY, places, -1)


def test_several_threads_at_once(way: None) -> None:
    places = np.arange(0, 262_144, 4096).reshape(8, 8)
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


def test_without_a_compiler_there_is_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert move._library.__wrapped__() is None
    assert "no C compiler" in caplog.text


def test_a_hint_to_stream_is_not_followed_where_the_target_is_not_aligned() -> None:
    """Streaming stores to such an address would end the process."""
    places = np.arange(0, 262_144, 4096).reshape(64, 1)
    target = aligned(MEMORY.size, shift=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(move, "_STREAM_FROM", 0)
        move.copy(MEMORY, places, target, places, 4096)
    assert np.array_equal(target[:262_144], MEMORY[:262_144])


def test_what_is_read_again_at_once_stays_in_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed: list[bool] = []
    spy = SimpleNamespace(move=lambda *arguments: streamed.append(arguments[7]))
    monkeypatch.setattr(move, "_library", lambda: spy)
    memory, places = aligned(move._STREAM_FROM + 64), np.array([[0]])
    for passing in (False, True):
        move.copy(memory, places, memory, places, memory.size, passing=passing)
    assert streamed == [True, False]
