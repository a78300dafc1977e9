"""Finding a cluster on this machine, and the ports that are held for it."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from baton.common.errors import BatonError, InvalidRequest
from baton.deploy.launch import runfile
from baton.deploy.launch.ports import claim_port
from baton.deploy.launch.runfile import Claim, RunFile


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATON_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def test_a_cluster_is_found_by_its_name_while_it_runs(folder: Path) -> None:
    assert runfile.read("default") is None
    claim = Claim("default")
    run = RunFile("default", os.getpid(), "http://127.0.0.1:1", "secret")
    claim.publish(run)
    assert runfile.read("default") == run
    assert stat.S_IMODE((folder / "default.json").stat().st_mode) == 0o600
    claim.release()
    assert runfile.read("default") is None


def test_a_second_one_of_the_same_name_is_refused_until_the_first_has_ended() -> None:
    first = Claim("default")
    first.publish(RunFile("default", 77, "u", "t"))
    with pytest.raises(BatonError, match=r"'default' runs already \(process 77\)"):
        Claim("default")
    Claim("other").release()
    first.release()
    Claim("default").release()


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b"])
def test_a_name_must_be_one(name: str) -> None:
    with pytest.raises(InvalidRequest):
        Claim(name)


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    assert runfile.run_dir() == folder
    monkeypatch.delenv("BATON_RUN_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    assert runfile.run_dir() == Path("/run/user/1/baton")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runfile.run_dir() == Path.home() / ".cache/baton/run"


def test_a_held_port_is_free_for_one_process_after_the_other_and_for_nobody_else() -> None:
    held = claim_port("127.0.0.1", 0)
    for _ in range(2):
        with socket.create_server((held.host, held.port)), pytest.raises(BatonError, match="Address already in use"):
            claim_port(held.host, held.port)
    with socket.socket() as lost, pytest.raises(ConnectionRefusedError):
        lost.connect((held.host, held.port))
    held.hold.close()


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:{}"), ("127.0.0.1", "http://127.0.0.1:{}")],
)
def test_the_url_is_one_that_works_from_here(host: str, url: str) -> None:
    port = claim_port(host, 0)
    assert port.url == url.format(port.port)
    assert port.is_local is (host == "127.0.0.1")
    port.hold.close()
