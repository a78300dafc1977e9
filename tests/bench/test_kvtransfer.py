"""The bench of the handover: its two processes at a tiny size, and what it makes of times."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton.bench import record
from baton.bench.cli import app
from baton.bench.kvtransfer import plots, raw, speed, suite
from baton.bench.kvtransfer.end import layer_hash, scattered
from baton.bench.kvtransfer.hiding import Hiding
from baton.bench.kvtransfer.speed import Speed
from baton.bench.kvtransfer.stall import Stall, Window, gaps
from baton.common.config import TRANSPORTS
from baton.common.kv_format import KvFormat

TINY = KvFormat(num_layers=2, num_kv_heads=2, head_dim=8, block_size=16, dtype="bfloat16")


def a_speed(transport: str, tokens: int, handover: float, unchecked: float) -> Speed:
    return Speed(transport, "medium", tokens, 10**9, [handover] * 3, [unchecked] * 3, [0.5] * 3, {})


@pytest.fixture
def results() -> suite.Results:
    speeds = [
        a_speed("shm", 1024, 0.55, 0.54),
        a_speed("process-group", 1024, 0.9, 0.7),
        a_speed("tcp", 1024, 0.9, 0.9),
        a_speed("grpc", 1024, 5.0, 5.0),
        a_speed("tcp", 32768, 0.9, 0.9),
    ]
    stall = Stall("shm", [0.01] * 99 + [0.02], [0.01] * 90 + [0.04] * 10, 10**9, 2.0)
    return suite.Results(speeds, Hiding("shm", 4096, [10.0, 12.0, 10.0], [0.1, 0.1, 0.9]), [stall])


def test_the_order_of_blocks_is_a_permutation() -> None:
    assert sorted(scattered(64, seed=1)) == list(range(64)) != scattered(64, seed=1) != scattered(64, seed=2)


def test_a_share_is_the_median_of_the_rounds_ratios() -> None:
    measured = Speed(
        "shm", "memcpy", 1024, 3 * 10**9, [1.0, 2.0, 8.0], [0.9, 2.0, 6.0], [0.8, 1.9, 2.0], {"warm": [0.7, 1.0, 0.8]}
    )
    assert measured.share == 0.8 and measured.gb_per_s == 1.5
    assert measured.other_shares == {"warm": 0.5}
    assert measured.checksums == pytest.approx(0.1)


def test_bars_say_what_is_reached_and_what_is_not(results: suite.Results) -> None:
    assert list(suite.bars(results).items()) == [
        ("shm at 1024 tokens: 91% of medium, at least 90%", True),
        ("checksums by shm at 1024 tokens: 1.8%, at most 5%", True),
        ("process-group at 1024 tokens: 56% of medium, at least 90%", False),
        ("checksums by process-group at 1024 tokens: 22.2%, at most 5%", False),
        ("checksums by tcp at 1024 tokens: 0.0%, at most 5%", True),
        ("checksums by grpc at 1024 tokens: 0.0%, at most 5%", True),
        ("checksums by tcp at 32768 tokens: 0.0%, at most 5%", True),
        ("tcp or grpc at 1024 tokens: 56% of a plain socket, at least 50%", True),
        ("tcp or grpc at 32768 tokens: 56% of a plain socket, at least 70%", False),
        ("not hidden at 4096 tokens: 1.0% of TTFT, at most 5%", True),
        ("ITL p99 while KV arrives by shm: 3.96×, at most 1.1×", False),
    ]


def test_gaps_count_in_the_window_in_which_both_tokens_came() -> None:
    windows = [Window(0.0, 2.0, False), Window(2.0, 4.0, True)]
    stream = [0.1, 0.5, 1.0, 1.9, 2.1, 2.5, 3.0, 3.9, 4.2]
    assert gaps([stream], windows, busy=False) == pytest.approx([0.5, 0.9])
    assert gaps([stream, [3.0, 3.5]], windows, busy=True) == pytest.approx([0.5, 0.9, 0.5])


def test_each_question_has_its_picture(results: suite.Results, tmp_path: Path) -> None:
    drawn = plots.draw(tmp_path, "x", results)
    assert [path.name for path in drawn] == ["x-speed.png", "x-checksums.png", "x-hiding.png", "x-stall.png"]
    assert all(path.stat().st_size > 1000 for path in drawn)
    assert plots.draw(tmp_path, "y", suite.Results()) == []


def test_bytes_cross_by_every_transport_and_arrive_as_they_were() -> None:
    with speed.pair(TINY, tokens=128) as both:
        assert [name for name in TRANSPORTS if name in both.transports] == ["shm", "process-group", "tcp", "grpc"]
        for transport in both.transports:
            for checked in (True, False):
                assert both.handover(transport, checked) > 0
                assert both.same(), transport
        assert all(both.limit(medium) > 0 for medium in ("memcpy", "socket", "gloo"))
        assert [list(both.beside(medium)) for medium in ("memcpy", "socket", "gloo")] == [
            [], ["warm", "tuned"], ["warm", "two"],
        ]  # fmt: skip


def test_every_other_round_is_measured_in_the_reverse_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a bandwidth that falls all the while is for one side of a ratio as often as for the other."""
    clock = iter(range(1, 100))

    class Slowing:
        transports, size = ("shm",), 1

        def limit(self, medium: str) -> float:
            return float(next(clock))

        def beside(self, medium: str) -> dict[str, Callable[[], float]]:
            return {"way": lambda: float(next(clock))}

        def handover(self, transport: str, checked: bool) -> float:
            return float(next(clock))

    monkeypatch.setattr(speed, "pair", lambda *_: contextlib.nullcontext(Slowing()))
    (found,) = speed.measure(TINY, 1, 1, lambda _: None, ["shm"])
    assert found.limit == [5, 12, 13, 20]  # the first four were for warming up
    assert found.beside == {"way": [6, 11, 14, 19]}
    assert found.handover == [7, 10, 15, 18] and found.unchecked == [8, 9, 16, 17]


