"""One kernel on one shape: the fewest bytes and operations it takes, whether it is right, and how near it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..ceilings import Ceilings
from ..timing import Call, median_s


@dataclass(frozen=True, slots=True)
class Case:
    """`calls`: the same work on several sets of inputs. `bytes`: of one call, each input read once and each output
    written once; `flops`: of its matrix products. `error`: runs it on fresh random data with a poisoned output and
    returns ‖out − reference‖ / ‖reference‖, NaN where something was not written."""

    kernel: str
    shape: str
    bytes: int
    flops: int
    calls: Sequence[Call]
    error: Callable[[], float] | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """`share`: the roofline's time, which is the longer of bytes over the rate of a copy and FLOPs over the rate of a
    large product, over the time that it took. `bound`: which of the two it is. `error` None: checked on another shape.
    `config`: of a sweep."""

    kernel: str
    shape: str
    seconds: float
    bound: str
    bytes_per_s: float
    flops_per_s: float
    share: float
    error: float | None
    config: str = ""


def measure(device: torch.device, case: Case, ceilings: Ceilings, config: str = "") -> Measured:
    """Check, then time."""
    error = None if case.error is None else case.error()
    seconds = median_s(device, case.calls, *((7, 2) if device.type == "cuda" else (1, 0)))
    by_bytes, by_flops = case.bytes / ceilings.copy, case.flops / ceilings.product
    bound = "bytes" if by_bytes >= by_flops else "flops"
    share = max(by_bytes, by_flops) / seconds
    rates = case.bytes / seconds, case.flops / seconds
    return Measured(case.kernel, case.shape, seconds, bound, *rates, share, error, config)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """In float64. NaN where `out` has one."""
    wide, expected = out.double(), reference.double()
    return float((wide - expected).norm() / expected.norm())
