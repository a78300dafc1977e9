"""From logits to tokens: all greedy, and a mixture of greedy, sampled and filtered rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from ...kernels import sampling, sampling_kernels
from ..timing import sets_beyond_cache
from .cases import Case
from .shapes import Shape

KINDS = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
)
"""Of the rows of a mixture, in turn."""
DRAWN = 5.0
"""Standard deviation of the logits: a few tokens share most of the probability, as in a model's."""


def cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """Both at each batch size. Bytes: the logits once; rows that sample or filter read them again. The mixed kernels
    write into their logits, so they get fresh ones each time, and the bytes of that copy count as well."""
    for batch in shape.sampled:
        yield greedy(shape, device, batch)
        yield mixed(shape, device, batch)


def greedy(shape: Shape, device: torch.device, batch: int) -> Case:
    size = 4 * batch * shape.vocab

    def error() -> float:
        logits = _logits(shape, device, batch)
        return _differ(sampling_kernels.launch_greedy(logits), sampling.greedy(logits.cpu()))

    sets = range(sets_beyond_cache(device, size))
    calls = [partial(sampling_kernels.launch_greedy, _logits(shape, device, batch)) for _ in sets]
    return Case("sampling, greedy", f"{batch} rows", size, 0, calls, error)


def mixed(shape: Shape, device: torch.device, batch: int) -> Case:
    size = 4 * batch * shape.vocab
    spare = torch.empty(batch, shape.vocab, dtype=torch.int32, device=device)
    counts = torch.zeros(1, shape.vocab, dtype=torch.int16, device=device)
    added = torch.zeros(1, dtype=torch.int64, device=device)

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        return _logits(shape, device, batch), _records(batch).to(device)

    def error() -> float:
        logits, records = inputs()
        others = (tensor.cpu().clone() for tensor in (logits, records, added, counts, spare))
        expected = sampling.draw(*others)
        return _differ(sampling_kernels.launch(logits, records, added, counts, spare), expected)

    work = torch.empty(batch, shape.vocab, device=device)

    def call(logits: torch.Tensor, records: torch.Tensor) -> None:
        work.copy_(logits)
        sampling_kernels.launch(work, records, added, counts, spare)

    calls = [partial(call, *inputs()) for _ in range(sets_beyond_cache(device, size))]
    return Case("sampling, mixed", f"{batch} rows", 3 * size, 0, calls, error)


def _logits(shape: Shape, device: torch.device, batch: int) -> torch.Tensor:
    return DRAWN * torch.randn(batch, shape.vocab, device=device)


def _records(batch: int) -> torch.Tensor:
    """[R, 8] int64, a fresh seed in each."""
    records = np.zeros(batch, dtype=sampling.RECORD)
    records["seed"] = np.random.default_rng().integers(0, 1 << 63, batch)
    for name, off in (("top_p", 1.0), ("repetition", 1.0), ("furthest", sampling.FAR), ("slot", -1)):
        records[name] = off
    for index in range(batch):
        for name, value in KINDS[index % len(KINDS)].items():
            records[name][index] = value
    return torch.from_numpy(records.view(np.int64).reshape(batch, -1).copy())


def _differ(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """The share of rows whose token is another one."""
    return float((tokens.cpu() != expected).double().mean())
