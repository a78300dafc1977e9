"""One request as a picture in plain text: a bar over time for each stage, and what took longest."""

from __future__ import annotations

import textwrap
from collections import defaultdict

from ...common.cluster import Span, Trace
from .tables import age, seconds

SHADES = {"waiting": "·", "queued": "░", "prefill": "█", "handover": "▒", "decode": "▓", "failed": "x"}
"""A stage is known by its name in front; the shade only helps the eye."""
MIN_BARS = 16
TIME = 10
"""Columns of a stage's duration."""


def picture(trace: Trace, width: int) -> str:
    """Lines of at most `width` columns, if that is 60 or more."""
    end = _end(trace)
    worker = min(max([len(span.worker) for span in trace.spans], default=0), width - 50)
    label = 10 + worker
    bars = max(MIN_BARS, width - label - TIME - 3)
    lines = [_facts(trace, end), "", " " * label + _axis(bars, end)]
    for span in trace.spans:
        stage = f"{span.what[:8]:<9}{_cut(span.worker, worker):<{worker}}"
        took = (end if span.end is None else span.end) - span.begin
        lines.append(f"{stage} |{_bar(span, end, bars)}|{seconds(took) if took > 0 else '':>{TIME}}".rstrip())
        if span.note:
            lines.append(" " * label + _cut(span.note, width - label))
    return "\n".join([*lines, "", *_longest(trace, end, width)])


def _facts(trace: Trace, end: float) -> str:
    how = trace.outcome or "it goes on"
    tokens = f"{trace.prompt_tokens} prompt tokens ({trace.cached_tokens} cached), {trace.output_tokens} output tokens"
    return f"{trace.request_id} at {trace.gateway}, {age(trace.ago_s)} ago: {how} after {seconds(end)}\n{tokens}"


def _end(trace: Trace) -> float:
    """When the last stage ended; of a request that goes on, now."""
    ends = [trace.ago_s if span.end is None else span.end for span in trace.spans]
    return max(ends, default=0.0)


def _axis(bars: int, end: float) -> str:
    return f" 0{seconds(end):>{bars - 1}}"


def _bar(span: Span, end: float, bars: int) -> str:
    """Never empty: what takes no time to speak of is seen where it was."""
    scale = bars / end if end else 0.0
    first = min(int(span.begin * scale), bars - 1)
    last = bars if span.end is None else min(max(first + 1, round(span.end * scale)), bars)
    mark = SHADES.get(span.what, "=")
    return f"{' ' * first}{mark * (last - first)}".ljust(bars)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _longest(trace: Trace, end: float, width: int) -> list[str]:
    """What the time went to, the most first. Stages overlap, as a handover does with its prefill: shares may add up to
    more than all."""
    if not trace.spans or not end:
        return ["no stage of it was seen"]
    times: dict[str, float] = defaultdict(float)
    for span in trace.spans:
        times[span.what] += (end if span.end is None else span.end) - span.begin
    by_time = sorted(times.items(), key=lambda item: -item[1])
    most, longest = by_time[0]
    where = dict.fromkeys(span.worker for span in trace.spans if span.what == most and span.worker)
    first = f"longest: {most}" + (f" on {', '.join(where)}" if where else "")
    first += f", {seconds(longest)} of {seconds(end)} ({longest / end:.0%})"
    others = ", ".join(f"{what} {seconds(took)} ({took / end:.0%})" for what, took in by_time[1:] if took > 0)
    lines = [first, *([f"then: {others}"] if others else [])]
    if failed := sum(span.what == "failed" for span in trace.spans):
        lines.append(f"{failed} attempt{'s' if failed > 1 else ''} failed")
    return [part for line in lines for part in textwrap.wrap(line, width, subsequent_indent="  ")]
