"""Each kernel against its roofline: `python -m baton.bench.kernels`, or `baton bench kernels`.

First what the device can do at most, then each kernel on a Llama-3.1-8B's shapes: right, and how near it comes. With
`--sweep`, attention in every configuration of the tables in `sweep.py` as well. Two things run without a GPU:
`--interpret`, the same code on tiny shapes in Triton's interpreter, which proves the code and measures nothing; and
`--compile`, which says what each of those configurations would take of one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..record import write

if TYPE_CHECKING:  # Triton reads TRITON_INTERPRET when it is imported: nothing that imports it may come before
    from .cases import Measured

TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-3}
"""Largest relative error of a kernel that is right, by the type that it computes in."""


def run(interpret: bool, sweep: bool, only: str) -> Iterator[tuple[dict[str, Any], Measured]]:
    """The ceilings, and one case after the other. `only`: those whose kernel's name holds this."""
    import torch

    from .. import ceilings as most
    from . import attention, sampling, small
    from .cases import measure
    from .shapes import LLAMA_8B, TINY
    from .sweep import attention_sweep

    device = torch.device("cpu" if interpret else "cuda")
    shape = TINY if interpret else LLAMA_8B
    found = most.measure(device, shape.dtype, most.TINY if interpret else most.Sizes())
    for source in (attention.cases(shape, device), small.cases(shape, device), sampling.cases(shape, device)):
        for case in source:
            if only in case.kernel:
                yield asdict(found), measure(device, case, found)
            del case  # and with it its inputs, before the next one's are made
    if sweep:
        for measured in attention_sweep(shape, device, found):
            yield asdict(found), measured


def main(arguments: list[str] | None = None) -> int:
    """0 where everything ran and was right; 1 where not, 2 where nothing can be measured here."""
    parser = argparse.ArgumentParser(prog="baton bench kernels", description="Each GPU kernel against its roofline.")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes in Triton's interpreter, on a CPU")
    parser.add_argument("--sweep", action="store_true", help="also every configuration of the attention kernels")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file; default: bench/results")
    parser.add_argument("--compile", action="store_true", help="only compile attention in every configuration; no GPU")
    options = parser.parse_args(arguments)
    if options.compile:
        return compile_all(options.out)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not options.interpret and not torch.cuda.is_available():
        print("baton bench kernels: no CUDA device here; --interpret proves the code without one", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    wrong = []
    for ceilings, measured in run(options.interpret, options.sweep, options.only):
        rows.append(asdict(measured))
        print(line(measured), flush=True)
        if not right(measured, ceilings["dtype"]):
            wrong.append(f"{measured.kernel}, {measured.shape}: error {measured.error}")
        results = {"ceilings": ceilings, "kernels": rows, "wrong": wrong}
        parameters = {"torch": torch.__version__, "interpreted": options.interpret}
        write("kernels", "kernels", results, parameters, options.out)  # after each, so that a run cut short leaves it
    for text in wrong:
        print(f"WRONG: {text}", file=sys.stderr)
    return 1 if wrong or not rows else 0


def compile_all(folder: Path | None) -> int:
    """What attention takes of a Hopper multiprocessor in every configuration. 0 where all compiled."""
    import triton

    from .compiled import configurations

    found: list[dict[str, Any]] = []
    for compiled in configurations():
        found.append(asdict(compiled))
        print(compiled, flush=True)
        write("kernels_compiled", "kernels_compiled", found, {"triton": triton.__version__}, folder)
    return 0


def right(measured: Measured, dtype: str) -> bool:
    """Its error, where it was checked, is that of rounding. NaN is none."""
    return measured.error is None or measured.error <= TOLERANCE[dtype]


def line(measured: Measured) -> str:
    """For people."""
    rate = (
        f"{measured.bytes_per_s / 1e9:8.0f} GB/s"
        if measured.bound == "bytes"
        else (f"{measured.flops_per_s / 1e12:6.0f} TFLOP/s")
    )
    error = "" if measured.error is None else f"  error {measured.error:.1e}"
    what = f"{measured.kernel}, {measured.shape}"
    return f"{what:58} {measured.seconds * 1e6:10.1f} µs {rate:>14} {measured.share:6.1%}{error}  {measured.config}"


if __name__ == "__main__":
    sys.exit(main())
