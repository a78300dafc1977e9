"""The planner of pool sizes against every fixed split of as many workers, in virtual time, on a load that changes.

DistServe and Splitwise size the two pools for one workload. Here it flips, from long prompts with short answers to
short prompts with long answers and back: a split that is right for the one is wrong for the other. How many requests
keep to both SLOs is counted for each phase by arrival.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..deploy.control.planner import AutoscaleConfig
from .client import Sample
from .plot import INK, figure
from .report import Slo
from .scaling import Step, autoscaled
from .simulate import Shape, Simulation, simulate
from .trace import fit, read_trace
from .virtual import Costs
from .workload import Job, Words, trace_jobs

COSTS = Costs(step_s=0.02, prefill_token_s=0.0008, decode_token_s=0.002)
"""A worker that computes some 1,200 prompt tokens a second, and decodes 17 requests in steps of 54 ms."""
LIMIT_S = 36_000.0
WARM_S = 2 * COSTS.message_s
PLANNER, WHOLE = "planner", "all of it"


@dataclass(frozen=True, slots=True)
class Phase:
    """So many seconds of Poisson arrivals, `rate` a second; lengths are gamma distributed (shape 4) around the means.
    `counted` False: the time in which caches, rates and the planner settle."""

    name: str
    seconds: float
    rate: float
    input_len: int
    output_len: int
    counted: bool = True


TRACE_PARTS = 4
PROMPTS, ANSWERS = (5.0, 800, 24), (8.0, 48, 160)
FLIP = (
    Phase("settling", 30, *PROMPTS, counted=False),
    Phase("before: long prompts", 60, *PROMPTS),
    Phase("during: the flip's first 40 s", 40, *ANSWERS),
    Phase("after: long answers", 50, *ANSWERS),
    Phase("during: back, first 40 s", 40, *PROMPTS),
    Phase("after: long prompts again", 50, *PROMPTS),
)


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent, and the (name, begin, end) of the phases that are counted, in seconds of arrival."""

    title: str
    jobs: list[Job]
    phases: list[tuple[str, float, float]]