@pytest.mark.parametrize("medium", ["memcpy", "socket", "gloo"])
def test_a_limit_is_that_of_the_same_bytes(medium: str) -> None:
    """Out of all of the one pool into all of the other, so that memory is read and written as for a handover."""
    with speed.pair(TINY, tokens=128) as both:
        both.limit(medium)
        theirs = scattered(8, seed=2)
        for layer in range(TINY.num_layers):
            assert both._remote.ask("content", layer, 8) == layer_hash(both._pool, TINY, theirs, layer)


def test_a_warm_buffer_is_warm() -> None:
    """The same in every round, and written: pages that nobody wrote to are all one, and made while the clock runs."""
    assert raw.small(1 << 20) is raw.small(1 << 20) and raw.small(1 << 20).all()


def test_the_command_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    arguments = ["kvtransfer", str(tmp_path), "--parts", "speed", "--tokens", "16,32", "--rounds", "2,1"]
    result = CliRunner().invoke(app, [*arguments, "--transports", "shm,tcp", "--save", "kv"])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "kv.json").read_text())
    measured = document["results"]["speed"]
    assert [(s["transport"], s["tokens"], len(s["handover"])) for s in measured] == [
        ("shm", 16, 8), ("tcp", 16, 2), ("shm", 32, 4), ("tcp", 32, 1),
    ]  # fmt: skip
    assert all(s["share"] > 0 for s in measured) and document["results"]["stall"] == []
    assert [list(s["other_shares"]) for s in measured] == [[], ["warm", "tuned"]] * 2
    assert (tmp_path / "kv-speed.png").exists()


@pytest.mark.parametrize(
    ("arguments", "why"), [(["--parts", "speed,taste"], "no such part"), (["--tokens", "16"], "one for one")]
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, arguments: list[str], why: str) -> None:
    result = CliRunner().invoke(app, ["kvtransfer", str(tmp_path), *arguments])
    assert result.exit_code == 2 and why in " ".join(result.output.split())
