"""What a source's outlet makes of a lane that fails: every handover on it hears of it, and the transport is avoided for
as long as its failure says."""

from __future__ import annotations

import math
import queue
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from baton.common.clock import ManualClock
from baton.common.config import HandoverConfig
from baton.common.errors import BatonError, TransportFailed, WorkerLost
from baton.common.messages import TransportBroken
from baton.common.types import WorkerRef
from baton.kvtransfer.outlet import AVOIDED_S, LaneOutlet
from tests.kvtransfer.test_process_group import End, soon
from tests.toy import FORMAT, endpoint

TARGET = endpoint("decode-0")


class Giver:
    """One that was connected, and whose target then answers with an error."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.closed, self.released = threading.Event(), threading.Event()

    def credits(self) -> int:
        raise self._error

    def close(self) -> None:
        self.closed.set()

    def release(self) -> None:
        self.released.set()


def outlet(make: Any) -> tuple[LaneOutlet, ManualClock, queue.SimpleQueue[TransportBroken]]:
    """An outlet with one handover, by tcp, for which `make` makes the giver."""
    clock, said = ManualClock(), queue.SimpleQueue[TransportBroken]()
    store: Any = SimpleNamespace(format=FORMAT, rank=0)
    made = LaneOutlet(store, HandoverConfig(), clock, make, said.put)
    made.open(1, 1, TARGET, "tcp")
    return made, clock, said


def raises(error: Exception) -> Any:
    def make(*_: object) -> Giver:
        raise error

    return make


@pytest.mark.parametrize("error", [WorkerLost("the line broke"), TransportFailed("not as agreed")])
def test_a_transport_that_worked_is_avoided_for_a_while_only(error: BatonError) -> None:
    lasting = isinstance(error, TransportFailed)
    giver = Giver(error)
    made, clock, said = outlet(lambda *_: giver)
    broken = said.get(timeout=20)
    assert (broken.target, broken.transport, broken.lasting) == (TARGET.ref, "tcp", lasting)
    assert giver.closed.wait(20) and giver.released.wait(20)
    clock.advance(AVOIDED_S - 1)
    assert made.failed(TARGET.ref) == ("tcp",)
    clock.advance(2)
    assert made.failed(TARGET.ref) == (("tcp",) if lasting else ())


def test_a_connection_is_let_go_when_both_threads_have_ended() -> None:
    """Before that the other one may still be about to use it."""
    waiting, gone = threading.Event(), threading.Event()

    class Slow(Giver):
        def credits(self) -> int:
            waiting.set()
            assert gone.wait(20)
            raise WorkerLost("woken late")

    giver = Slow(WorkerLost("unused"))
    made, _, _ = outlet(lambda *_: giver)
    assert waiting.wait(20)
    (lane,) = made._lanes.values()
    lane.stop()
    assert giver.closed.wait(20) and not giver.released.wait(0.05)
    gone.set()
    assert giver.released.wait(20)


def test_a_block_that_is_more_than_a_frame_fits_the_window() -> None:
    """A piece is not split, whatever a frame should hold."""
    store: Any = SimpleNamespace(format=FORMAT, rank=0)
    config = HandoverConfig(frame_bytes=FORMAT.block_bytes // 4, window_frames=3)
    made = LaneOutlet(store, config, ManualClock(), raises(WorkerLost("nobody")), lambda _: None)
    made.open(1, 1, TARGET, "tcp")
    (lane,) = made._transfers[1].lanes
    assert lane._window == 3 * FORMAT.block_bytes


def test_what_failed_long_ago_or_for_those_who_are_gone_is_forgotten() -> None:
    made, clock, _ = outlet(lambda *_: Giver(WorkerLost("unused")))
    made.forgive(TARGET.ref)
    for epoch in range(2, 5):  # each dies after `forgive` has been called for it
        made.fell(TransportBroken(replace(TARGET.ref, epoch=epoch), "tcp", "restarted", True))
    assert [ref.epoch for ref in made._failed] == [4]
    made.fell(TransportBroken(WorkerRef("other", "", 1), "tcp", "hung up", False))
    clock.advance(AVOIDED_S + 1)
    made.fell(TransportBroken(WorkerRef("third", "", 1), "tcp", "hung up", False))
    assert {ref.name for ref in made._failed} == {TARGET.ref.name, "third"}


def test_what_can_not_be_had_is_avoided_until_it_is_forgiven() -> None:
    made, clock, said = outlet(raises(TransportFailed("no such door")))
    assert said.get(timeout=20).lasting
    clock.advance(100 * AVOIDED_S)
    assert made.failed(TARGET.ref) == ("tcp",)
    made.forgive(TARGET.ref)
    assert made.failed(TARGET.ref) == ()


def test_who_does_not_answer_at_first_is_avoided_for_a_while_and_loudly(caplog: pytest.LogCaptureFixture) -> None:
    """A target that was frozen just then has the transport again when it wakes."""
    made, clock, said = outlet(raises(WorkerLost("no answer")))
    assert not said.get(timeout=20).lasting
    assert made.failed(TARGET.ref) == ("tcp",)
    assert [r.levelname for r in caplog.records if "no lane to" in r.message] == ["WARNING"]
    clock.advance(AVOIDED_S + 1)
    assert made.failed(TARGET.ref) == ()


def test_a_lane_may_break_while_the_loop_looks_which_have() -> None:
    made, _, said = outlet(raises(TransportFailed("no such door")))
    said.get(timeout=20)

    failed = made._failed[TARGET.ref]

    class Meanwhile(float):
        def __gt__(self, now: float) -> bool:
            failed["shm"] = math.inf  # as `fell` does on another thread
            return True

    failed["tcp"] = Meanwhile()
    assert made.failed(TARGET.ref) == ("tcp",)
    assert made.failed(TARGET.ref) == ("shm", "tcp")


@pytest.mark.parametrize("where", ["connecting", "counting"])
def test_a_fault_of_our_own_ends_the_handovers_of_its_lane(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise they would wait for a thread that is no more."""
    fault = ValueError("a bug")
    _, _, said = outlet(raises(fault) if where == "connecting" else lambda *_: Giver(fault))
    broken = said.get(timeout=20)
    assert broken.lasting and "a bug" in broken.message
    assert "in our own code" in caplog.text


def test_a_process_group_that_never_met_ends_with_its_target() -> None:
    """The lane is open and idle; nobody waits for the other rank, and no credit is due."""
    source, target = End("source"), End("target")
    try:
        source.plane.outlet.open(5, 1, target.endpoint, "process-group")
        (lane,) = source.plane.outlet._lanes.values()
        assert soon(lambda: lane._giver is not None)
        target.plane.stop()
        broken = source.hears()
        assert isinstance(broken, TransportBroken) and not broken.lasting
    finally:
        source.stop()
        target.stop()


def test_gloo_is_let_in_by_those_who_ask_for_it() -> None:
    """It ends the process of a target that is sent more than was announced."""
    source, target = End("source"), End("target", transport="auto")
    try:
        source.plane.outlet.open(5, 1, target.endpoint, "process-group")
        broken = source.hears()
        assert isinstance(broken, TransportBroken) and broken.lasting and "no process-group here" in broken.message
    finally:
        source.stop()
        target.stop()
