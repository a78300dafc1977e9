"""Windows of traffic from a router's books."""

from __future__ import annotations

import pytest

from baton.common.cluster import MAX_SAMPLES, Traffic
from baton.common.errors import NotReady
from baton.common.messages import Finished, Started
from baton.common.types import FinishReason, Role
from baton.router.stats import Samples
from baton.router.traffic import Meter
from tests.router.fakes import Driver


def test_one_request_through_the_windows(pair: Driver) -> None:
    meter = Meter(pair.now)

    def window(seconds: float) -> Traffic:
        pair.now += seconds
        return meter.take(pair.core.snapshot(), pair.now)

    pair.submit(range(10), max_tokens=3)
    _, submit = pair.submitted()
    assert window(1.0) == Traffic(1.0, arrived=1, prompt_tokens=10, running=1, oldest_wait_s=1.0)
    pair.report("p", started=(Started(submit.ticket, 4),))
    assert window(1.0) == Traffic(1.0, started=1, cached_tokens=4, queue_s=(1.0,), running=1, oldest_wait_s=2.0)
    pair.tokens("d", submit.ticket, 10, 7)
    assert window(0.5) == Traffic(0.5, output_tokens=1, ttft_s=(2.0,), running=1)
    pair.tokens("d", submit.ticket, 11, 8, 9, finished=(Finished(submit.ticket, FinishReason.LENGTH),))
    assert window(1.0) == Traffic(1.0, finished=1, output_tokens=2, tpot_s=(0.25,))
    assert window(9.0) == Traffic(9.0)


def test_a_second_try_is_not_a_second_start(two_pairs: Driver) -> None:
    driver = two_pairs
    meter = Meter(driver.now)
    state = driver.submit()
    for _ in range(2):
        ((name, submit),) = driver.submits()
        driver.report(name, started=(Started(submit.ticket, 4),))
        assert state.attempt is not None
        driver.tokens(state.attempt.decoder, submit.ticket, state.position, 7)
        driver.take()
        driver.lose(state.attempt.decoder)
    traffic = meter.take(driver.core.snapshot(), driver.now)
    assert (traffic.arrived, traffic.started, traffic.cached_tokens) == (1, 1, 4)
    assert len(traffic.ttft_s) == 1 and traffic.output_tokens == 2 and traffic.waiting == 1


def test_failures_count_those_at_the_door_too() -> None:
    driver = Driver()
    meter = Meter(driver.now)
    with pytest.raises(NotReady):
        driver.submit()
    driver.up("c", Role.COLOCATED)
    driver.submit(deadline_s=1.0)
    driver.wait(1.1)
    traffic = meter.take(driver.core.snapshot(), driver.now)
    assert (traffic.arrived, traffic.failed, traffic.finished) == (1, 2, 0)


def test_a_window_holds_so_many_samples_and_counts_all() -> None:
    samples = Samples()
    for value in range(3):
        samples.add(value)
    assert samples.since(0) == (0, 1, 2) and samples.since(2) == (2,) and samples.since(3) == ()
    for value in range(3, 3 + MAX_SAMPLES):
        samples.add(value)
    assert samples.count == MAX_SAMPLES + 3
    assert samples.since(0) == samples.since(3) == tuple(range(3, 3 + MAX_SAMPLES))
    assert samples.since(samples.count - 2) == (MAX_SAMPLES + 1, MAX_SAMPLES + 2)
