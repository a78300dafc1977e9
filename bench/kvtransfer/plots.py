"""One picture for each question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..plot import INK, figure
from .hiding import Hiding
from .speed import Speed
from .stall import Stall, percentile
from .suite import Results

_STYLES = """dashed: the medium's limit, pool to pool; dotted: from one small buffer to another;
dash-dotted: the limit with two messages under way, or by a tuned socket"""


def draw(folder: Path, name: str, results: Results) -> list[Path]:
    """Write NAME-speed.png and so on; what was not measured is left out. Raises `BatonError` without matplotlib."""
    drawn: dict[str, Any] = {}
    if results.speeds:
        drawn |= {"speed": _speed(results.speeds), "checksums": _checksums(results.speeds)}
    if results.hiding is not None:
        drawn["hiding"] = _hiding(results.hiding)
    if results.stalls:
        drawn["stall"] = _stall(results.stalls)
    paths = []
    for question, picture in drawn.items():
        paths.append(folder / f"{name}-{question}.png")
        picture.savefig(paths[-1], dpi=130)
    return paths


def _by_transport(speeds: Sequence[Speed]) -> dict[str, list[Speed]]:
    names = dict.fromkeys(s.transport for s in speeds)
    return {name: [s for s in speeds if s.transport == name] for name in names}


def _groups(axis: Any, speeds: Sequence[Speed], value: Any) -> None:
    """Bars in a group for each size, one bar for each transport."""
    sizes, by_name = sorted({s.tokens for s in speeds}), _by_transport(speeds)
    width = 0.8 / len(by_name)
    for number, (name, those) in enumerate(by_name.items()):
        places = [sizes.index(s.tokens) + (number - (len(by_name) - 1) / 2) * width for s in those]
        axis.bar(places, [value(s) for s in those], width * 0.9, label=name, color=INK[number % len(INK)])
    axis.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axis.set_xlabel("tokens")


def _speed(speeds: Sequence[Speed]) -> Any:
    picture, (left, right) = figure(2)
    for colour, (name, those) in zip(INK, _by_transport(speeds).items(), strict=False):
        tokens = [s.tokens for s in those]
        left.plot(tokens, [s.gb_per_s for s in those], marker="o", label=name, color=colour)
        left.plot(tokens, [s.limit_gb_per_s for s in those], ls="--", lw=1, color=colour)
        for way, style in (("warm", ":"), ("tuned", "-."), ("two", "-.")):
            if all(way in s.beside for s in those):
                left.plot(tokens, [s.rate(s.beside[way]) for s in those], ls=style, lw=1, color=colour)
    left.set_xscale("log", base=2)
    sizes = sorted({s.tokens for s in speeds})
    left.set_xticks(sizes, [f"{size:,}" for size in sizes])
    left.set(xlabel="tokens", ylabel="GB/s", ylim=(0, None))
    left.set_title(_STYLES, fontsize=7)
    left.legend(frameon=False, fontsize=8)
    _groups(right, speeds, lambda s: 100 * s.share)
    right.axhline(100, ls="--", lw=1, color="#888888")
    right.set(ylabel="% of the medium's limit")
    picture.suptitle("KV from process to process, Llama-3.1-8B's layout")
    return picture


def _checksums(speeds: Sequence[Speed]) -> Any:
    picture, (axis,) = figure(1)
    _groups(axis, speeds, lambda s: 100 * s.checksums)
    axis.axhline(5, ls="--", lw=1, color="#888888")
    axis.set(ylabel="% of the handover", title="what checksums cost")
    axis.legend(frameon=False, fontsize=8)
    return picture


def _hiding(hiding: Hiding) -> Any:
    picture, (axis,) = figure(1)
    prompts = np.arange(1, len(hiding.ttft) + 1)
    hidden = [ttft - exposed for ttft, exposed in zip(hiding.ttft, hiding.exposed, strict=True)]
    axis.bar(prompts, hidden, color=INK[0], label="to the end of compute")
    axis.bar(prompts, hiding.exposed, bottom=hidden, color=INK[1], label="from there to the commit")
    axis.set_xticks(prompts)
    axis.set(
        xlabel="prompt", ylabel="s", title=f"{hiding.tokens:,} tokens over {hiding.transport}: {hiding.share:.2%} shows"
    )
    axis.legend(frameon=False, fontsize=8)
    return picture


def _stall(stalls: Sequence[Stall]) -> Any:
    picture, axes = figure(len(stalls))
    for axis, stall in zip(axes, stalls, strict=True):
        for colour, (label, gaps) in zip(INK, (("quiet", stall.quiet), ("KV arrives", stall.arriving)), strict=False):
            data = np.sort(gaps) * 1e3
            axis.step(data, np.arange(1, data.size + 1) / data.size, where="post", label=label, color=colour)
            axis.axvline(percentile(data, 99), ls="--", lw=1, color=colour)
        axis.set(
            xlabel="ITL (ms; dashed: p99)", ylabel="share of gaps", xlim=(0, None), ylim=(0, 1.02),
            title=f"{stall.transport}, {stall.gb_per_s * 1e3:.0f} MB/s: p99 {stall.ratio:.2f}×",
        )  # fmt: skip
        axis.legend(frameon=False, fontsize=8)
    return picture
