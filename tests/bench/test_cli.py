"""The command in front: its help, its refusals, and one whole run against a fake server in another thread."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from typer.testing import CliRunner

from baton.bench import record
from baton.bench.cli import app
from tests.bench.fake_server import fake_server

runner = CliRunner()


@pytest.fixture
def url():
    """Address of a fake server that runs beside the command under test."""
    started, address = threading.Event(), []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with fake_server() as server:
            address.append(server.url)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(5)
    yield address[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(5)
    loop.close()


def test_every_command_has_help_with_an_example():
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        result = runner.invoke(app, [name, "--help"])
        assert result.exit_code == 0, name
        assert f"baton bench {name}" in " ".join(result.output.split()), name


def test_a_sweep_is_measured_and_written(url, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    arguments = ["load", url, "--concurrency", "1,2", "--requests", "4", "--output", "3", "--input", "16",
                 "--slo-ttft", "1000", "--slo-tpot", "1000", "--save", "sweep"]  # fmt: skip
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert [r["label"] for r in document["results"]] == ["concurrency 1", "concurrency 2"]
    assert all(r["requests"] == 4 and r["output_tokens"] == 12 and not r["errors"] for r in document["results"])
    assert document["results"][0]["goodput"]["share"] == 1.0
    assert isinstance(document["parameters"]["seed"], int)
    assert (tmp_path / "sweep.png").exists()


def test_a_trace_is_replayed(url, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    trace = tmp_path / "t.csv"
    trace.write_text("timestamp_s,client_id,input_length,output_length\n" + "0.0,1,40,6\n0.1,1,80,4\n0.2,1,9000,4\n")
    arguments = ["load", url, "--trace", str(trace), "--speed", "10", "--max-len", "1000", "--save", "replay"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "replay.json").read_text())
    assert document["results"][0]["output_tokens"] == 10
    assert document["parameters"]["trace"] == "t.csv"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["load", "http://x"], "choose one"),
        (["load", "http://x", "--rate", "1", "--concurrency", "1"], "choose one"),
        (["load", "http://x", "--rate", "fast"], "list of numbers"),
        (["load", "http://x", "--rate", "-1"], "above 0"),
        (["load", "http://x", "--rate", "1", "--chat"], "--tokenizer"),
        (["load", "http://x", "--rate", "1", "--slo-ttft", "9"], "go together"),
        (["load", "http://127.0.0.1:9", "--rate", "1"], "Connect"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(arguments, why):
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert why in " ".join(result.output.split())
