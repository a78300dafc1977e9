"""`baton config check`, and the examples that come with Baton."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from baton.deploy import cli
from baton.deploy.cluster import Place, desired_state
from baton.deploy.settings import from_yaml, resolve

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"

WORKERS = {
    "laptop.yaml": ["prefill-0 prefill tp 1 gpus 0", "decode-0 decode tp 1 gpus 0"],
    "one-h100.yaml": ["prefill-0 prefill tp 1 gpus 0.5", "decode-0 decode tp 1 gpus 0.5"],
    "one-node-8xH100.yaml": ["prefill-0 prefill tp 4 gpus 4", "decode-0 decode tp 4 gpus 4"],
    "ray-2-nodes.yaml": [
        "prefill-0 prefill tp 1 gpus 0",
        "prefill-1 prefill tp 1 gpus 0",
        "decode-0 decode tp 1 gpus 0",
        "decode-1 decode tp 1 gpus 0",
    ],
    "ray-4-nodes.yaml": [
        "prefill-long-0 prefill tp 8 gpus 8 H100",
        "prefill-0 prefill tp 4 gpus 4 H100",
        "prefill-1 prefill tp 4 gpus 4 H100",
        "decode-wide-0 decode tp 8 gpus 8 H200",
        "decode-0 decode tp 4 gpus 4 H200",
        "decode-1 decode tp 4 gpus 4 H200",
    ],
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BATON_")]:
        monkeypatch.delenv(name)


def test_every_example_is_tested() -> None:
    assert {file.name for file in EXAMPLES.iterdir()} == WORKERS.keys()


@pytest.mark.parametrize("name", WORKERS)
def test_an_example_is_right_and_becomes_the_workers_that_it_says(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = EXAMPLES / name
    assert cli.run(["config", "check", str(file)]) == 0
    out = capsys.readouterr().out
    desired = desired_state(resolve(from_yaml(file)), Place(Path("/m"), "m", "here:1", 1, "secret"))
    found = []
    for assignment in desired.assignments:
        needs, engine = assignment.resources, assignment.worker.engine
        words = (assignment.name, assignment.worker.role, "tp", engine.tp, "gpus", needs.gpus * needs.ranks)
        found.append(" ".join([*(f"{w:g}" if isinstance(w, float) else str(w) for w in words), needs.accelerator_type]))
    assert [line.strip() for line in found] == WORKERS[name]
    assert all(line.split()[0] in out for line in WORKERS[name])
    assert f"in all {len(WORKERS[name])} workers" in out


def test_the_check_shows_what_each_pool_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", "check", str(EXAMPLES / "ray-4-nodes.yaml")]) == 0
    out = capsys.readouterr().out
    assert "cluster production: model /models/llama-3.1-70b-instruct, launcher ray, 2 gateways at 0.0.0.0:8000" in out
    (line,) = (line for line in out.splitlines() if line.startswith("decode "))
    assert "decode-0, decode-1" in line
    assert "8 CPU, 4 GPU H200, 4 nvlink" in line
    assert "in all 6 workers, 32 ranks, 64 CPU, 32 GPU" in out


def test_the_check_counts_variables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("BATON_POOLS__DECODE__COUNT", "2")
    assert cli.run(["config", "check", str(EXAMPLES / "laptop.yaml")]) == 0
    assert "decode-0, decode-1" in capsys.readouterr().out
    monkeypatch.setenv("BATON_POOLS__DECODE__COUNT", "3")
    assert cli.run(["config", "check", str(EXAMPLES / "laptop.yaml")]) == 2
    assert "BATON_POOLS__DECODE__COUNT: 3 is out of range" in capsys.readouterr().err


def test_what_is_wrong_is_one_line_with_file_line_and_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("model: demo\nengine:\n  tensor_parallel: 2\n")
    assert cli.run(["config", "check", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"baton: {file}:3: engine.tensor_parallel: no such field here; known: block_size, ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    ["status", "top", "scale", "drain", "rollout", "logs", "trace", "down", "config check", "serve", "model import"],
)
def test_every_command_explains_itself_with_an_example_and_its_exit_codes(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*command.split(), "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"Example: baton {command}" in out
    assert "5 not reached within --timeout" in out
