"""The stream of commands: one order for all, reports back, and an end that everybody hears of."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from baton.common.errors import EngineBroken, Unauthorized, WorkerLost
from baton.engine import follower as module
from baton.engine.follower import HERE, READY, Follower, Followers


@pytest.fixture
def followers() -> Iterator[Followers]:
    with contextlib.closing(Followers(2, timeout_s=1.0)) as made:
        yield made


def join(followers: Followers, rank: int) -> Follower:
    return Follower(followers.address, followers.token, rank, 1.0)


def test_all_followers_get_the_commands_of_all_threads_in_one_order(followers: Followers) -> None:
    seen: dict[int, list[tuple[int, int]]] = {1: [], 2: []}
    line = [join(followers, rank) for rank in (1, 2)]

    def follow(rank: int) -> None:
        with contextlib.suppress(WorkerLost):
            line[rank - 1].follow({"take": lambda *each: seen[rank].append(each), "done": line[rank - 1].report})

    threads = [threading.Thread(target=follow, args=(rank,)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    followers.wait_for(HERE)

    def send(sender: int) -> None:
        for number in range(100):
            followers.send("take", sender, number)

    senders = [threading.Thread(target=send, args=(sender,)) for sender in range(3)]
    for thread in senders:
        thread.start()
    for thread in senders:
        thread.join()
    followers.send("done", READY)
    followers.wait_for(READY)
    assert seen[1] == seen[2]
    assert all([n for s, n in seen[1] if s == sender] == list(range(100)) for sender in range(3))
    followers.close()
    for thread in threads:
        thread.join(5.0)
        assert not thread.is_alive()


def test_reports_reach_who_asked_for_them_with_their_rank(followers: Followers) -> None:
    heard: list[tuple[object, ...]] = []
    followers.subscribe("moved", lambda *report: heard.append(report))
    line = [join(followers, rank) for rank in (1, 2)]
    line[1].report("moved", [1, 2], b"bytes")
    for each in line:
        each.report(READY)
    followers.wait_for(READY)
    assert heard == [(2, [1, 2], b"bytes")]
    for each in line:
        each.close()


def test_who_leaves_is_lost_and_nothing_is_sent_any_more(followers: Followers) -> None:
    first, second = join(followers, 1), join(followers, 2)
    followers.wait_for(HERE)
    second.close()
    with pytest.raises(EngineBroken, match="rank 2 hung up"):
        followers.lost.result(5.0)
    with pytest.raises(EngineBroken, match="rank 2"):
        followers.send("run")
    first.close()


def test_who_does_not_read_is_lost(followers: Followers) -> None:
    join_both = [join(followers, rank) for rank in (1, 2)]
    followers.wait_for(HERE)
    with pytest.raises(EngineBroken, match="takes no commands"):
        for _ in range(100):
            followers.send("run", bytes(1 << 20))
    for each in join_both:
        each.close()


def test_who_says_nothing_is_not_waited_for_without_end(followers: Followers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.05)
    only = join(followers, 1)
    with pytest.raises(EngineBroken, match="have said nothing"):
        followers.wait_for(HERE)
    only.close()


def test_an_unknown_command_ends_the_follower(followers: Followers) -> None:
    line = [join(followers, rank) for rank in (1, 2)]
    followers.wait_for(HERE)
    followers.send("fly")
    for each in line:
        with pytest.raises(EngineBroken, match="unknown command 'fly'"):
            each.follow({})
        each.close()


def test_the_first_command_may_be_one_that_is_waited_for(followers: Followers) -> None:
    line = [join(followers, rank) for rank in (1, 2)]
    followers.wait_for(HERE)
    followers.send("meet")
    followers.send("run")
    for each in line:
        each.expect("meet")
        with pytest.raises(EngineBroken, match="command 'run' where 'meet' is expected"):
            each.expect("meet")
        each.close()


def test_strangers_are_not_let_in(followers: Followers) -> None:
    with pytest.raises((Unauthorized, WorkerLost)):
        Follower(followers.address, "guess", 1)
