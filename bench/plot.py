"""Plots. matplotlib is an extra: without it, `draw_load` says how to get it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import BatonError
from .load import Run
from .report import Summary

INK = ("#3b6ea5", "#c8553d", "#5a8f4e", "#8a5fa8", "#c79a2b", "#4a4a4a")


def figure(columns: int) -> Any:
    """An empty figure and its axes, side by side. Raises `BatonError` where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise BatonError("plots need matplotlib: pip install 'baton[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole, axes = pyplot.subplots(1, columns, figsize=(4.6 * columns, 3.8), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return whole, axes[0]


def _cdf(axis: Any, values: Iterable[float], label: str, colour: str) -> None:
    data = np.sort(np.fromiter(values, dtype=float)) * 1e3
    data = np.maximum(data, 0.01)  # events that arrived together have no place on a logarithmic axis
    if data.size:
        axis.step(data, np.arange(1, data.size + 1) / data.size, where="post", label=label, color=colour)


def draw_load(path: Path, runs: Sequence[tuple[Summary, Run]], title: str) -> Path:
    """CDFs of TTFT, ITL and end-to-end latency, a line for each run, and output tokens/s of each run.
    Raises `RuntimeError` where matplotlib is missing."""
    whole, axes = figure(4)
    for index, (summary, run) in enumerate(runs):
        good = [sample for sample in run.samples if not sample.error]
        colour = INK[index % len(INK)]
        _cdf(axes[0], (sample.ttft for sample in good), summary.label, colour)
        _cdf(axes[1], (gap for sample in good for gap in sample.itl), summary.label, colour)
        _cdf(axes[2], (sample.e2e for sample in good), summary.label, colour)
    for axis, name in zip(axes, ("TTFT", "ITL", "end to end"), strict=False):
        axis.set(
            xlabel=f"{name} (ms)", ylabel="share of requests" if name != "ITL" else "share of gaps", ylim=(0, 1.02)
        )
        axis.set_xscale("log")
    axes[0].legend(frameon=False, fontsize=8)
    axes[3].bar([s.label for s, _ in runs], [s.output_tokens_per_s for s, _ in runs], color=INK[0], width=0.6)
    axes[3].set(ylabel="output tokens/s")
    axes[3].tick_params(axis="x", labelrotation=20)
    whole.suptitle(title)
    whole.savefig(path, dpi=130)
    return path


def draw_comparison(
    path: Path, systems: Mapping[str, Mapping[int, tuple[float, float]]], limit_tokens_per_s: float, title: str
) -> Path:
    """Output tokens/s and median ITL against concurrency, a line for each system: `systems[name][concurrency]` is
    (tokens/s, ITL in seconds). The dashed line is what memory bandwidth allows at batch 1.
    Raises `RuntimeError` where matplotlib is missing."""
    whole, axes = figure(2)
    for colour, (name, points) in zip(INK, systems.items(), strict=False):
        widths = sorted(points)
        axes[0].plot(widths, [points[w][0] for w in widths], marker="o", label=name, color=colour)
        axes[1].plot(widths, [points[w][1] * 1e3 for w in widths], marker="o", label=name, color=colour)
    axes[0].axhline(limit_tokens_per_s, ls="--", color="#888888", lw=1, label="memory limit at batch 1")
    axes[0].set(ylabel="output tokens/s, end to end", ylim=(0, None))
    axes[1].set(ylabel="ITL, median (ms)", ylim=(0, None))
    ticks = sorted({width for points in systems.values() for width in points})
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlabel("concurrency")
    axes[0].legend(frameon=False, fontsize=8)
    whole.suptitle(title)
    whole.savefig(path, dpi=130)
    return path
