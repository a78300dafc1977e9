"""What is told of a request: from its arrival to its end, without a gap."""

from __future__ import annotations

from itertools import pairwise

import pytest

from baton.common.cluster import Span
from baton.common.messages import Failed, Finished, HandedOver, Move, Started
from baton.common.types import FinishReason, Role
from baton.router import traces as traces_module
from baton.router.request import RequestState
from baton.router.story import MAX_MARKS, Story
from baton.router.traces import MAX_ENDED, Traces
from tests.router.fakes import Driver


def told(driver: Driver, state: RequestState) -> list[tuple[str, str, float, str]]:
    """(what, worker, seconds, note) of each stage; the one that goes on has lasted until now."""
    spans = state.story.spans(state.received, driver.now)
    assert spans[0].begin == 0
    for one, following in pairwise(spans):
        assert one.end == following.begin
    return [(span.what, span.worker, round((span.end or 0.0) - span.begin, 6), span.note) for span in spans]


def step(driver: Driver, seconds: float = 1.0) -> None:
    """Time passes; nobody's lease runs."""
    driver.now += seconds
    for worker in driver.core._fleet.workers.values():
        worker.heard = driver.now


def test_a_request_that_is_handed_over(pair: Driver) -> None:
    state = pair.submit()
    _, submit = pair.submitted()
    step(pair, 2.0)
    pair.report("p", started=(Started(submit.ticket, 2),))
    step(pair, 5.0)
    pair.tokens("d", submit.ticket, 3, 7)
    step(pair, 0.5)
    pair.report("p", handed_over=(HandedOver(submit.ticket, exposed_s=1.5),))
    step(pair, 4.0)
    assert told(pair, state) == [
        ("waiting", "", 0.0, ""),
        ("queued", "p", 2.0, "cold"),
        ("prefill", "p", 4.0, "2 tokens cached"),
        ("handover", "p", 1.0, "to d"),
        ("decode", "d", 4.5, ""),
    ]
    assert state.story.spans(state.received, None)[-1].end is None


@pytest.mark.parametrize("exposed_s", [0.0, 100.0])
def test_a_handover_fits_between_its_neighbours_whatever_the_worker_says(pair: Driver, exposed_s: float) -> None:
    state = pair.submit()
    _, submit = pair.submitted()
    pair.report("p", started=(Started(submit.ticket, 0),))
    step(pair)
    pair.report("p", handed_over=(HandedOver(submit.ticket, exposed_s),))  # the source's word comes first
    step(pair)
    pair.tokens("d", submit.ticket, 3, 7)
    lengths = (1.0, 1.0) if exposed_s == 0 else (0.0, 2.0)
    assert [told(pair, state)[i][2] for i in (2, 3)] == list(lengths)
    assert [entry[0] for entry in told(pair, state)] == ["waiting", "queued", "prefill", "handover", "decode"]


def test_a_failure_and_another_try(pair: Driver) -> None:
    state = pair.submit()
    _, submit = pair.submitted()
    pair.report("p", started=(Started(submit.ticket, 0),))
    step(pair)
    pair.report("p", failed=(Failed(submit.ticket, "pool_full", "no room"),))
    step(pair)
    pair.up("e", Role.DECODE)
    pair.tick()
    assert [(what, worker) for what, worker, _, _ in told(pair, state)] == [
        ("waiting", ""), ("queued", "p"), ("prefill", "p"), ("failed", "d"), ("waiting", ""), ("queued", "p"),
    ]  # fmt: skip
    assert told(pair, state)[3] == ("failed", "d", 0.0, "pool_full")
    assert told(pair, state)[4][2] == 1.0


def test_a_running_request_that_moves(two_pairs: Driver) -> None:
    driver = two_pairs
    state = driver.submit(max_tokens=20)
    _, submit = driver.submitted()
    assert state.attempt is not None
    first = state.attempt.decoder
    driver.tokens(first, submit.ticket, 3, 7)
    driver.report(state.attempt.prefill, handed_over=(HandedOver(submit.ticket),))
    driver.core.set_draining([], [first])
    driver.tick()
    ((_, move),) = [sent for sent in driver.take() if isinstance(sent[1], Move)]
    step(driver, 3.0)
    driver.report(first, handed_over=(HandedOver(submit.ticket),))
    assert [entry[:3] for entry in told(driver, state)[-2:]] == [
        ("decode", first, 3.0),
        ("decode", move.target.name, 0.0),
    ]
    assert told(driver, state)[-1][3] == f"moved from {first}"


