"""Decode steps as CUDA graphs: what a step launches is recorded once for each size of batch, and then started as one.

A decode step of a small model is over sooner than Python can launch its kernels one by one. A graph repeats the very
same launches on the very same memory, so its inputs lie in buffers that never move, its shapes are fixed, and whatever
depends on lengths is read by the kernels from the device. A batch is filled up to the next size on the ladder with
empty rows, which store nothing and which nobody reads.

Only for a worker of one rank: sums over ranks would have to be recorded with the rest, on all ranks alike.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from .batch import Batch, Inputs, Layout, inputs
from .batches import ROOM
from .plan import StepPlan
from .weights import Progress

if TYPE_CHECKING:
    from .rank import Rank

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function launches, and returns what repeats it."""


def ladder(most: int) -> list[int]:
    """Batch sizes up to `most`, which is the last: close together where a row more is much, further apart above. The
    rows in excess cost little: a step's time is that of reading weights and KV."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most, 64)]
    return [size for size in steps if size < most] + [most]


class CudaCapture:
    """Implements `Capture`. All graphs share one pool of memory: they run one after the other."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            work()
        return graph.replay


class Graphs:
    """The graphs of one rank's model over its pool, for steps in which every sequence has one row and samples.

    `drawn` [any] int64 is where the step before leaves its tokens. The logits [rows, V] float32 that a step returns are
    overwritten by the next one.
    """

    def __init__(
        self, rank: Rank, sizes: Sequence[int], drawn: torch.Tensor, capture: Capture, progress: Progress
    ) -> None:
        """Records each size, from the largest down, so that the smaller find their memory in the pool. Each is
        computed once before: kernels are compiled and libraries take their workspace then, not while recording."""
        self._sizes = sorted(sizes)
        most, format = self._sizes[-1], rank.pool.format
        self._most_blocks = most * -(-rank.longest // format.block_size)
        self._room = self._most_blocks + most * ROOM
        size = Layout(most, most, most, self._room).size
        self._data = self._fetched = torch.zeros(size, dtype=torch.uint8, device=rank.device)
        logits = torch.zeros(most, rank.model_config.vocab_size, dtype=torch.float32, device=rank.device)
        self._logits = [logits[:count] for count in range(most + 1)]
        self._replay: dict[int, Callable[[], None]] = {}
        for index, count in enumerate(reversed(self._sizes)):
            self._data.zero_()
            rows = self._inputs(count)
            rows.rows.slots.fill_(-1)
            rows.rows.starts.copy_(torch.arange(count + 1))
            rows.wanted.copy_(torch.arange(count))

            def work(rows: Inputs = rows, count: int = count) -> None:
                rank.compute(rows, drawn, into=self._logits[count])

            work()
            self._replay[count] = capture(work)
            progress((index + 1) / len(self._sizes))

    @property
    def count(self) -> int:
        return len(self._sizes)

    def size_for(self, plan: StepPlan) -> int:
        """The size of the graph that computes this step; 0: none does."""
        count = len(plan.decodes)
        if plan.slices or count > self._sizes[-1] or sum([len(s.blocks) for s in plan.decodes]) > self._most_blocks:
            return 0
        return self._sizes[bisect_left(self._sizes, count)]

    def run(self, batch: Batch, rows: int) -> torch.Tensor:
        """Logits [rows, V] of the first rows of a batch that was filled up to `size_for`."""
        if len(self._fetched) != len(batch.data):
            self._fetched = self._data[: len(batch.data)]
        self._fetched.copy_(batch.data, non_blocking=True)
        self._replay[batch.layout.rows]()
        return self._logits[rows]

    def _inputs(self, count: int) -> Inputs:
        layout = Layout(count, count, count, self._room)
        return inputs(layout, self._data, count, tuple(range(count + 1)), (0,) * count)
