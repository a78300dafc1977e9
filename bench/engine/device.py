"""A device that computes nothing, as its host sees it: steps that take their time, one after the other.

With it, what a worker's Python costs is measured on any machine. The loop, the roles, the block table, the arrays of a
step and the lines to routers are the real ones; only the forward pass is not there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ...engine.batch import Batch
from ...engine.plan import OnLayer, Sampled, Slice, StepPlan
from ...engine.sequence import Sequence as Owner

BLOCK_SIZE = 16
DRAWN = Sampled(7)
PREFILL_STEP_S = 2e-3
"""A step with prompts in it. Only steps without them are measured."""


class Stream:
    """What is launched begins when all before it has ended, as on a CUDA stream. All in seconds.

    A calculation rather than a thread that sleeps: at the end of each step a thread would wait for the interpreter's
    lock, and no device does.
    """

    def __init__(self) -> None:
        self.busy_s = self.idle_s = 0.0
        self._end = time.perf_counter()

    def launch(self, seconds: float) -> float:
        """Returns when it will have ended, on `time.perf_counter`."""
        begin = max(time.perf_counter(), self._end)
        self.idle_s += begin - self._end
        self.busy_s += seconds
        self._end = begin + seconds
        return self._end


class Watch:
    """Where one thread's time goes: each moment counts for the part that was opened last and is still open."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._open = ["rest"]
        self._since = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.turn()
        self._open.append(name)
        try:
            yield
        finally:
            self.turn()
            self._open.pop()

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, as a part."""

        def measured(*args: Any) -> Any:
            with self.part(name):
                return call(*args)

        return measured

    def turn(self) -> None:
        """Count the time up to now."""
        now = time.perf_counter()
        self.spent[self._open[-1]] = self.spent.get(self._open[-1], 0.0) + now - self._since
        self._since = now


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen in `steps` steps of one batch size, in seconds. `parts` is the wall time of the loop's thread,
    "device" that in which it waited for a step; `loop_cpu_s` its processor time, `other_cpu_s` that of all others."""

    steps: int
    seconds: float
    busy_s: float
    idle_s: float
    loop_cpu_s: float
    other_cpu_s: float
    parts: dict[str, float]

    @property
    def python_s(self) -> float:
        """Of one step: all that the loop's thread does but wait for the device."""
        return (self.seconds - self.parts["device"]) / self.steps

    @property
    def idle_share(self) -> float:
        return self.idle_s / (self.idle_s + self.busy_s)


@dataclass(frozen=True, slots=True)
class _Clocks:
    wall: float = field(default_factory=time.perf_counter)
    thread: float = field(default_factory=time.thread_time)
    process: float = field(default_factory=time.process_time)


@dataclass(frozen=True, slots=True)
class StandinStep:
    """Implements `engine.plan.Launched`."""

    slices: Sequence[Slice]
    end: float
    watch: Watch

    def results(self) -> list[Sampled | None]:
        with self.watch.part("device"):
            time.sleep(max(0.0, self.end - time.perf_counter()))
        return [DRAWN if part.samples else None for part in self.slices]


class StandinRunner:
    """Implements `engine.plan.Runner`. Steps that decode `batch` requests take `step_s` on the device; after `skip` of
    them, `steps` are measured, and `on_done` is called with their `Window`, on the loop's thread."""

    def __init__(self, batch: int, step_s: float, skip: int, steps: int, on_done: Callable[[Window], None]) -> None:
        self.watch = Watch()
        self._stream = Stream()
        self._batch, self._step_s = batch, step_s
        self._skip, self._steps, self._on_done = skip, steps, on_done
        self._seen = 0
        self._begin = _Clocks()
        self._rows: dict[Owner, int] = {}

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StandinStep:
        """See `engine.plan.Runner.launch`."""
        slices = plan.slices
        steady = len(slices) == plan.tokens == self._batch
        if steady:
            self._count()
        with self.watch.part("batch"):
            order = sorted(range(len(slices)), key=lambda i: slices[i].count != 1)
            Batch.of([slices[i] for i in order], BLOCK_SIZE, self._rows)
            self._rows = {slices[i].sequence: row for row, i in enumerate(i for i in order if slices[i].samples)}
        with self.watch.part("launch"):
            end = self._stream.launch(self._step_s if steady else PREFILL_STEP_S)
        if on_layer is not None:
            on_layer(0)
        return StandinStep(slices, end, self.watch)

    def _count(self) -> None:
        self.watch.turn()
        if self._seen == self._skip:
            self.watch.spent.clear()
            self._stream.busy_s = self._stream.idle_s = 0.0
            self._begin = _Clocks()
        elif self._seen == self._skip + self._steps:
            self._on_done(self._window(self._begin, _Clocks()))
        self._seen += 1

    def _window(self, begin: _Clocks, end: _Clocks) -> Window:
        cpu = end.thread - begin.thread
        return Window(
            steps=self._steps, seconds=end.wall - begin.wall, busy_s=self._stream.busy_s, idle_s=self._stream.idle_s,
            loop_cpu_s=cpu, other_cpu_s=end.process - begin.process - cpu, parts=dict(self.watch.spent),
        )  # fmt: skip
