"""Real router, planners, block managers and handovers in virtual time. What this test also holds: they stay pure, and
need no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from baton.bench.quantiles import Quantiles
from baton.bench.simulate import Shape, Simulated, simulate
from baton.bench.virtual import Costs, World, next_token
from baton.bench.workload import Job, Words, poisson, random_jobs
from baton.engine.mailbox import MAX_UNREAD


def traffic(count: int, rate: float, output_len: int = 32) -> list[Job]:
    jobs = random_jobs(count, 128, output_len, seed=1, words=Words(), shared=0.25)
    return poisson(jobs, rate, seed=2)


def assert_all_well(jobs: list[Job], done: Simulated) -> None:
    """Every request has exactly the tokens that the model says, and no block is held by anyone."""
    assert [sample.error for sample in done.run.samples] == [""] * len(jobs)
    for number, job in enumerate(jobs):
        tokens = list(job.prompt)
        for _ in range(job.output_len):
            tokens.append(next_token(tokens))
        assert done.outputs[f"r{number}"] == tokens[len(job.prompt) :]
    for name, books in done.books.items():
        assert books.ok, f"{name}: {books.problem}"
        assert books.free_blocks + books.cached_blocks == books.total_blocks, name
        assert (books.pinned_blocks, books.reserved_blocks, books.sequences, books.handovers) == (0, 0, 0, 0), name
    assert (done.router.running, done.router.waiting) == (0, 0)


def test_a_thousand_requests_on_two_prefill_and_two_decode_workers():
    jobs = traffic(1000, rate=4.0)
    done = simulate(jobs, Shape(prefill=2, decode=2), limit_s=1000)
    assert_all_well(jobs, done)
    counters = {worker.name: worker.load for worker in done.router.workers}
    assert all(counters[name].prompt_tokens > 0.3 * 128_000 for name in ("prefill-0", "prefill-1"))
    assert all(counters[name].output_tokens > 0.3 * 32_000 for name in ("decode-0", "decode-1"))
    assert sum(load.cached_tokens for load in counters.values()) > 30_000  # the shared quarter of the prompts


def test_the_same_seed_gives_the_same_run():
    jobs = traffic(150, rate=4.0)
    one, two = (simulate(jobs, Shape(prefill=2, decode=2)) for _ in range(2))
    assert one == two


def test_pools_that_are_too_small_cost_time_and_nothing_else():
    jobs = traffic(150, rate=6.0, output_len=160)
    shape = Shape(prefill=1, decode=1, num_blocks=60)
    done = simulate(jobs, shape)
    assert_all_well(jobs, done)
    assert done.books["decode-0"].preemptions > 0
    roomy = simulate(jobs, Shape(prefill=1, decode=1))
    assert done.run.wall_s > roomy.run.wall_s


def test_one_worker_can_do_both():
    jobs = traffic(150, rate=2.0)
    done = simulate(jobs, Shape(prefill=0, decode=0, colocated=1))
    assert_all_well(jobs, done)
    assert done.books.keys() == {"colocated-0"}


def test_a_lone_request_takes_what_its_parts_cost():
    costs = Costs(step_s=0.03, prefill_token_s=0.003, decode_token_s=0.002, message_s=0.0005)
    jobs = random_jobs(1, 100, 5, seed=0, words=Words())
    sample = simulate(jobs, Shape(prefill=0, decode=0, colocated=1), costs).run.samples[0]
    assert sample.ttft == pytest.approx(0.0005 + 0.03 + 100 * 0.003 + 0.0005)
    assert sample.itl == pytest.approx([0.03 + 0.002] * 4)


def test_only_what_computing_does_not_hide_of_a_handover_is_paid_for():
    jobs = random_jobs(1, 400, 5, seed=0, words=Words())
    kv = 400 * Costs().kv_bytes_per_token
    compute = Costs().step_s + 400 * Costs().prefill_token_s
    alone = simulate(jobs, Shape(prefill=0, decode=0, colocated=1)).run.samples[0].ttft

    def paid(seconds_on_the_wire: float) -> float:
        costs = Costs(kv_bytes_per_s=kv / seconds_on_the_wire)
        return simulate(jobs, Shape(), costs).run.samples[0].ttft - alone

    quick, slow = paid(compute / 10), paid(compute * 2)
    assert quick < compute / 20  # the last layer only
    assert slow > compute * 0.9


def test_events_of_one_moment_keep_their_order_and_time_has_a_limit():
    world, seen = World(), []
    for name in "abc":
        world.at(1.0, lambda name=name: seen.append(name))
    world.at(0.5, lambda: seen.append("first"))
    world.run(lambda: len(seen) == 4, limit_s=2.0)
    assert seen == ["first", "a", "b", "c"] and world.now == 1.0
    world.every(1.0, lambda: None)
    with pytest.raises(TimeoutError):
        world.run(lambda: False, limit_s=10.0)


def test_quantiles_of_a_run_grow_with_load():
    shape = Shape(prefill=1, decode=1)
    idle, busy = (
        Quantiles.of(sample.ttft for sample in simulate(traffic(100, rate), shape).run.samples) for rate in (0.5, 20.0)
    )
    assert busy.p99 > 2 * idle.p99


def test_it_needs_no_torch():
    code = "import sys, baton.bench.simulate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_more_requests_at_once_than_an_inbox_holds_all_come_through() -> None:
    jobs = [Job(0.0, tuple(range(1, 17)), 4) for _ in range(2 * MAX_UNREAD)]
    assert_all_well(jobs, simulate(jobs, Shape(prefill=1, decode=1), limit_s=1000))
