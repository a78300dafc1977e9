"""The bench of a worker's Python: the stand-in device's books, and one whole measurement that is too short to mean
anything."""

from __future__ import annotations

import pytest

from baton.bench.engine import device, host
from baton.bench.quantiles import Quantiles


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its last entry is the time."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[-1])
    return now


def test_a_stream_is_idle_from_the_end_of_all_steps_to_the_next_launch(clock: list[float]) -> None:
    stream = device.Stream()
    clock.append(1.0)
    assert stream.launch(5.0) == 6.0
    clock.append(2.0)
    assert stream.launch(5.0) == 11.0, "it begins when the first has ended"
    clock.append(13.0)
    assert stream.launch(5.0) == 18.0
    assert (stream.idle_s, stream.busy_s) == (1.0 + 2.0, 15.0)


def test_each_moment_counts_for_the_innermost_part(clock: list[float]) -> None:
    watch = device.Watch()
    clock.append(1.0)

    def outer() -> None:
        clock.append(3.0)
        watch.around("inner", clock.append)(7.0)
        clock.append(7.5)

    watch.around("outer", outer)()
    clock.append(9.5)
    watch.turn()
    assert watch.spent == {"rest": 1.0 + 2.0, "outer": 2.0 + 0.5, "inner": 4.0}


@pytest.mark.parametrize(("overlap", "serve"), [(False, False), (True, True)])
async def test_a_worker_is_measured(overlap: bool, serve: bool) -> None:
    found = await host.measure(batch=3, step_s=1e-3, steps=20, overlap=overlap, serve=serve)
    window = found.window
    assert window.steps == 20 and window.busy_s == pytest.approx(20e-3)
    assert sum(window.parts.values()) == pytest.approx(window.seconds)
    assert set(host.PARTS) <= set(window.parts)
    assert (found.served is not None) == serve
    if found.served is not None:
        assert found.served["tokens"] >= 3 * (host.SKIP + 20 - 2)  # two steps may be under way
    (line,) = host.document([found])
    assert line["python_s"]["mean"] == pytest.approx((window.seconds - window.parts["device"]) / 20)
    assert 0.0 < window.python.p50 <= window.python.p99
    assert [shown.row_count for shown in host.tables([found])] == [1, 1]


def test_the_bars_are_those_of_the_largest_batch_and_of_the_overlapped_loop() -> None:
    def measured(batch: int, overlap: bool, python_s: float, idle_s: float) -> host.Measured:
        parts = {"rest": python_s, "device": 1.0}
        python = Quantiles.of([0.0, python_s, 1.0])
        window = device.Window(3, 3.0, python, 1.0 - idle_s, idle_s, 0.0, 0.0, parts)
        return host.Measured(batch, 1.0, overlap, window, None)

    found = [measured(256, True, 1e-3, 0.0), measured(256, False, 2e-3, 0.5), measured(64, True, 2e-3, 0.05)]
    assert list(host.bars(found).values()) == [True, True, False, False]
    assert host.bars([measured(1, True, 1.0, 1.0)]) == {}