def test_prefill_begins_once_in_a_try() -> None:
    story = Story()
    story.waits(0.0)
    story.placed("c", "cold", 1.0)
    story.prefills(0, 2.0)
    story.decodes("c", 3.0)
    story.prefills(5, 4.0)  # preempted, and computed again
    assert [span.what for span in story.spans(0.0, None)] == ["waiting", "queued", "prefill", "decode"]
    story = Story()
    story.waits(0.0)
    story.placed("p", "cold", 0.0)
    story.prefills(0, 1.0)
    story.decodes("d", 2.0)
    story.handed_over("d", 0.0, 5.0)
    assert story.spans(0.0, 6.0)[-2:] == (Span("handover", "p", 2.0, 2.0, "to d"), Span("decode", "d", 2.0, 6.0))


def test_a_long_story_loses_its_beginning() -> None:
    story = Story()
    for turn in range(MAX_MARKS):
        story.waits(turn)
        story.fails("w", "pool_full", turn)
    spans = story.spans(0.0, MAX_MARKS)
    assert len(spans) == MAX_MARKS and spans[-1] == Span("failed", "w", MAX_MARKS - 1, MAX_MARKS, "pool_full")


def ended(driver: Driver, traces: Traces, name: str, seconds: float) -> None:
    state = driver.submit(name=name)
    _, submit = driver.submitted()
    driver.now += seconds
    driver.tokens("c", submit.ticket, 3, 7, finished=(Finished(submit.ticket, FinishReason.STOP),))
    traces.ended(state, driver.now)


def test_the_last_that_ended_are_remembered_and_the_slowest_found() -> None:
    driver = Driver()
    driver.up("c")
    driver.take()
    running: dict[RequestState, None] = {}
    traces = Traces("gateway-0", running.keys())
    assert traces.slowest(driver.now) is None
    for turn in range(MAX_ENDED + 5):
        ended(driver, traces, f"r{turn}", 2.0 if turn == 7 else 0.5)
    assert traces.find("r4", driver.now) is None and traces.find("r5", driver.now) is not None
    slowest = traces.slowest(driver.now + 3.0)
    assert slowest is not None and (slowest.request_id, slowest.spans[-1].end) == ("r7", 2.0)
    assert slowest.ago_s == pytest.approx((MAX_ENDED - 3) * 0.5 + 2.0 + 3.0)
    running[driver.submit(name="now")] = None
    assert (fast := traces.slowest(driver.now + 1.0)) is not None and fast.request_id == "r7"
    assert (slow := traces.slowest(driver.now + 3.0)) is not None and slow.request_id == "now"


def test_of_two_requests_with_one_id_the_later_is_found() -> None:
    driver = Driver()
    driver.up("c")
    driver.take()
    traces = Traces("gateway-0", ())
    ended(driver, traces, "twice", 1.0)
    ended(driver, traces, "other", 1.0)
    ended(driver, traces, "twice", 2.0)
    assert (found := traces.find("twice", driver.now)) is not None and found.ago_s == 2.0
    one, two = driver.submit(name="twice"), driver.submit(name="twice")
    two.output += [1, 2]
    traces = Traces("gateway-0", [one, two])
    assert (found := traces.find("twice", driver.now)) is not None and found.output_tokens == 2


def test_who_ended_last_is_remembered_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces_module, "MAX_ENDED", 2)
    driver = Driver()
    driver.up("c")
    driver.take()
    traces = Traces("gateway-0", ())
    for name in ("twice", "other", "twice", "new"):
        ended(driver, traces, name, 1.0)
    assert [traces.find(name, driver.now) is not None for name in ("twice", "other", "new")] == [True, False, True]


def test_outcomes() -> None:
    driver = Driver()
    driver.up("c")
    state = driver.submit(deadline_s=1.0)
    traces = Traces("gateway-0", [state])
    assert (found := traces.find("r", driver.now)) is not None and found.outcome == ""
    driver.wait(1.1)
    traces = Traces("gateway-0", ())
    traces.ended(state, driver.now)
    assert (found := traces.find("r", driver.now)) is not None and found.outcome == "deadline_exceeded"


def test_a_word_of_prefill_that_comes_after_the_first_token_still_comes_before_it() -> None:
    story = Story()
    story.waits(0.0)
    story.placed("p", "cold", 1.0)
    story.decodes("d", 2.0)
    story.prefills(0, 2.5)
    assert [(s.what, s.worker, s.begin) for s in story.spans(0.0, 3.0)] == [
        ("waiting", "", 0.0), ("queued", "p", 1.0), ("prefill", "p", 2.0), ("decode", "d", 2.0),
    ]  # fmt: skip
