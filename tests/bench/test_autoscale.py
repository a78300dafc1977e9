"""The planner at work on simulated fleets: workers turn, start and leave while requests run, and nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from baton.bench.autoscale import COSTS, PLANNER, WHOLE, Load, Phase, compare, document, flip_load, trace_load
from baton.bench.scaling import Operator, autoscaled
from baton.bench.simulate import Shape, Simulated, Simulation
from baton.bench.virtual import next_token
from baton.bench.workload import Job, Words, poisson, random_jobs
from baton.common.cluster import Traffic
from baton.common.types import Role
from baton.deploy.control.planner import AutoscaleConfig
from baton.router.traffic import Meter

CONFIG = AutoscaleConfig(enabled=True, ttft_s=3.0, tpot_s=0.06)
SMALL = (
    Phase("settling", 20, 2.9, 800, 8, counted=False),
    Phase("before", 30, 2.9, 800, 8),
    Phase("during", 25, 5.5, 40, 130),
    Phase("after", 25, 5.5, 40, 130),
)


def assert_all_well(jobs: list[Job], done: Simulated) -> None:
    """Every request has exactly the tokens that the model says, whatever happened to workers on the way, and no block
    is held by anyone."""
    assert [sample.error for sample in done.run.samples] == [""] * len(jobs)
    for number, job in enumerate(jobs):
        tokens = list(job.prompt)
        for _ in range(job.output_len):
            tokens.append(next_token(tokens))
        assert done.outputs[f"r{number}"] == tokens[len(job.prompt) :]
    for name, books in done.books.items():
        assert books.ok, f"{name}: {books.problem}"
        assert (books.pinned_blocks, books.reserved_blocks, books.sequences, books.handovers) == (0, 0, 0, 0), name


def steady(count: int = 120) -> list[Job]:
    return poisson(random_jobs(count, 200, 60, seed=1, words=Words()), 3.0, seed=2)


def test_the_ratio_follows_a_load_that_flips_and_beats_every_fixed_split():
    load = flip_load(SMALL, seed=3)
    done = compare(load, 4, CONFIG, Shape(max_running=256), lambda _: None)
    splits = [(step.decision.prefill, step.decision.decode) for step in done.changes]
    assert splits[0] == (3, 1) and splits[-1] == (1, 3)
    assert all(" turn " in f" {step.decision.why}" for step in done.changes)
    assert done.planned["before"].both > 0.9 and done.planned["after"].both > 0.9
    assert done.planned[WHOLE].both > done.systems[done.best_fixed(WHOLE)][WHOLE].both + 0.2
    for phase in ("before", "after"):
        assert done.planned[phase].both > done.alone[phase][done.best_alone(phase)].both - 0.05
    written = document(done)
    assert written["systems"].keys() == {PLANNER, "1P 3D", "2P 2D", "3P 1D"} and written["planner"]


def test_the_same_seed_gives_the_same_decisions():
    load = flip_load((replace(SMALL[0], seconds=12.0), SMALL[2]), seed=3)

    def run() -> tuple[Simulated, list[str]]:
        done, operator = autoscaled(Simulation(Shape(prefill=2, decode=2), COSTS), load.jobs, CONFIG, 1000.0)
        return done, [step.decision.why for step in operator.steps]

    assert run() == run()


def test_workers_turn_under_load_and_back_and_nothing_is_lost():
    jobs = steady()
    sim = Simulation(Shape(prefill=2, decode=2), COSTS)
    turned: list[tuple[str, str]] = []

    def turn(name: str, role: Role) -> None:
        sim.turn(name, role, lambda: turned.append((name, sim.workers[name].info.role.value)))

    for when, name, role in (
        (5.0, "decode-1", Role.PREFILL), (12.0, "prefill-0", Role.DECODE), (20.0, "decode-1", Role.DECODE),
        (28.0, "prefill-0", Role.PREFILL),
    ):  # fmt: skip
        sim.world.at(when, lambda name=name, role=role: turn(name, role))
    done = sim.run(jobs, 1000.0)
    assert_all_well(jobs, done)
    assert turned == [
        ("decode-1", "prefill"),
        ("prefill-0", "decode"),
        ("decode-1", "decode"),
        ("prefill-0", "prefill"),
    ]
    assert done.router.stats.moves["moved"] > 0


def test_workers_start_and_leave_under_load():
    jobs = steady()
    sim = Simulation(Shape(prefill=1, decode=1), COSTS)
    ended: list[str] = []
    sim.world.at(5.0, lambda: sim.join("decode-1", Role.DECODE))
    sim.world.at(6.0, lambda: sim.join("prefill-1", Role.PREFILL))
    sim.world.at(20.0, lambda: sim.end("decode-0", lambda: ended.append("decode-0")))
    sim.world.at(21.0, lambda: sim.end("prefill-0", lambda: ended.append("prefill-0")))
    done = sim.run(jobs, 1000.0)
    assert_all_well(jobs, done)
    assert sorted(ended) == ["decode-0", "prefill-0"]
    assert {worker.name for worker in done.router.workers} == {"decode-1", "prefill-1"}


def test_more_load_than_the_fleet_can_take_starts_workers_and_they_leave_again():
    config = replace(CONFIG, max_workers=6, hold_down_s=10.0)
    load = flip_load((Phase("high", 40, 5.0, 800, 8), Phase("low", 60, 0.5, 400, 8)), seed=1)
    sim = Simulation(Shape(prefill=1, decode=1), COSTS)
    operator = Operator(sim, config, load_s=5.0)
    done = sim.run(load.jobs, 1000.0)
    assert_all_well(load.jobs, done)
    whys = [step.decision.why for step in operator.steps if step.decision.changes]
    assert whys[0].startswith("start ") and whys[-1].startswith("let go ")
    assert max(step.prefill + step.decode for step in operator.steps) == 6
    assert operator.steps[-1].prefill + operator.steps[-1].decode < 6


def test_traffic_adds_up_to_what_was_sent():
    jobs = steady(60)
    sim = Simulation(Shape(prefill=1, decode=1), COSTS)
    meter, windows = Meter(0.0), list[Traffic]()
    sim.world.every(1.0, lambda: windows.append(meter.take(sim.snapshot(), sim.world.now)))
    done = sim.run(jobs, 1000.0)
    for name, total in (
        ("arrived", 60), ("started", 60), ("finished", 60), ("failed", 0),
        ("prompt_tokens", 60 * 200), ("output_tokens", 60 * 60),
    ):  # fmt: skip
        assert sum(getattr(window, name) for window in windows) == total, name
    ttft = sorted(value for window in windows for value in window.ttft_s)
    assert ttft == pytest.approx(sorted(sample.ttft for sample in done.run.samples))
    assert max(window.oldest_wait_s for window in windows) <= max(ttft) and windows[-1].running == 0


def test_a_window_of_a_trace_is_replayed_from_its_beginning(tmp_path: Path):
    rows = "".join(f"{t},0,{100 + t},{10}\n" for t in range(100))
    trace = tmp_path / "trace.csv"
    trace.write_text(f"timestamp_s,client_id,input_length,output_length\n{rows}")
    load: Load = trace_load(trace, begin_s=20, seconds=40, speed=2, shrink=2, max_len=1000)
    assert [job.arrival for job in load.jobs] == pytest.approx([k / 2 for k in range(40)])
    assert [len(job.prompt) for job in load.jobs] == [(120 + k) // 2 for k in range(40)]
    assert [(begin, end) for _, begin, end in load.phases] == [(0, 5), (5, 10), (10, 15), (15, 20)]
    with pytest.raises(ValueError, match="no request in the window"):
        trace_load(trace, begin_s=500, seconds=40, speed=1, shrink=1, max_len=1000)