@dataclass(frozen=True, slots=True)
class Score:
    """Requests of one phase, and the shares of them that kept to both SLOs, and to each."""

    requests: int
    both: float
    ttft: float
    tpot: float

    @classmethod
    def of(cls, samples: Sequence[Sample], slo: Slo) -> Score:
        good = [sample for sample in samples if not sample.error]
        share = 1.0 / max(1, len(samples))
        return cls(
            len(samples),
            sum(slo.met(sample) for sample in samples) * share,
            sum(sample.ttft <= slo.ttft for sample in good) * share,
            sum((sample.tpot or 0.0) <= slo.tpot for sample in good) * share,
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of it.

    systems   planner and fixed splits → phase (and `WHOLE`) → score, each having served the whole load
    alone     phase → fixed split → score with nothing but this phase's load, from a fresh start: what somebody could
              do who knew the phase beforehand, and owed nothing from the one before
    steps     what the planner decided, at each interval
    """

    load: Load
    config: AutoscaleConfig
    systems: dict[str, dict[str, Score]]
    alone: dict[str, dict[str, Score]]
    steps: tuple[Step, ...]

    @property
    def planned(self) -> dict[str, Score]:
        return self.systems[PLANNER]

    def best_fixed(self, phase: str) -> str:
        """The fixed split that kept to the SLO most often over the whole load, in one phase or in all."""
        fixed = {name: scores[phase].both for name, scores in self.systems.items() if name != PLANNER}
        return max(fixed, key=fixed.__getitem__)

    def best_alone(self, phase: str) -> str:
        """The fixed split that serves this phase best, if there is nothing else."""
        return max(self.alone[phase], key=lambda name: self.alone[phase][name].both)

    @property
    def changes(self) -> list[Step]:
        return [step for step in self.steps if step.decision.changes]


def flip_load(phases: Sequence[Phase] = FLIP, seed: int = 0) -> Load:
    """Arrivals and lengths of a load that changes from phase to phase."""
    rng, words = random.Random(seed), Words()
    jobs: list[Job] = []
    counted: list[tuple[str, float, float]] = []
    begin = 0.0
    for phase in phases:
        end, now = begin + phase.seconds, begin + rng.expovariate(phase.rate)
        while now < end:
            prompt = words.prompt(words.draw(rng, _length(rng, phase.input_len)), text=False)
            jobs.append(Job(now, prompt, _length(rng, phase.output_len)))
            now += rng.expovariate(phase.rate)
        if phase.counted:
            counted.append((phase.name, begin, end))
        begin = end
    return Load("a load that flips, and flips back", jobs, counted)


def trace_load(
    path: Path,
    *,
    begin_s: float,
    seconds: float,
    speed: float,
    shrink: int,
    max_len: int,
    seed: int = 0,
    parts: int = 4,
) -> Load:
    """A window of a published trace, in parts of equal length. Raises `ValueError` where there is nothing in it."""
    rows = [row for row in read_trace(path, seed) if begin_s <= row.arrival < begin_s + seconds]
    jobs = trace_jobs(fit(rows, shrink=shrink, max_len=max_len), seed=seed, words=Words(), speed=speed)
    if not jobs:
        raise ValueError(f"{path.name}: no request in the window that fits {max_len} tokens")
    jobs = [Job(job.arrival - begin_s / speed, job.prompt, job.output_len) for job in jobs]
    span = seconds / speed / TRACE_PARTS
    phases = [(f"{k * span:.0f} to {(k + 1) * span:.0f} s", k * span, (k + 1) * span) for k in range(TRACE_PARTS)]
    return Load(f"{path.name}, from {begin_s:.0f} s on", jobs, phases)


def compare(
    load: Load, workers: int, config: AutoscaleConfig, shape: Shape, on_step: Callable[[str], None]
) -> Comparison:
    """Run them all. The planner begins with an even split. `shape`: what its workers are like; its counts are not
    looked at."""
    on_step(PLANNER)
    first = workers // 2
    sim = Simulation(replace(shape, prefill=first, decode=workers - first, colocated=0), COSTS)
    done, operator = autoscaled(sim, load.jobs, config, LIMIT_S)
    systems = {PLANNER: _scores(done.run.samples, load, config)}
    alone: dict[str, dict[str, Score]] = {phase: {} for phase, *_ in load.phases}
    for prefill in range(1, workers):
        name, fleet = f"{prefill}P {workers - prefill}D", replace(shape, prefill=prefill, decode=workers - prefill)
        on_step(name)
        systems[name] = _scores(simulate(load.jobs, fleet, COSTS, LIMIT_S).run.samples, load, config)
        for phase, begin, end in load.phases:
            on_step(f"{name}, {phase} alone")
            jobs = [replace(job, arrival=job.arrival - begin) for job in load.jobs if begin <= job.arrival < end]
            samples = simulate(jobs, fleet, COSTS, LIMIT_S).run.samples
            alone[phase][name] = Score.of(samples, Slo(config.ttft_s, config.tpot_s))
    return Comparison(load, config, systems, alone, tuple(operator.steps))


def _scores(samples: Sequence[Sample], load: Load, config: AutoscaleConfig) -> dict[str, Score]:
    """For each phase, and under `WHOLE` for all that is counted. A simulation's clock is `WARM_S` ahead of arrivals."""
    slo = Slo(config.ttft_s, config.tpot_s)
    by_phase = {phase: [s for s in samples if begin <= s.start - WARM_S < end] for phase, begin, end in load.phases}
    scores = {phase: Score.of(those, slo) for phase, those in by_phase.items()}
    return scores | {WHOLE: Score.of([s for those in by_phase.values() for s in those], slo)}


def table(done: Comparison) -> Group:
    """For people: a row for each phase, a column for each system; then what the planner did, and why."""
    config = done.config
    grid = Table(
        title=f"{done.load.title}: requests with TTFT <= {config.ttft_s:g} s and TPOT <= {config.tpot_s:g} s",
        title_justify="left",
        caption="alone: the best split for this phase, had there been nothing before it",
    )
    grid.add_column("phase")
    for name in (*done.systems, "best fixed", "alone"):
        grid.add_column(name, justify="right")
    for phase in done.planned:
        best = done.best_fixed(phase)
        row = [f"{scores[phase].both:.1%}" for scores in done.systems.values()]
        alone = f"{done.alone[phase][(name := done.best_alone(phase))].both:.1%} ({name})" if phase != WHOLE else ""
        grid.add_row(phase, *row, f"{done.systems[best][phase].both:.1%} ({best})", alone)
    return Group(grid, *(Text(f"{step.at:6.1f} s  {step.decision.why}") for step in done.changes))


def document(done: Comparison) -> dict[str, Any]:
    """For a result file."""
    plain = {name: {phase: asdict(score) for phase, score in scores.items()} for name, scores in done.systems.items()}
    return {
        "load": done.load.title,
        "requests": len(done.load.jobs),
        "phases": [{"name": name, "begin_s": begin, "end_s": end} for name, begin, end in done.load.phases],
        "systems": plain,
        "best_fixed": {phase: done.best_fixed(phase) for phase in done.planned},
        "alone": {phase: {name: asdict(s) for name, s in scores.items()} for phase, scores in done.alone.items()},
        "planner": [
            {
                "at_s": step.at,
                "prefill": step.decision.prefill,
                "decode": step.decision.decode,
                "why": step.decision.why,
            }
            for step in done.changes
        ],
    }


def draw(path: Path, done: Comparison) -> Path:
    """The split over time, and how often each system kept to the SLOs. Raises `BatonError` where matplotlib is
    missing."""
    whole, axes = figure(2)
    times = [step.at for step in done.steps]
    for colour, label, counts in (
        (INK[0], "prefill", [step.prefill for step in done.steps]),
        (INK[1], "decode", [step.decode for step in done.steps]),
    ):
        axes[0].step(times, counts, where="post", color=colour, label=label)
    for _, begin, _ in done.load.phases:
        axes[0].axvline(begin, color="#888888", lw=0.8, ls=":")
    axes[0].set(xlabel="seconds", ylabel="workers that are ready", ylim=(0, None))
    axes[0].legend(frameon=False, fontsize=8)
    width = 0.8 / len(done.systems)
    phases = list(done.planned)
    for index, (name, scores) in enumerate(done.systems.items()):
        at = [k + (index - (len(done.systems) - 1) / 2) * width for k in range(len(phases))]
        axes[1].bar(at, [scores[phase].both for phase in phases], width, label=name, color=INK[index % len(INK)])
    axes[1].set_xticks(range(len(phases)), [phase.split(":")[0] for phase in phases], fontsize=7)
    axes[1].set(ylabel="share of requests within both SLOs", ylim=(0, 1.05))
    axes[1].legend(frameon=False, fontsize=7)
    whole.suptitle(done.load.title)
    whole.savefig(path, dpi=130)
    return path


def _length(rng: random.Random, mean: int) -> int:
    return max(2, round(rng.gammavariate(4.0, mean / 4.0)))
