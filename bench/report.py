"""From samples to numbers: quantiles, rates, goodput. Seconds everywhere; tables show milliseconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from .client import Sample
from .load import Run
from .quantiles import Quantiles


@dataclass(frozen=True, slots=True)
class Slo:
    """What a user should get: TTFT and TPOT in seconds."""

    ttft: float
    tpot: float

    def met(self, sample: Sample) -> bool:
        """A failed request meets none."""
        return not sample.error and sample.ttft <= self.ttft and (sample.tpot or 0.0) <= self.tpot


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that met both SLOs (DistServe, Zhong et al., OSDI'24): as a share of all that were sent, failures
    included, and in each second. Their goodput of a system is the highest rate at which the share stays ≥ 0.9."""

    slo: Slo
    share: float
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in numbers. `label` says what was varied: "concurrency 8", "rate 2.0"."""

    label: str
    requests: int
    errors: dict[str, int]
    wall_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    ttft: Quantiles
    itl: Quantiles
    tpot: Quantiles
    e2e: Quantiles
    goodput: Goodput | None


def summarise(label: str, run: Run, slo: Slo | None = None) -> Summary:
    """Latencies are those of requests that succeeded; errors are counted by type."""
    good = [sample for sample in run.samples if not sample.error]
    tokens = sum(sample.tokens for sample in good)
    goodput = None
    if slo is not None:
        met = sum(slo.met(sample) for sample in run.samples)
        goodput = Goodput(slo, met / max(1, len(run.samples)), met / run.wall_s)
    return Summary(
        label=label,
        requests=len(run.samples),
        errors=dict(Counter(sample.error for sample in run.samples if sample.error)),
        wall_s=run.wall_s,
        prompt_tokens=sum(sample.prompt_tokens for sample in good),
        cached_tokens=sum(sample.cached_tokens for sample in good),
        output_tokens=tokens,
        output_tokens_per_s=tokens / run.wall_s,
        requests_per_s=len(good) / run.wall_s,
        ttft=Quantiles.of(sample.ttft for sample in good),
        itl=Quantiles.of(gap for sample in good for gap in sample.itl),
        tpot=Quantiles.of(sample.tpot for sample in good if sample.tpot is not None),
        e2e=Quantiles.of(sample.e2e for sample in good),
        goodput=goodput,
    )


def table(summaries: Sequence[Summary], title: str) -> Group:
    """For people, within 80 columns: what was done, then how long it took, three rows for each run."""
    rates, times = Table(title=title, title_justify="left"), Table(caption="ms", caption_justify="right")
    for name in ("run", "ok", "errors", "tokens/s", "requests/s", "goodput"):
        rates.add_column(name, justify="left" if name == "run" else "right")
    for name in ("run", "", "TTFT", "ITL", "TPOT", "end to end"):
        times.add_column(name, justify="left" if name == "run" else "right")
    for s in summaries:
        failed = sum(s.errors.values())
        errors = "\n".join(f"{count} {kind}" for kind, count in sorted(s.errors.items())) or "0"
        goodput = f"{s.goodput.share:.0%}, {s.goodput.requests_per_s:.2f}/s" if s.goodput else "–"
        done = (f"{s.output_tokens_per_s:.1f}", f"{s.requests_per_s:.2f}", goodput)
        rates.add_row(s.label, str(s.requests - failed), errors, *done)
        columns = ("\n".join(_ms(v) for v in (q.p50, q.p90, q.p99)) for q in (s.ttft, s.itl, s.tpot, s.e2e))
        times.add_row(s.label, "p50\np90\np99", *columns, end_section=True)
    return Group(rates, times)


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return "–" if np.isnan(seconds) else f"{milliseconds:.1f}" if milliseconds < 100 else f"{milliseconds:.0f}"


def plain(summary: Summary) -> dict[str, Any]:
    return asdict(summary)
