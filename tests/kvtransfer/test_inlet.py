from __future__ import annotations

import threading

import pytest

from baton.common.clock import ManualClock
from baton.common.errors import HandoverFailed, StaleAttempt
from baton.common.messages import Filled, Spoiled
from baton.kvtransfer import wire
from baton.kvtransfer.inlet import Inlet
from tests.toy import LAYERS, ToyPool

SOURCE = ("prefill-0", 11)
KEY = (*SOURCE, 5)


def frame(pool: ToyPool, layer: int, first: int, count: int, value: int = 7, **changes: int) -> bytes:
    payload = bytes([value]) * (count * pool.block_bytes)
    fields = {"handover_id": 5, "attempt": 1, "layer": layer, "first": first, "count": count}
    return wire.pack(wire.FrameHeader(**{**fields, "checksum": wire.checksum(payload), **changes}), payload)


@pytest.fixture
def posted() -> list[Filled | Spoiled]:
    return []


@pytest.fixture
def pool() -> ToyPool:
    return ToyPool(8)


@pytest.fixture
def inlet(pool: ToyPool, posted: list[Filled | Spoiled]) -> Inlet:
    inlet = Inlet(pool, ManualClock(3.0), posted.append)
    inlet.open(KEY, 1, 2, [6, 1, 4])  # the sequence's blocks 2, 3 and 4
    return inlet


def test_bytes_land_in_the_reserved_blocks_and_nowhere_else(
    inlet: Inlet, pool: ToyPool, posted: list[Filled | Spoiled]
) -> None:
    assert inlet.touched(KEY) is None
    for layer in range(LAYERS):
        inlet.receive(SOURCE, frame(pool, layer, 2, 2, 10 + layer))
        assert posted == []
    for layer in range(LAYERS):
        inlet.receive(SOURCE, frame(pool, layer, 4, 1, 20 + layer))
    assert posted == [Filled(KEY)] and inlet.touched(KEY) == 3.0
    for layer in range(LAYERS):
        assert {block: int(pool.bytes[layer, block, 0]) for block in range(8)} == {
            **dict.fromkeys((0, 2, 3, 5, 7), 0),
            6: 10 + layer,
            1: 10 + layer,
            4: 20 + layer,
        }


def test_the_same_frame_twice_counts_once(inlet: Inlet, pool: ToyPool, posted: list[Filled | Spoiled]) -> None:
    for layer in (0, 0, 1, 1, 2):
        inlet.receive(SOURCE, frame(pool, layer, 2, 3))
    assert posted == [Filled(KEY)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"layer": LAYERS},
        {"first": 1},
        {"first": 4, "count": 2},
        {"count": 0},
        {"checksum": 1},
    ],
)
def test_wrong_frames_are_refused_and_spoil_the_handover(
    inlet: Inlet, pool: ToyPool, posted: list[Filled | Spoiled], wrong: dict[str, int]
) -> None:
    with pytest.raises(HandoverFailed):
        inlet.receive(SOURCE, frame(pool, **{"layer": 0, "first": 2, "count": 2, **wrong}))
    assert isinstance(posted[0], Spoiled) and not pool.bytes.any()


def test_short_payload_and_overlap_are_refused(inlet: Inlet, pool: ToyPool) -> None:
    with pytest.raises(HandoverFailed):
        inlet.receive(SOURCE, frame(pool, 0, 2, 2)[:-1])
    inlet.receive(SOURCE, frame(pool, 0, 2, 2))
    with pytest.raises(HandoverFailed, match="overlaps"):
        inlet.receive(SOURCE, frame(pool, 0, 3, 2))


@pytest.mark.parametrize("stranger", [("prefill-0", 12), ("prefill-1", 11)])
def test_another_incarnation_cannot_write(inlet: Inlet, pool: ToyPool, stranger: tuple[str, int]) -> None:
    with pytest.raises(StaleAttempt):
        inlet.receive(stranger, frame(pool, 0, 2, 1))
    with pytest.raises(StaleAttempt):
        inlet.receive(SOURCE, frame(pool, 0, 2, 1, attempt=2))
    with pytest.raises(StaleAttempt):
        inlet.receive(SOURCE, frame(pool, 0, 2, 1, handover_id=6))
    assert not pool.bytes.any()


def test_nothing_is_written_after_close(inlet: Inlet, pool: ToyPool) -> None:
    """A writer that is in the middle finishes before `close` returns; one that comes later is refused."""
    inside, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    scatter = pool.scatter

    def slow(layer: int, blocks: list[int], data: bytes) -> None:
        inside.set()
        assert go_on.wait(5)
        scatter(layer, blocks, data)

    pool.scatter = slow  # type: ignore[assignment]
    writer = threading.Thread(target=inlet.receive, args=(SOURCE, frame(pool, 0, 2, 1)))
    writer.start()
    assert inside.wait(5)
    closer = threading.Thread(target=lambda: (inlet.close(KEY), closed.set()))
    closer.start()
    assert not closed.wait(0.05)
    go_on.set()
    assert closed.wait(5)
    writer.join()
    closer.join()
    with pytest.raises(StaleAttempt):
        inlet.receive(SOURCE, frame(pool, 1, 2, 1))


def test_nothing_missing_is_complete_at_once(pool: ToyPool, posted: list[Filled | Spoiled]) -> None:
    Inlet(pool, ManualClock(), posted.append).open(KEY, 1, 3, [])
    assert posted == [Filled(KEY)]


@pytest.mark.parametrize("junk", [b"", b"abc", b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\xc1", b"\x01\x00\x00\x00\x05xx"])
def test_junk_is_a_typed_error(junk: bytes) -> None:
    with pytest.raises(HandoverFailed):
        wire.unpack(junk)
