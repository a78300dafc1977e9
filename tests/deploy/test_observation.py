"""From what gateways and workers report to what the planner looks at."""

from __future__ import annotations

import pytest

from baton.common.cluster import Traffic, WorkerState, WorkerStatus
from baton.common.messages import Load
from baton.deploy.control.observation import StepLine, observe
from baton.deploy.control.planner import AutoscaleConfig

CONFIG = AutoscaleConfig(ttft_s=1.0, tpot_s=0.05, window_s=10.0)


def worker(name: str, state: WorkerState = WorkerState.READY, **load: float) -> WorkerStatus:
    return WorkerStatus(name, name.split("-")[0], state, load=Load(**load))  # type: ignore[arg-type]


def second(**values: object) -> Traffic:
    return Traffic(seconds=1.0, **values)  # type: ignore[arg-type]


def test_rates_are_those_of_all_gateways_together():
    one = [second(arrived=2, prompt_tokens=200, started=2, cached_tokens=50, output_tokens=30)] * 10
    two = [second(arrived=1, prompt_tokens=100, started=1, cached_tokens=25, output_tokens=10)] * 10
    seen = observe({"gateway-0": one, "gateway-1": two}, [], CONFIG, now=5.0)
    assert (seen.now, seen.seconds, seen.requests_per_s, seen.prompt_tokens_per_s) == (5.0, 10.0, 3.0, 300.0)
    assert seen.hit_rate == 0.25 and seen.uncached_len == 75.0 and seen.uncached_tokens_per_s == 225.0
    assert seen.output_tokens_per_s == 40.0


def test_what_is_older_than_the_window_is_forgotten():
    windows = [second(arrived=100, prompt_tokens=100, output_tokens=9)] * 5 + [second(arrived=1, prompt_tokens=1)] * 10
    seen = observe({"g": windows}, [], CONFIG, now=0.0)
    assert (seen.requests_per_s, seen.output_tokens_per_s) == (1.0, 0.0)


def test_queues_are_those_of_now_and_attainment_is_that_of_the_window():
    windows = [
        second(waiting=50, oldest_wait_s=40.0, queue_s=(0.1,) * 8, ttft_s=(0.5, 2.0), tpot_s=(0.01, 0.02, 0.03, 0.9)),
        second(waiting=2, running=7, oldest_wait_s=3.0, queue_s=(0.1, 5.0), arrived=2, prompt_tokens=20),
    ]
    seen = observe({"g": windows, "h": [second(waiting=1, oldest_wait_s=4.0)]}, [], CONFIG, now=0.0)
    assert (seen.waiting, seen.running, seen.oldest_wait_s, seen.queue_p90_s) == (3, 7, 4.0, 5.0)
    assert (seen.ttft_attained, seen.tpot_attained) == (0.5, 0.75)
    assert seen.backlog_tokens == 3 * 10.0


def test_only_workers_that_are_ready_count():
    workers = [
        worker("prefill-0", prefill_tokens_per_s=1000.0, queued_prefill_tokens=900),
        worker("prefill-1", prefill_tokens_per_s=2000.0, queued_prefill_tokens=50),
        worker("prefill-2", WorkerState.LOADING),
        worker("decode-0", running=5, waiting=1, decode_step_s=0.03, decode_batch=5.5, total_blocks=100, free_blocks=20,
               cached_blocks=40),
        worker("decode-1", WorkerState.LEAVING, running=9, decode_step_s=0.09, decode_batch=9.0),
        WorkerStatus("decode-2", "decode", WorkerState.STARTING),
    ]  # fmt: skip
    seen = observe({"g": [second(arrived=1, prompt_tokens=100)]}, workers, CONFIG, 0.0, "decode-1 leaves")
    assert (seen.prefill, seen.decode, seen.batch, seen.changing) == (2, 1, 6, "decode-1 leaves")
    assert seen.prefill_rate == 1500.0 and seen.steps == ((5.5, 0.03),) and seen.kv_used == pytest.approx(0.4)
    assert seen.backlog_tokens == 800.0  # a prompt at each worker is no queue


def test_a_fleet_that_says_nothing_is_no_data():
    seen = observe({}, [], CONFIG, now=0.0)
    assert seen.seconds == 0.0 and seen.prefill_rate == 0.0 and seen.ttft_attained == 1.0


def test_the_rate_of_a_worker_that_has_been_turned_stands_in():
    workers = [worker("prefill-0"), worker("decode-0", prefill_tokens_per_s=700.0)]
    assert observe({}, workers, CONFIG, now=0.0).prefill_rate == 700.0


def test_a_line_through_the_steps_says_how_many_fit():
    line = StepLine()
    for _ in range(150):
        line = line.learn([(b, 0.02 + 0.002 * b) for b in (4.0, 8.0)])
    assert line.batch(0.054) == pytest.approx(17.0)
    for _ in range(150):  # it is slower now: what is old fades
        line = line.learn([(b, 0.03 + 0.004 * b) for b in (4.0, 8.0)])
    assert line.batch(0.054) == pytest.approx(6.0, abs=0.2)


def test_a_line_through_one_batch_is_a_guess_that_goes_through_it():
    line = StepLine().learn([(8.0, 0.04)] * 3)
    assert line.batch(0.04) == pytest.approx(8.0)
    assert 9.0 < line.batch(0.05) < 30.0
    assert StepLine().batch(0.05) == float("inf")


def test_noise_does_not_make_a_line_fall():
    line = StepLine().learn([(4.0, 0.05), (16.0, 0.03)])
    assert line.batch(0.06) > line.batch(0.04) > line.batch(0.02)
