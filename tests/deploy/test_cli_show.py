"""Commands that only look: tables, JSON, the live view, logs, and the picture of a request."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from baton.common.cluster import LogLines, Span, Trace
from baton.common.json_form import from_json, from_plain
from baton.deploy import cli
from baton.deploy.cli import logs, tables
from baton.deploy.cli.picture import picture
from baton.deploy.control.status import ClusterStatus

from .fake_admin import STATUS, FakeAdmin, publish, serving


@pytest.fixture
def admin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAdmin]:
    """The only cluster of this machine."""
    for name in ("BATON_ADMIN_URL", "BATON_ADMIN_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BATON_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(logs, "POLL_S", 0.001)
    with serving() as fake:
        publish(tmp_path / "run", "default", fake.url)
        yield fake


# --- status and top --------------------------------------------------------------------------------------------------


def test_status_is_tables(admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "demo  launcher local · revision 3 · controller up 2h · autoscale on"
    assert lines[1] == "12.5 requests/s (0.0 failed) · 0 running, 0 waiting"
    assert lines[2] == "0 prompt tokens/s (0% cached) · 0 output tokens/s"
    assert lines[3] == "queue p90 – · TTFT p50 250 ms p99 1.50 s · time/token p50 4.0 ms p99 –"
    rows = {cells[0]: cells for cells in map(str.split, lines[4:]) if cells}
    assert rows["pool"] == ["pool", "role", "tp", "ready", "wanted"]
    assert rows["decode"] == ["decode", "decode", "2", "2", "2"]
    assert " ".join(rows["worker"]) == "worker role state req wait KV hit tok/s age died"
    assert rows["prefill-0"] == ["prefill-0", "prefill", "ready", "0", "2", "25%", "40%", "5.3k", "60s"]
    assert rows["decode-1"] == ["decode-1", "decode", "ready", "0s", "2"]
    assert rows["decode-1:"] == ["decode-1:", "[oom]"]
    assert rows["gateway-0"] == ["gateway-0", "serving", "http://127.0.0.1:8000", "7", "2"]
    assert lines[-1] == "  4s ago  decode-1 ended (exit code 1)"


def test_what_a_turned_worker_was_named_after_does_not_hide_its_pool() -> None:
    turned = replace(STATUS.workers[1], pool="long-prompts", role="prefill")
    text = printed(replace(STATUS, workers=(turned,)))
    assert "decode-0  long-prompts  prefill  ready" in text


def printed(status: ClusterStatus) -> str:
    console = tables.console()
    with console.capture() as captured:
        console.print(tables.overview(status, 3))
    return captured.get()


def test_what_is_under_way_and_what_loads_is_shown() -> None:
    loading = replace(STATUS.workers[0], state="loading", progress=0.42, load=None, node="10.0.0.7")
    text = printed(replace(STATUS, rollout="to revision 4: 1 of 3 workers", workers=(loading,)))
    assert "rollout to revision 4: 1 of 3 workers" in text
    assert "loading 42%" in text
    assert "10.0.0.7" in text


def test_status_as_json_has_all_there_is(admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["workers"][0]["kv_used"], found["workers"][0]["hit_rate"]) == (0.25, 0.4)
    for worker in found["workers"]:
        del worker["kv_used"], worker["hit_rate"]
    assert from_plain(found, ClusterStatus) == STATUS


def test_status_why_is_what_the_planner_said(admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["status", "--why"]) == 0
    assert capsys.readouterr().out == " 30s ago  turned decode-1 to prefill: queue p90 4.1 s\n"
    admin.statuses = [replace(STATUS, why=())]
    assert cli.run(["status", "--why"]) == 0
    assert capsys.readouterr().out == "the planner has decided nothing yet\n"


def test_top_repeats_plain_overviews_where_it_has_no_terminal(
    admin: FakeAdmin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    naps = iter([0, 0])

    def nap(_: float) -> None:
        if next(naps, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", nap)
    assert cli.run(["top"]) == 130
    out = capsys.readouterr().out
    assert out.count("demo  launcher local") == 3
    assert "\x1b" not in out


def test_top_is_live_on_a_terminal_and_ends_with_q(admin: FakeAdmin, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    code = "import sys; from baton.deploy.cli import run; sys.exit(run(['top']))"
    top = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True
    )
    os.close(theirs)
    try:
        seen, deadline = b"", time.monotonic() + 60
        while b"q ends" not in seen and time.monotonic() < deadline and select.select([ours], [], [], 60)[0]:
            seen += os.read(ours, 1 << 16)
        assert b"prefill-0" in seen
        os.write(ours, b"q")
        assert top.wait(30) == 0
    finally:
        top.kill()
        top.wait()
        os.close(ours)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0s"), (119, "119s"), (120, "2m"), (7199, "120m"), (7200, "2h"), (172800, "2d")]
)
def test_ages(value: float, text: str) -> None:
    assert tables.age(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "–"), (0.0008, "0.8 ms"), (0.045, "45 ms"), (0.9994, "999 ms"), (1.239, "1.24 s")]
)
def test_durations(value: float, text: str) -> None:
    assert tables.seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (999, "999"), (5310, "5.3k"), (1_240_000, "1.2M")])
def test_counts(value: float, text: str) -> None:
    assert tables.count(value) == text


@pytest.mark.parametrize(("value", "text"), [(512 << 20, "512 MiB"), (3 << 29, "1.5 GiB"), (7, "7 B")])
def test_sizes(value: int, text: str) -> None:
    assert tables.size(value) == text


# --- logs ------------------------------------------------------------------------------------------------------------


def test_logs_shows_the_last_lines(admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    admin.answers["GET /v1/logs/decode-0?after=-2&limit=2"] = (200, LogLines(9, ("one", "[two]")))
    assert cli.run(["logs", "decode-0", "-n", "2"]) == 0
    assert capsys.readouterr().out == "one\n[two]\n"


def test_logs_follows_from_where_it_was(
    admin: FakeAdmin, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "PAGE", 2)
    admin.answers["GET /v1/logs/a%2Fb?after=-1&limit=1"] = (200, LogLines(9, ("one",)))
    admin.answers["GET /v1/logs/a%2Fb?after=9&limit=2"] = (200, LogLines(11, ("two", "three")))
    admin.answers["GET /v1/logs/a%2Fb?after=11&limit=2"] = (200, LogLines(12, ("four",)))
    admin.refuse("GET /v1/logs/a%2Fb?after=12&limit=2", 404, "no such process")
    assert cli.run(["logs", "a/b", "-f", "-n", "1"]) == 4
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\n"


# --- trace -----------------------------------------------------------------------------------------------------------

TRACE = Trace(
    request_id="chatcmpl-7f3a",
    gateway="gateway-0",
    ago_s=42.0,
    outcome="stop",
    prompt_tokens=812,
    cached_tokens=512,
    output_tokens=64,
    spans=(
        Span("waiting", "", 0.0, 0.01),
        Span("queued", "prefill-0", 0.01, 0.4),
        Span("prefill", "prefill-0", 0.4, 0.8),
        Span("handover", "decode-1", 0.5, 0.8),
        Span("failed", "decode-1", 0.8, 0.8, "worker_lost: its connection broke"),
        Span("queued", "prefill-1", 0.8, 1.0),
        Span("prefill", "prefill-1", 1.0, 1.2),
        Span("handover", "decode-0", 1.1, 1.3),
        Span("decode", "decode-0", 1.3, 4.0),
    ),
)


def bars(lines: list[str]) -> list[tuple[str, str, int, int]]:
    """(stage, worker, first column, last column) of each bar."""
    found = []
    for line in (line for line in lines if "|" in line):
        label, bar, _ = line.split("|")
        stage, _, worker = label.partition(" ")
        found.append((stage, worker.strip(), len(bar) - len(bar.lstrip()), len(bar.rstrip())))
    return found


def test_a_trace_is_a_picture_of_80_columns() -> None:
    lines = picture(TRACE, 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "chatcmpl-7f3a at gateway-0, 42s ago: stop after 4.00 s"
    assert lines[1] == "812 prompt tokens (512 cached), 64 output tokens"
    drawn = bars(lines)
    assert [(stage, worker) for stage, worker, _, _ in drawn] == [(span.what, span.worker) for span in TRACE.spans]
    assert all(first < last for _, _, first, last in drawn), "every stage is seen"
    firsts = [first for _, _, first, _ in drawn]
    assert firsts == sorted(firsts)
    decode, queued = drawn[-1], drawn[1]
    assert decode[3] - decode[2] == pytest.approx(48 * 2.7 / 4, abs=1)
    assert queued[3] - queued[2] == pytest.approx(48 * 0.39 / 4, abs=1)
    assert "   worker_lost: its connection broke" in "\n".join(lines)
    assert "longest: decode on decode-0, 2.70 s of 4.00 s (68%)" in lines
    assert lines[-1] == "1 attempt failed"


def test_a_trace_of_a_request_that_goes_on_reaches_to_now() -> None:
    going = replace(TRACE, outcome="", ago_s=2.0, spans=(Span("waiting", "", 0.0, 1.0), Span("queued", "p-0", 1.0)))
    lines = picture(going, 80).splitlines()
    assert "it goes on after 2.00 s" in lines[0]
    (_, _, first, waited), (_, _, began, last) = bars(lines)
    assert (first, waited) == (0, began)
    assert last == len(lines[-4].split("|")[1])


def test_a_trace_without_stages_says_so_and_long_names_are_cut() -> None:
    assert picture(replace(TRACE, spans=()), 80).endswith("no stage of it was seen")
    long = replace(TRACE, spans=(Span("prefill", "prefill-" + "x" * 90, 0, 1.0, "note " * 40),))
    assert max(map(len, picture(long, 60).splitlines()[1:4])) <= 60


def test_trace_asks_for_a_request(admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    admin.answers["GET /v1/trace/slowest"] = (200, TRACE)
    assert cli.run(["trace", "slowest"]) == 0
    assert "longest: decode" in capsys.readouterr().out
    assert cli.run(["trace", "slowest", "--json"]) == 0
    assert from_json(capsys.readouterr().out.encode(), Trace) == TRACE
    admin.refuse("GET /v1/trace/x%3Fy", 404, "no gateway knows x?y")
    assert cli.run(["trace", "x?y"]) == 4
