"""Commands that change a cluster: what they send, when they ask, what they wait for, and how they end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from baton.deploy import cli
from baton.deploy.cli import client, logs, wait

from .fake_admin import STATUS, FakeAdmin, pools, publish, serving


@pytest.fixture
def admin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAdmin]:
    """The only cluster of this machine."""
    for name in ("BATON_ADMIN_URL", "BATON_ADMIN_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BATON_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(wait, "POLL_S", 0.001)
    monkeypatch.setattr(logs, "POLL_S", 0.001)
    with serving() as fake:
        publish(tmp_path / "run", "default", fake.url)
        yield fake


def sent(admin: FakeAdmin) -> list[tuple[str, object]]:
    return [(call, body) for call, body in admin.calls if call != "GET /v1/status"]


# --- scale -----------------------------------------------------------------------------------------------------------


def test_scale_shows_the_steps_and_waits_until_all_are_ready(
    admin: FakeAdmin, capsys: pytest.CaptureFixture[str]
) -> None:
    loading = pools(prefill=(1, 2), decode=(2, 2))
    admin.then(loading, pools(prefill=(2, 2), decode=(2, 2)))
    assert cli.run(["scale", "prefill=2"]) == 0
    said = capsys.readouterr()
    assert sent(admin) == [("POST /v1/scale", {"pools": {"prefill": 2}})]
    assert said.out.startswith("start prefill-1\ndone after ")
    assert said.err == "prefill: 1 of 2 ready\n"


def test_scale_waits_for_those_that_leave(admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    full = pools(prefill=(1, 1), decode=(2, 2))
    drained = replace(full, pools=pools(prefill=(1, 1), decode=(1, 1)).pools)
    leaving = replace(drained, workers=(*full.workers[:-1], replace(full.workers[-1], state="leaving")))
    admin.statuses = [full]
    admin.then(leaving, pools(prefill=(1, 1), decode=(1, 1)))
    assert cli.run(["scale", "decode=1", "--yes"]) == 0
    assert capsys.readouterr().err == "decode-1 leaving\n"


def test_scale_waits_for_one_that_must_not_leave_yet(admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    """It is ready, and works on until the only other worker that can is: one of a pool that nobody scales."""
    held = pools(prefill=(1, 1), decode=(1, 0), big=(0, 1))
    held = replace(held, pools=tuple(replace(p, ready=0) if p.name == "decode" else p for p in held.pools))
    admin.statuses = [pools(prefill=(1, 1), decode=(1, 1), big=(0, 1))]
    admin.then(held, pools(prefill=(1, 1), decode=(0, 0), big=(1, 1)))
    assert cli.run(["scale", "decode=0", "--yes"]) == 0
    assert capsys.readouterr().err == "decode: 1 ready, which is 1 too many\n"


def test_scale_that_is_not_to_wait_does_not_look_again(admin: FakeAdmin) -> None:
    admin.then(pools(prefill=(1, 2)))
    assert cli.run(["scale", "prefill=2", "--no-wait"]) == 0
    assert [call for call, _ in admin.calls] == ["GET /v1/status", "POST /v1/scale"]


def test_scale_ends_with_5_when_the_time_is_over(admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    admin.then(pools(prefill=(1, 2)))
    assert cli.run(["scale", "prefill=2", "--timeout", "0"]) == 5
    assert "not reached within 0 s: prefill: 1 of 2 ready" in capsys.readouterr().err


def test_scale_ends_with_1_when_a_worker_is_given_up(admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    stuck = pools(prefill=(1, 2))
    failed = replace(stuck.workers[0], name="prefill-1", state="failed", detail="out of memory, 5 times")
    admin.then(replace(stuck, workers=(*stuck.workers, failed)))
    assert cli.run(["scale", "prefill=2"]) == 1
    assert "baton: prefill-1 was given up: out of memory, 5 times\n" in capsys.readouterr().err


def test_scale_ends_with_1_when_somebody_else_scales(admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    admin.then(pools(prefill=(1, 4)))
    assert cli.run(["scale", "prefill=2"]) == 1
    assert "it shall have 4 workers now" in capsys.readouterr().err


def test_scale_that_was_asked_for_before_is_waited_for_as_well(
    admin: FakeAdmin, capsys: pytest.CaptureFixture[str]
) -> None:
    admin.answers["POST /v1/scale"] = (200, {"steps": []})
    admin.statuses = [pools(decode=(1, 2)), pools(decode=(1, 2)), pools(decode=(2, 2))]
    assert cli.run(["scale", "decode=2"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("nothing to do\ndone after ")
    assert said.err == "decode: 1 of 2 ready\n"


@pytest.mark.parametrize("word", ["prefill", "prefill=", "=2", "prefill=-1", "prefill=two"])
def test_scale_wants_pools_with_counts(admin: FakeAdmin, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["scale", word]) == 2
    assert "is not POOL=COUNT" in capsys.readouterr().err
    assert admin.calls == []


def test_scale_takes_a_pool_once(admin: FakeAdmin) -> None:
    assert cli.run(["scale", "decode=1", "decode=2"]) == 2


# --- asking ----------------------------------------------------------------------------------------------------------

DESTRUCTIVE = [["scale", "decode=1"], ["drain", "decode-1"], ["rollout"], ["down"]]


@pytest.mark.parametrize("command", DESTRUCTIVE)
def test_what_destroys_is_not_done_where_nobody_can_be_asked(
    admin: FakeAdmin, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(command) == 2
    assert "say --yes" in capsys.readouterr().err
    assert sent(admin) == []


@pytest.mark.parametrize("command", DESTRUCTIVE)
def test_what_destroys_is_not_done_after_a_no(
    admin: FakeAdmin, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", refuse)
    assert cli.run(command) == 130
    assert sent(admin) == []


def refuse(question: str, abort: bool, err: bool) -> None:
    import typer

    assert question.endswith("?")
    assert abort
    assert err
    raise typer.Abort


# --- drain, rollout, down --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "now"), [([], False), (["--now"], True)])
def test_drain_waits_until_the_worker_is_gone(
    admin: FakeAdmin, flags: list[str], now: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    draining = replace(STATUS.workers[1], state="draining")
    admin.then(replace(STATUS, workers=(draining,)), replace(STATUS, workers=()))
    assert cli.run(["drain", "decode-0", "--yes", *flags]) == 0
    assert sent(admin) == [("POST /v1/drain", {"worker": "decode-0", "now": now})]
    assert capsys.readouterr().err == "decode-0 draining, requests: 7\n"


def test_drain_says_of_which_pool_a_worker_is_that_was_turned(
    admin: FakeAdmin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda question, **_: asked.append(question))
    turned = replace(STATUS.workers[1], pool="prefill", role="prefill")
    admin.statuses = [replace(STATUS, workers=(STATUS.workers[0], turned, STATUS.workers[2]))]
    admin.then(replace(STATUS, workers=()))
    assert cli.run(["drain", "decode-0", "--now"]) == 0
    assert asked == ["Drain decode-0 of pool prefill?"]
    assert capsys.readouterr().out.startswith("decode-0 of pool prefill takes nothing new; its requests move\n")


def test_rollout_sends_what_changes_and_waits_for_its_end(
    admin: FakeAdmin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    admin.then(replace(STATUS, revision=4, rollout="to revision 4: 1 of 3 workers"), replace(STATUS, revision=4))
    options = ["--set", "engine.max_running=64", "--set", "engine.kv_memory=2GiB", "--set", "decode.engine.tp=2"]
    assert cli.run(["rollout", "--weights", str(tmp_path), *options, "--yes"]) == 0
    values = {"engine.max_running": 64, "engine.kv_memory": 2 << 30, "decode.engine.tp": 2}
    assert sent(admin) == [("POST /v1/rollout", {"model": str(tmp_path), "set": values})]
    assert capsys.readouterr().err == "to revision 4: 1 of 3 workers\n"


def test_rollout_that_was_undone_ends_with_1_and_the_reason(
    admin: FakeAdmin, capsys: pytest.CaptureFixture[str]
) -> None:
    admin.then(replace(STATUS, revision=4, rollout="to revision 4: 1 of 3 workers"), STATUS)
    assert cli.run(["rollout", "--yes"]) == 1
    assert "it was undone, all is as before: decode-1 ended (exit code 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("engine.max_running", "is not OPTION=VALUE"),
        ("port=1", "with an option of engine, handover or worker"),
        ("engine.max_runing=1", "--set engine.max_runing: no such field here; known: block_size"),
        ("engine.max_running=0", "--set engine.max_running: 0 is out of range"),
        ("engine.max_running=[", "--set engine.max_running: '[' is not a value"),
    ],
)
def test_rollout_checks_options_before_it_asks(
    admin: FakeAdmin, option: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["rollout", "--set", option, "--yes"]) == 2
    assert says in capsys.readouterr().err
    assert admin.calls == []


def test_down_waits_until_the_parent_has_ended(
    admin: FakeAdmin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    publish(tmp_path / "run", "default", admin.url, parent.pid)

    def end(_: str) -> None:
        parent.communicate(b"\n", timeout=30)

    admin.after = end
    assert cli.run(["down", "--yes"]) == 0
    assert sent(admin) == [("POST /v1/down", {})]
    assert capsys.readouterr().out == "ended\n"


def test_down_of_a_cluster_elsewhere_waits_for_its_silence(admin: FakeAdmin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_ADMIN_TOKEN", "operators-only")
    asked = iter([STATUS, STATUS])
    monkeypatch.setattr(client.AdminClient, "status", lambda _: next(asked, None) or silent())
    assert cli.run(["down", "--yes", "--admin", admin.url]) == 0


def silent() -> None:
    raise cli.exits.NoCluster("gone")


def test_down_that_does_not_end_in_time_is_not_reached(admin: FakeAdmin) -> None:
    assert cli.run(["down", "--yes", "--timeout", "0"]) == 5


# --- how commands end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "code", "says"),
    [
        (400, {"error": {"message": "no pool 'x'; there are a"}}, 4, "baton: no pool 'x'; there are a\n"),
        (409, {"error": {"message": "a rollout is under way"}}, 4, "baton: a rollout is under way\n"),
        (503, {"error": {"message": "no worker is ready"}}, 4, "baton: no worker is ready\n"),
        (500, {"error": {"message": "unexpected"}}, 1, "baton: unexpected\n"),
        (502, b"<html>", 1, "/v1/scale answered 502 Bad Gateway\n"),
        (200, b"<html>", 1, "answers what this version of baton cannot read"),
    ],
)
def test_a_no_of_the_cluster_is_told_apart_from_a_failure(
    admin: FakeAdmin, status: int, body: object, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    admin.answers["POST /v1/scale"] = (status, body)
    assert cli.run(["scale", "prefill=2"]) == code
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_controller_that_is_away_is_waited_for(
    admin: FakeAdmin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: Iterator[Callable[[], object]] = iter([lambda: STATUS, silent, lambda: pools(prefill=(2, 2))])
    monkeypatch.setattr(client.AdminClient, "status", lambda _: next(answers)())
    assert cli.run(["scale", "prefill=2"]) == 0
    assert capsys.readouterr().err == "gone\n"


def test_a_cluster_that_ends_meanwhile_is_not_waited_for(
    admin: FakeAdmin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    publish(tmp_path / "run", "default", admin.url, parent.pid)
    answers: Iterator[Callable[[], object]] = iter([lambda: STATUS])
    monkeypatch.setattr(client.AdminClient, "status", lambda _: next(answers, silent)())
    admin.after = lambda _: parent.communicate(b"\n", timeout=30) and None
    assert cli.run(["scale", "prefill=2"]) == 3


def test_ctrl_c_ends_with_130(admin: FakeAdmin, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    admin.then(pools(prefill=(1, 2)))
    monkeypatch.setattr(wait.time, "sleep", interrupt)
    assert cli.run(["scale", "prefill=2"]) == 130


# --- finding a cluster -----------------------------------------------------------------------------------------------


def test_no_cluster_is_exit_code_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, admin: FakeAdmin) -> None:
    monkeypatch.setenv("BATON_RUN_DIR", str(tmp_path / "nowhere"))
    assert cli.run(["status"]) == 3
    assert cli.run(["status", "--cluster", "default"]) == 3
    assert cli.run(["status", "--admin", "http://127.0.0.1:1"]) == 3
    assert cli.run(["status", "--admin", "no url"]) == 3
    assert admin.calls == []


def test_a_run_file_that_a_dead_parent_left_counts_for_nothing(
    admin: FakeAdmin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(30)
    publish(tmp_path / "run", "default", admin.url, ended.pid)
    assert cli.run(["status"]) == 3
    publish(tmp_path / "run", "other", admin.url)
    assert cli.run(["status"]) == 0


def test_of_several_clusters_one_is_to_be_named(
    admin: FakeAdmin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path / "run", "other", "http://127.0.0.1:1")
    assert cli.run(["status"]) == 2
    assert "several clusters run here: default, other; say --cluster NAME" in capsys.readouterr().err
    assert cli.run(["status", "--cluster", "default"]) == 0
    assert cli.run(["status", "--cluster", "other"]) == 3


def test_a_url_goes_with_the_token_of_the_environment(admin: FakeAdmin, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.run(["status", "--admin", admin.url]) == 4, "no token"
    monkeypatch.setenv("BATON_ADMIN_TOKEN", "operators-only")
    assert cli.run(["status", "--admin", admin.url + "/"]) == 0
    monkeypatch.setenv("BATON_ADMIN_URL", admin.url)
    assert cli.run(["status"]) == 0
    monkeypatch.setenv("BATON_ADMIN_URL", "http://127.0.0.1:1")
    assert cli.run(["status"]) == 3
    assert cli.run(["status", "--cluster", "default"]) == 0, "a name goes before the environment"
