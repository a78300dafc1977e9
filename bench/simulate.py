"""The house in virtual time: the real router core, engine loops, planners, block managers and handovers, with a model
that only costs seconds.

What production runs on threads and sockets runs here from one heap of events, because none of those parts does I/O or
reads a clock of its own. The same seed gives the same run, to the last event.

    arrivals ─▶ RouterCore ─messages, delayed─▶ EngineLoop and roles ─reports, delayed─▶ RouterCore
                                                 (steps cost time, and KV takes time on the wire)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..common.config import RouterConfig
from ..common.errors import BatonError, WorkerLost, WrongRole
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
RECONNECT_S = 0.1
"""After this time a router whose line to a worker broke has another."""
EMPTY_S = 0.05
"""How often it is looked whether a worker that leaves is empty."""
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
    """One fleet behind one router; workers may join, turn and leave while it runs. `simulate` is the life of one that
    stays as it is."""

    def __init__(self, shape: Shape, costs: Costs) -> None:
        self.world = World()
        self.workers: dict[str, SimWorker] = {}
        """All that ever joined."""
        self._states: dict[RequestState, Sample] = {}
        self._shape, self._costs = shape, costs
        # A simulated client waits for its turn; being turned away is the gateway's business.
        self._core = RouterCore(
            RouterConfig(max_requests=1 << 30, max_attempts=1 << 30, place_timeout_s=DEADLINE_S), ROUTER
        )
        self._leaving: set[str] = set()
        self._refused: list[Sample] = []
        self._open = 0  # requests that have not got their final word, those still to come included
        for name, role in shape.members():
            self.join(name, role)
        self.world.every(ROUTER_TICK_S, self._tick)

    # --- the fleet ---

    def join(self, name: str, role: Role) -> None:
        """A worker of this name, which is new, is there and has loaded."""
        shape, costs, epoch = self._shape, self._costs, len(self.workers) + 1
        limits = Limits(
            vocab_size=VOCABULARY, eos_ids=frozenset(), max_model_len=shape.max_model_len,
            max_batch_tokens=shape.max_batch_tokens, max_running=shape.max_running, max_waiting=1 << 30,
        )  # fmt: skip
        info = sim_info(name, role, epoch, shape.num_blocks, shape.block_size, shape.max_model_len, costs)
        self.workers[name] = SimWorker(self.world, costs, info, limits, self.workers, self._report)
        self._core.worker_up(info, self.world.now)

    def turn(self, name: str, role: Role, done: Callable[[], None]) -> None:
        """Give a worker another role as soon as what it has ran elsewhere or has ended. `done`: turned, or not in
        time, and as it was."""
        worker = self.workers[name]

        def back() -> None:
            self._leave(name, False)
            self._core.worker_up(worker.info, self.world.now)
            worker.joined()
            done()

        def turned(ok: bool) -> None:
            if ok:
                self._core.worker_lost(name, WrongRole("it was turned"), self.world.now)
                self.world.at(self.world.now + RECONNECT_S, back)
            else:
                self._leave(name, False)
                done()

        self._leave(name, True)
        worker.turn(role, turned)

    def end(self, name: str, done: Callable[[], None]) -> None:
        """Let a worker go as soon as it is empty."""
        self._leave(name, True)

        def look() -> None:
            books = self.workers[name].loop.inspect()
            if books.sequences or books.handovers or books.pinned_blocks:
                self.world.at(self.world.now + EMPTY_S, look)
                return
            self.workers[name].end()
            self._core.worker_lost(name, WorkerLost("it has ended"), self.world.now)
            self._leave(name, False)
            done()

        self.world.at(self.world.now + EMPTY_S, look)

    def _leave(self, name: str, leaving: bool) -> None:
        (self._leaving.add if leaving else self._leaving.discard)(name)
        self._core.set_draining((), self._leaving)

    # --- the requests ---

    def run(self, jobs: Sequence[Job], limit_s: float) -> Simulated:
        """Serve the jobs at their arrivals. Raises `TimeoutError` where that takes more virtual time than `limit_s`."""
        world, self._open = self.world, len(jobs)
        warm = 2 * self._costs.message_s  # the workers' first words have to arrive
        for number, job in enumerate(jobs):
            world.at(job.arrival + warm, lambda number=number, job=job: self._submit(number, job))  # type: ignore[misc]
        world.run(lambda: self._open == 0, limit_s)
        wall = world.now - warm
        rest = world.now + QUIET_S
        world.run(lambda: world.now >= rest, rest + 1)
        samples = sorted([*self._states.values(), *self._refused], key=lambda sample: sample.start)
        books = {name: worker.loop.inspect() for name, worker in self.workers.items()}
        outputs = {state.request.request_id: state.output for state in self._states}
        return Simulated(Run(samples, wall), outputs, books, self._core.snapshot())

    def snapshot(self) -> Snapshot:
        """The router's books now."""
        return self._core.snapshot()

    def _submit(self, number: int, job: Job) -> None:
        assert not isinstance(job.prompt, str), "the simulator has no tokenizer"
        params = SamplingParams(max_tokens=job.output_len, temperature=0.0, ignore_eos=True)
        request = Request(f"r{number}", job.prompt, len(job.prompt), params, deadline_s=DEADLINE_S)
        sample = Sample(start=self.world.now, prompt_tokens=len(job.prompt))
        try:
            self._states[self._core.submit(request, self.world.now)] = sample
        except BatonError as error:
            sample.end, sample.error = self.world.now, error.code
            self._refused.append(sample)
            self._open -= 1
        self._pump()

    def _report(self, name: str, report: StepReport) -> None:
        self._core.on_report(name, report, self.world.now)
        self._pump()

    def _tick(self) -> None:
        self._core.tick(self.world.now)
        self._pump()

    def _pump(self) -> None:
        """Do what the router core asks for."""
        effects = self._core.drain()
        for name, message in effects.sends:
            self.workers[name].send(message)
        for state in effects.news:
            self._read(state, self._states[state], self.world.now)

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
