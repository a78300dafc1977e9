"""The command line: one clear line and the right exit code for what is wrong."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from baton.deploy import cli


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["serve", "--port", "eighty"], 2, "Invalid value for '--port'"),
        (["serve", "--port", "70000"], 2, "--port: 70000 is not a port"),
        (["serve", "--nonsense"], 2, "No such option"),
        (["serve", "--kv-memory", "2XB"], 2, "--kv-memory: '2XB' is not a size"),
        (["serve", "--dtype", "int3"], 2, "--dtype: 'int3' is not one of"),
        (["serve", "--prefill", "0"], 2, "no worker would prefill"),
        (["serve", "--decode", "-1"], 2, "--decode: -1 is out of range: it must be 0 or more"),
        (["serve", "--api-key", ""], 2, "--api-key: it must be a text"),
        (["serve", "no/such/model"], 2, "model 'no/such/model': no such folder or file"),
        (["serve", "--config", "no.yaml"], 2, "--config: cannot read no.yaml"),
        (["serve", "--log-dir", "/dev/null/x"], 2, "--log-dir: cannot make /dev/null/x"),
        (["sevre"], 2, "No such command"),
        (["model", "import"], 2, "Missing argument"),
        (["model", "import", "demo", "x", "--dtype", "int3"], 2, "--dtype: 'int3' is not one of"),
        (["model", "import", "demo", "--dtype", "bfloat16"], 2, "--dtype: the cache holds float32"),
        (["model", "import", "demo", "/"], 2, "DIR: / exists and is not an empty folder"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("baton: ")
    assert error.count("\n") == 1
    assert says in error


def test_a_port_in_use_is_told_before_anything_loads(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        assert cli.run(["serve", "--port", str(port)]) == 1
    assert capsys.readouterr().err == f"baton: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.mkdir(), "config.json is missing"),
        (lambda p: (p.mkdir(), (p / "config.json").write_text("{}")), "tokenizer.json is missing"),
        (lambda p: p.write_bytes(b"PK\x03\x04"), "the file is not a GGUF"),
    ],
)
def test_a_model_that_is_none_is_said_to_be_none(
    tmp_path: Path, make: object, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "model")  # type: ignore[operator]
    assert cli.run(["serve", str(tmp_path / "model")]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("command", [["serve"], ["model", "import"]])
def test_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*command, "--help"]) == 0
    assert f"Example: baton {' '.join(command)}" in capsys.readouterr().out


def test_bench_says_which_package_it_lacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "baton.bench.cli", None)  # makes its import fail as a missing module's does
    assert cli.run(["bench", "load"]) == 1
    assert "pip install 'baton[bench]'" in capsys.readouterr().err


def test_the_installed_command_answers_and_stays_without_torch() -> None:
    version = subprocess.run([Path(sys.executable).parent / "baton", "--version"], capture_output=True, timeout=60)
    assert version.returncode == 0
    assert version.stdout.startswith(b"baton ")
    code = "import sys, baton.deploy.cli; print([m for m in ('torch', 'fastapi', 'numpy') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, timeout=60, check=True)
    assert loaded.stdout == b"[]\n"
