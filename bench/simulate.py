"""The house in virtual time: the real router core, engine loops, planners, block managers and handovers, with a model
that only costs seconds.

What production runs on threads and sockets runs here from one heap of events, because none of those parts does I/O or
reads a clock of its own. The same seed gives the same run, to the last event.

    arrivals ─▶ RouterCore ─messages, delayed─▶ EngineLoop and roles ─reports, delayed─▶ RouterCore
                                                 (steps cost time, and KV takes time on the wire)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..common.config import RouterConfig
from ..common.errors import BatonError
from ..common.messages import CheckReport, StepReport
from ..common.types import Request, Role, SamplingParams
from ..engine.role import Limits
from ..router.core import RouterCore
from ..router.request import Finish, RequestState
from ..router.stats import Snapshot
from .client import Sample
from .load import Run
from .virtual import ROUTER, VOCABULARY, Costs, SimWorker, World, sim_info
from .workload import Job

ROUTER_TICK_S = 0.05
DEADLINE_S = 86_400.0
QUIET_S = 2.0
"""Virtual time after the last answer in which everything has to come back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A fleet, all of one model."""

    prefill: int = 1
    decode: int = 1
    colocated: int = 0
    num_blocks: int = 4096
    block_size: int = 16
    max_batch_tokens: int = 512
    max_running: int = 64
    max_model_len: int = 8192

    def members(self) -> list[tuple[str, Role]]:
        """Names and roles, as `baton serve` gives them."""
        counts = {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.COLOCATED: self.colocated}
        return [(f"{role}-{index}", role) for role, number in counts.items() for index in range(number)]


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came of it: samples as a client would have taken them, in order of arrival; the output of request i under
    `r{i}`; and the books at the end."""

    run: Run
    outputs: dict[str, list[int]]
    books: dict[str, CheckReport]
    router: Snapshot


class Simulation:
    """One fleet behind one router. `simulate` is its whole life."""

    def __init__(self, shape: Shape, costs: Costs) -> None:
        self._world = World()
        self._costs = costs
        # A simulated client waits for its turn; being turned away is the gateway's business.
        self._core = RouterCore(
            RouterConfig(max_requests=1 << 30, max_attempts=1 << 30, place_timeout_s=DEADLINE_S), ROUTER
        )
        self._workers: dict[str, SimWorker] = {}
        self._samples: dict[RequestState, Sample] = {}
        self._refused: list[Sample] = []
        self._open = 0  # requests that have not got their final word, those still to come included
        limits = Limits(
            vocab_size=VOCABULARY, eos_ids=frozenset(), max_model_len=shape.max_model_len,
            max_batch_tokens=shape.max_batch_tokens, max_running=shape.max_running, max_waiting=1 << 30,
        )  # fmt: skip
        for epoch, (name, role) in enumerate(shape.members(), start=1):
            info = sim_info(name, role, epoch, shape.num_blocks, shape.block_size, shape.max_model_len, costs)
            self._workers[name] = SimWorker(self._world, costs, info, limits, self._workers, self._report)
            self._core.worker_up(info, 0.0)
        self._world.every(ROUTER_TICK_S, self._tick)

    def run(self, jobs: Sequence[Job], limit_s: float) -> Simulated:
        """Serve the jobs at their arrivals. Raises `TimeoutError` where that takes more virtual time than `limit_s`."""
        world, self._open = self._world, len(jobs)
        warm = 2 * self._costs.message_s  # the workers' first words have to arrive
        for number, job in enumerate(jobs):
            world.at(job.arrival + warm, lambda number=number, job=job: self._submit(number, job))  # type: ignore[misc]
        world.run(lambda: self._open == 0, limit_s)
        wall = world.now - warm
        rest = world.now + QUIET_S
        world.run(lambda: world.now >= rest, rest + 1)
        samples = sorted([*self._samples.values(), *self._refused], key=lambda sample: sample.start)
        books = {name: worker.loop.inspect() for name, worker in self._workers.items()}
        outputs = {state.request.request_id: state.output for state in self._samples}
        return Simulated(Run(samples, wall), outputs, books, self._core.snapshot())

    def _submit(self, number: int, job: Job) -> None:
        assert not isinstance(job.prompt, str), "the simulator has no tokenizer"
        params = SamplingParams(max_tokens=job.output_len, temperature=0.0, ignore_eos=True)
        request = Request(f"r{number}", job.prompt, len(job.prompt), params, deadline_s=DEADLINE_S)
        sample = Sample(start=self._world.now, prompt_tokens=len(job.prompt))
        try:
            self._samples[self._core.submit(request, self._world.now)] = sample
        except BatonError as error:
            sample.end, sample.error = self._world.now, error.code
            self._refused.append(sample)
            self._open -= 1
        self._pump()

    def _report(self, name: str, report: StepReport) -> None:
        self._core.on_report(name, report, self._world.now)
        self._pump()

    def _tick(self) -> None:
        self._core.tick(self._world.now)
        self._pump()

    def _pump(self) -> None:
        """Do what the router core asks for."""
        effects = self._core.drain()
        now = self._world.now
        for name, message in effects.sends:
            worker = self._workers[name]
            self._world.at(now + self._costs.message_s, lambda w=worker, m=message: w.receive(m))  # type: ignore[misc]
        for state in effects.news:
            self._read(state, self._samples[state], now)

    def _read(self, state: RequestState, sample: Sample, now: float) -> None:
        try:
            batch = state.take()
        except BatonError as error:
            sample.end, sample.error = now, error.code
            self._open -= 1
            return
        sample.events += [now] * len(batch.tokens)
        sample.tokens += len(batch.tokens)
        if isinstance(batch.finish, Finish):
            sample.end, sample.cached_tokens = now, batch.finish.usage.cached_tokens
            self._open -= 1


def simulate(jobs: Sequence[Job], shape: Shape, costs: Costs | None = None, limit_s: float = DEADLINE_S) -> Simulated:
    """Serve `jobs` on a fleet of `shape` in virtual time. Raises `TimeoutError` where it is not done by `limit_s`."""
    return Simulation(shape, costs or Costs()).run(jobs, limit_s)
