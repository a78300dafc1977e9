"""Quantiles, goodput, the result file, and that nothing of the machine's names gets into it."""

from __future__ import annotations

import json
import math
import sys

import pytest
from rich.console import Console

from baton.bench import machine, plot, record, report
from baton.bench.client import Sample
from baton.bench.load import Run
from baton.bench.quantiles import Quantiles
from baton.bench.report import Slo, summarise
from baton.common.errors import BatonError, InvalidRequest


def sample(ttft: float, gap: float, tokens: int = 3, error: str = "") -> Sample:
    events = [ttft + gap * i for i in range(tokens)]
    return Sample(start=0.0, events=events, end=events[-1], tokens=tokens, prompt_tokens=10, error=error)


def test_quantiles():
    q = Quantiles.of(i / 100 for i in range(101))
    assert (q.p50, q.p90, q.p99, q.mean) == pytest.approx((0.5, 0.9, 0.99, 0.5))
    assert math.isnan(Quantiles.of([]).p50)


def test_a_summary_counts_only_what_succeeded():
    run = Run([sample(0.1, 0.02), sample(0.3, 0.04), sample(0.1, 0.01, error="http_429")], wall_s=2.0)
    s = summarise("x", run)
    assert (s.requests, s.errors, s.output_tokens, s.prompt_tokens) == (3, {"http_429": 1}, 6, 20)
    assert (s.output_tokens_per_s, s.requests_per_s) == (3.0, 1.0)
    assert s.ttft.p50 == pytest.approx(0.2)
    assert s.tpot.mean == pytest.approx(0.03)
    assert s.itl.mean == pytest.approx(0.03)
    assert s.goodput is None


def test_goodput_wants_both_slos_and_counts_failures_against_it():
    run = Run([sample(0.1, 0.02), sample(0.9, 0.02), sample(0.1, 0.5), sample(0.1, 0.02, error="timeout")], wall_s=2.0)
    goodput = summarise("x", run, Slo(ttft=0.5, tpot=0.1)).goodput
    assert goodput is not None
    assert (goodput.share, goodput.requests_per_s) == (0.25, 0.5)


def test_a_run_without_any_success_can_still_be_shown():
    s = summarise("x", Run([sample(0.1, 0.1, error="timeout")], wall_s=1.0), Slo(1, 1))
    console = Console(width=200, record=True, file=None, quiet=True)
    console.print(report.table([s], "title"))
    assert s.goodput is not None and s.goodput.share == 0.0


def test_the_result_file_names_machine_and_commit_but_no_path_or_host(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["/opt/x/bin/baton", "bench", "load", "http://box.example:81/v1", "/data/t.csv"])
    s = summarise("x", Run([sample(0.1, 0.02)], wall_s=1.0))
    path = record.write("demo", "load", [report.plain(s)], {"seed": 1})
    text = path.read_text()
    document = json.loads(text)
    assert document["command"] == "baton bench load http://HOST:81 t.csv"
    assert document["results"][0]["ttft"]["p50"] == 0.1
    assert document["machine"]["cores"] >= 1 and document["commit"] and document["date"]
    assert "example" not in text and "/data" not in text and "/opt" not in text


def test_what_was_not_measured_is_null(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    path = record.write("demo", "load", [report.plain(summarise("x", Run([], wall_s=1.0)))], {})
    assert json.loads(path.read_text())["results"][0]["itl"]["p99"] is None


def test_plots_are_drawn(tmp_path):
    run = Run([sample(0.1, 0.02), sample(0.3, 0.04)], wall_s=2.0)
    path = plot.draw_load(tmp_path / "a.png", [(summarise("x", run), run)], "title")
    assert path.stat().st_size > 1000
    path = plot.draw_comparison(tmp_path / "b.png", {"one": {1: (10.0, 0.1), 8: (20.0, 0.2)}}, 33.0, "title")
    assert path.stat().st_size > 1000


def test_bandwidth_and_weights(tmp_path):
    assert machine.read_bandwidth(1, megabytes=8, rounds=1) > 1e7
    (tmp_path / "a.safetensors").write_bytes(b"x" * 100)
    assert machine.weight_bytes(tmp_path) == 100
    with pytest.raises(InvalidRequest):
        machine.weight_bytes(tmp_path / "none")


def test_without_matplotlib_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # makes its import fail as a missing module's does
    with pytest.raises(BatonError, match="pip install"):
        plot.draw_comparison(tmp_path / "b.png", {}, 1.0, "title")
