"""A device that computes nothing, as its host sees it: steps that take their time, one after the other.

With it, what a worker's Python costs is measured on any machine. The loop, the roles, the block table, the arrays of a
step and the lines to routers are the real ones; only the forward pass is not there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch

from ...common.kv_format import KvFormat
from ...engine.batch import Batch, Inputs
from ...engine.batches import Batches
from ...engine.graphs import Graphs, ladder
from ...engine.plan import Launched, OnLayer, Results, StepPlan
from ...engine.rank import Rank
from ...engine.runner import TorchRunner
from ...engine.sampler import Sampler
from ...kernels import sampling
from ..quantiles import Quantiles

FORMAT = KvFormat(num_layers=1, num_kv_heads=1, head_dim=1, block_size=16, dtype="int8")
"""As little KV as there can be."""
VOCAB, EOS = 8, 2
"""As few logits; all are alike, so that every row draws the first token."""
LONGEST = 8192
MAX_BATCH_TOKENS = 8192
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

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, as a part. No context manager: after a wait that would cost as much as a small part."""

        def measured(*args: Any) -> Any:
            self.turn()
            self._open.append(name)
            try:
                return call(*args)
            finally:
                self.turn()
                self._open.pop()

        return measured

    def turn(self) -> float:
        """Count the time up to now, which it returns."""
        now = time.perf_counter()
        self.spent[self._open[-1]] = self.spent.get(self._open[-1], 0.0) + now - self._since
        self._since = now
        return now


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen in `steps` steps of one batch size, in seconds. `python` is what one step takes the loop's thread
    but for its waiting for the device; `parts` is all wall time of that thread, "device" that in which it waited;
    `loop_cpu_s` its processor time, `other_cpu_s` that of all others."""

    steps: int
    seconds: float
    python: Quantiles
    busy_s: float
    idle_s: float
    loop_cpu_s: float
    other_cpu_s: float
    parts: dict[str, float]

    @property
    def idle_share(self) -> float:
        return self.idle_s / (self.idle_s + self.busy_s)


@dataclass(frozen=True, slots=True)
class _Clocks:
    """`wall`: when the watch last counted, so that its parts add up to what lies between two of these."""

    wall: float
    thread: float = field(default_factory=time.thread_time)
    process: float = field(default_factory=time.process_time)


class StandinRank:
    """What runner and graphs ask of an `engine.rank.Rank`, with no model in it: every row's logits are alike."""

    operations, dtype, device = "standin", torch.float32, torch.device("cpu")
    model_config = SimpleNamespace(eos_ids=frozenset({EOS}), num_layers=1, vocab_size=VOCAB)
    pool = SimpleNamespace(format=FORMAT)
    longest = LONGEST

    def compute(self, inputs: Inputs, *_: object, into: torch.Tensor | None = None) -> torch.Tensor:
        return torch.zeros(len(inputs.wanted), VOCAB) if into is None else into

    def forward(self, batch: Batch, *_: object) -> torch.Tensor:
        return self.compute(batch.on(self.device))


def _recorded(work: Callable[[], None]) -> Callable[[], None]:
    """A graph of nothing. Implements `engine.graphs.Capture`."""
    return lambda: None


def _draws_nothing(
    logits: torch.Tensor, records: torch.Tensor, added: torch.Tensor, counts: torch.Tensor, spare: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """In place of `kernels.sampling.draw`: leaves the zeros that are there."""
    return out


@contextmanager
def no_kernels(watch: Watch) -> Iterator[None]:
    """Meanwhile nobody samples, and what the runner does in Python is counted as parts of a step."""
    with (
        patch.object(sampling, "draw", _draws_nothing),
        patch.object(Batches, "make", watch.around("batch", Batches.make)),
        patch.object(Batches, "carry_on", watch.around("batch", Batches.carry_on)),
        patch.object(Sampler, "sample", watch.around("sampling", Sampler.sample)),
        patch.object(Sampler, "sample_on", watch.around("sampling", Sampler.sample_on)),
    ):
        yield


def _runner(batch: int) -> TorchRunner:
    """The real runner with its graphs, over no model."""
    rank, drawn = cast(Rank, StandinRank()), torch.zeros(MAX_BATCH_TOKENS, dtype=torch.int64)
    graphs = Graphs(rank, ladder(batch), drawn, _recorded, lambda _: None)
    return TorchRunner(rank, drawn, None, graphs)


@dataclass(frozen=True, slots=True)
class StandinStep:
    """Implements `engine.plan.Launched`: `step` is through on the device at `end`."""

    step: Launched
    end: float
    watch: Watch

    def results(self) -> Results:
        self.watch.around("device", time.sleep)(max(0.0, self.end - time.perf_counter()))
        return self.step.results()


class StandinDevice:
    """Implements `engine.plan.Runner` over one that has nothing to compute. Steps that decode `batch` requests take
    `step_s` on the device; after `skip` of them, `steps` are measured, and `on_done` is called with their `Window`, on
    the loop's thread."""

    def __init__(self, batch: int, step_s: float, skip: int, steps: int, on_done: Callable[[Window], None]) -> None:
        self.watch = Watch()
        self._runner = _runner(batch)
        self._stream = Stream()
        self._batch, self._step_s = batch, step_s
        self._skip, self._steps, self._on_done = skip, steps, on_done
        self._seen = 0
        self._begin = _Clocks(0.0)
        self._python: list[float] = []  # up to each step of the window, since its begin

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StandinStep:
        """See `engine.plan.Runner.launch`."""
        steady = len(plan.decodes) == plan.tokens == self._batch
        if steady:
            self._count()
        step = self._runner.launch(plan, on_layer)
        end = self._stream.launch(self._step_s if steady else PREFILL_STEP_S)
        return StandinStep(step, end, self.watch)

    def _count(self) -> None:
        now, spent = self.watch.turn(), self.watch.spent
        self._python.append(sum(spent.values()) - spent.get("device", 0.0))
        if self._seen == self._skip:
            spent.clear()
            self._python = [0.0]
            self._stream.busy_s = self._stream.idle_s = 0.0
            self._begin = _Clocks(now)
        elif self._seen == self._skip + self._steps:
            self._on_done(self._window(self._begin, _Clocks(now)))
        self._seen += 1

    def _window(self, begin: _Clocks, end: _Clocks) -> Window:
        cpu = end.thread - begin.thread
        return Window(
            steps=self._steps, seconds=end.wall - begin.wall, python=Quantiles.of(np.diff(self._python)),
            busy_s=self._stream.busy_s, idle_s=self._stream.idle_s, loop_cpu_s=cpu,
            other_cpu_s=end.process - begin.process - cpu, parts=dict(self.watch.spent),
        )  # fmt: skip
