"""The runner: executes a plan on the model, on all ranks. One flat batch a step."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from pathlib import Path

import torch

from ..common.config import EngineConfig
from ..common.errors import EngineBroken, EngineFailure, InvalidRequest
from ..common.fingerprint import fingerprint
from ..common.kv_format import KvFormat
from .batch import Batch, row_order
from .batches import Batches
from .checkpoint import weights_digest
from .follower import HERE, MEET, READY, Followers
from .graphs import CudaCapture, Graphs, ladder
from .group import RankGroup
from .kv_pool import KvPool, device_allocator
from .model_config import ModelConfig
from .plan import Launched, OnLayer, Results, StepPlan
from .rank import MakeAllocator, Rank, load_rank, resolve
from .rehearsal import rehearsals
from .sampler import Drawn, Sampler
from .sequence import Sequence
from .shard import shard
from .weights import Progress

log = logging.getLogger(__name__)

RUN = "run"
"""The command that carries one step's `Batch` to the other ranks."""

LOADED = 0.8
"""The share of the start that is reported done once the weights are there."""


class TorchRunner:
    """Implements `plan.Runner` on rank 0, which plans and samples for all. Not thread-safe: it belongs to the engine
    loop.

    drawn     int64, on the device: each step leaves the tokens that it draws there for the next one
    graphs    what computes the steps that it can, if anything; made with the same `drawn`
    rows      sequences that sample in one step, for which the sampler takes memory at once
    """

    def __init__(
        self, rank: Rank, drawn: torch.Tensor, followers: Followers | None = None, graphs: Graphs | None = None,
        rows: int = 0,
    ) -> None:  # fmt: skip
        self.operations = rank.operations
        self._rank = rank
        self._drawn = drawn
        self._followers = followers
        self._graphs = graphs
        self._sampler = Sampler(rank.model_config.eos_ids, rank.model_config.vocab_size, rank.device, rows)
        self._batches = Batches(rank.pool.format.block_size, pinned=rank.device.type == "cuda")
        self._fill = 0  # the size of the graph that computes the step; 0: none does
        self._owners: list[Sequence] = []  # who draws in it, in the order of the rows of `drawn`
        self._rows: dict[Sequence, int] = {}  # these rows
        self._out = drawn[:0]  # and they themselves

    def launch(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Launched:
        """See `plan.Runner.launch`. Raises `EngineFailure` where torch fails (out of memory, a broken device), and
        `EngineBroken` where there are other ranks: after a failure they no longer stand at the same place."""
        try:
            batch, ends = self._batches.carry_on(plan), None
            if batch is None:
                batch, ends = self._begin(plan)
            if self._followers is not None:
                if batch.pending:  # other ranks have not seen what was drawn
                    batch.complete(self._drawn.tolist())
                self._followers.send(RUN, *batch.pack())
            with torch.inference_mode():
                if self._graphs and self._fill:
                    logits = self._graphs.run(batch, len(self._owners))
                    self._all_layers(on_layer)
                else:
                    logits = self._rank.forward(batch, self._drawn, on_layer)
                if ends is None:
                    drawn = self._sampler.sample_on(logits, self._out)
                else:
                    drawn = self._sampler.sample(logits, self._owners, ends, self._out)
        except (RuntimeError, IndexError) as error:
            self._batches.forget()
            why = f"step of {plan.tokens} tokens failed: {error}"
            if self._followers is None:
                raise EngineFailure(why) from error
            self._followers.lose(why)
            raise EngineBroken(why) from error
        if not plan.slices:
            return _Step(drawn, range(len(plan)))
        rows = [self._rows[part.sequence] if part.samples else None for part in plan.slices]
        return _Step(drawn, [*range(len(plan.decodes)), *rows])

    def _begin(self, plan: StepPlan) -> tuple[Batch, list[int]]:
        """The batch of a step that does not go on from the one before, and where the tokens that it draws will be."""
        self._fill = self._graphs.size_for(plan) if self._graphs else 0
        batch = self._batches.make(plan, self._rows, self._fill)
        sampling = [part for part in row_order(plan.slices) if part.samples]
        owners = plan.decodes + [part.sequence for part in sampling]
        if owners != self._owners:
            self._owners, self._rows = owners, {owner: row for row, owner in enumerate(owners)}
            self._out = self._drawn[: len(owners)]
        return batch, [start + 1 for start in plan.starts] + [part.end for part in sampling]

    def _all_layers(self, on_layer: OnLayer | None) -> None:
        """A graph does not stop for anybody: KV of all its layers is on its way at once."""
        if on_layer is not None:
            for layer in range(self._rank.model_config.num_layers):
                on_layer(layer)


@dataclass(frozen=True, slots=True)
class _Step:
    """Implements `plan.Launched`. `rows`: of `drawn`, in the order of the plan; None for what samples nothing."""

    drawn: Drawn
    rows: Listing[int | None]

    def results(self) -> Results:
        """See `plan.Launched.results`. Raises `EngineBroken`: where a device fails at what it was given, or does not
        end it, nobody knows what it still does."""
        try:
            return self.drawn.results().pick(self.rows)
        except EngineFailure as error:
            raise EngineBroken(error.message) from error


@dataclass(frozen=True, slots=True)
class Engine:
    """What `build_engine` makes: all that a worker needs to know of the compute side."""

    runner: TorchRunner
    pool: KvPool
    format: KvFormat
    model_config: ModelConfig
    eos_ids: frozenset[int]
    fingerprint: str
    vocab_size: int
    max_model_len: int
    num_blocks: int


def build_engine(
    config: EngineConfig,
    progress: Progress,
    allocator: MakeAllocator = device_allocator,
    followers: Followers | None = None,
) -> Engine:
    """Load the model, make the pool, record the graphs and run steps of each kind, so that the first request finds all
    warm.

    With `config.tp` above 1 this is rank 0, and `followers` its line to the others, which load at the same time. Sets
    the process's number of torch threads, and on CUDA the stream of the thread that calls, which shall launch the
    steps. Raises `InvalidRequest` where the model or the memory does not fit, `EngineBroken` where another rank is
    lost.
    """
    if (followers is None) != (config.tp == 1):
        raise InvalidRequest("an engine with tensor parallelism, and none other, has followers", param="tp")
    begin = time.monotonic()
    group = None if followers is None else _join(config, followers)
    rank = load_rank(config, lambda share: progress(LOADED * share), allocator, group)
    digest = "dummy" if config.dummy_weights else weights_digest(Path(config.model))
    if followers is not None:
        followers.wait_for(READY)
    drawn = torch.zeros(config.max_batch_tokens, dtype=torch.int64, device=rank.device)
    graphs, most = None, min(config.max_running, config.max_batch_tokens)
    if rank.graphed:
        sizes = ladder(most)
        graphs = Graphs(rank, sizes, drawn, CudaCapture(), lambda share: progress(LOADED + (1 - LOADED) * share))
    runner = TorchRunner(rank, drawn, followers, graphs, most if rank.device.type == "cuda" else 0)
    num_blocks = rank.pool.num_blocks
    batches = ladder(most) if rank.device.type == "cuda" else []
    for plan in rehearsals(config, rank.longest, num_blocks, batches):
        runner.launch(plan).results()
    progress(1.0)
    log.info(
        "model %s: %s on %s, %d rank(s), operations %s, %d graphs, %d blocks of %d tokens, ready in %.1f s",
        *(
            Path(config.model).name,
            rank.dtype,
            rank.device.type,
            config.tp,
            rank.operations,
            graphs.count if graphs else 0,
        ),
        *(num_blocks, config.block_size, time.monotonic() - begin),
    )
    return Engine(
        runner=runner,
        pool=rank.pool,
        format=rank.pool.format,
        model_config=rank.model_config,
        eos_ids=rank.model_config.eos_ids,
        # The number of ranks is no part of it unless bits count: workers with different ones hand over to each other.
        fingerprint=fingerprint({"weights": digest, "dtype": str(rank.dtype), "numerics": rank.operations}),
        vocab_size=rank.model_config.vocab_size,
        max_model_len=rank.longest,
        num_blocks=num_blocks,
    )


def _join(config: EngineConfig, followers: Followers) -> RankGroup:
    """Rank 0's membership, made once all others run."""
    device, _ = resolve(config)
    shard(ModelConfig.load(Path(config.model)), config.tp)  # refuses what does not divide before it waits for anybody
    followers.wait_for(HERE)
    followers.send(MEET)
    try:
        return RankGroup(followers.meeting, 0, config.tp, device, followers.timeout_s)
    except RuntimeError as error:
        raise EngineBroken(f"the {config.tp} ranks do not find each other: {error}") from error
