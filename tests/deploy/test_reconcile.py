"""What follows from what is desired and what is: single decisions, and whole stories in a small simulated world."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.common.cluster import End, Launch, Phase, ProcessStatus, WorkerState, WorkerStatus
from baton.common.config import WorkerConfig
from baton.common.errors import BatonError
from baton.common.json_form import from_json
from baton.common.messages import Load
from baton.common.types import Role
from baton.deploy.control import rollout
from baton.deploy.control.desired import Desired, Leaving, drain, gone, load, save, scale, untangle
from baton.deploy.control.reconcile import (
    Forget,
    TurnWorker,
    World,
    departing,
    members,
    reconcile,
    serving,
    worker_order,
)
from tests.deploy.pools import ENGINE, desired

P, D = Role.PREFILL, Role.DECODE
BUSY = Load(running=3)


@dataclass
class Fleet:
    """Processes and what they say. All that was launched runs at once; a new worker becomes ready when told to."""

    processes: dict[str, ProcessStatus] = field(default_factory=dict)
    words: dict[str, WorkerStatus] = field(default_factory=dict)
    silence: set[str] = field(default_factory=set)
    pids: int = 0

    @property
    def world(self) -> World:
        return World(
            processes=dict(self.processes),
            words=dict(self.words),
            silence=frozenset(self.silence),
            settled=frozenset(self.words),
        )

    def run(self, wanted: Desired) -> tuple[Desired, bool]:
        """Carry out one round; whether anything was to be done."""
        wanted = untangle(wanted, self.world.roles())
        actions = reconcile(wanted, self.world)
        for action in actions:
            match action:
                case Launch():
                    assert action.name not in self.processes, "the old one was not ended first"
                    self.start(action)
                case End():
                    self.end(action.name)
                case TurnWorker():
                    self.words[action.name] = replace(self.words[action.name], role=str(action.role))
                case Forget():
                    wanted = gone(wanted, action.name)
        return wanted, bool(actions)

    def start(self, order: Launch) -> None:
        self.pids += 1
        self.processes[order.name] = ProcessStatus(order.name, Phase.RUNNING, order.digest, pid=self.pids)
        if order.kind == "worker":
            role = from_json(order.config, WorkerConfig).role
            self.words[order.name] = WorkerStatus(order.name, str(role), WorkerState.LOADING, pid=self.pids)

    def end(self, name: str) -> None:
        del self.processes[name]
        self.words.pop(name, None)
        self.silence.discard(name)

    def make_ready(self, *names: str, load: Load | None = None) -> None:
        for name in names or self.words:
            self.words[name] = replace(self.words[name], state=WorkerState.READY, address="a:1", epoch=1, load=load)

    def settle(self, wanted: Desired) -> Desired:
        for _ in range(60):
            self.make_ready()
            wanted, busy = self.run(wanted)
            ahead = rollout.advance(wanted, serving(wanted, self.world))
            if not busy and ahead == wanted:
                self.make_ready()
                return wanted
            wanted = ahead
        raise AssertionError(f"it never comes to rest: {reconcile(wanted, self.world)}")


def up(wanted: Desired) -> Fleet:
    fleet = Fleet()
    assert fleet.settle(wanted) == wanted
    return fleet


def states(wanted: Desired, fleet: Fleet) -> dict[str, str]:
    return {m.name: str(m.state) for m in members(wanted, fleet.world)}


def test_all_that_is_wanted_is_launched_with_all_it_needs() -> None:
    wanted = desired(gateways=2)
    orders = reconcile(wanted, Fleet().world)
    assert [(o.name, o.kind) for o in orders if isinstance(o, Launch)] == [
        ("gateway-0", "gateway"),
        ("gateway-1", "gateway"),
        ("prefill-0", "worker"),
        ("decode-0", "worker"),
    ]
    assert from_json(worker_order(wanted.assignments[0]).config, WorkerConfig) == wanted.assignments[0].worker


def test_a_controller_that_comes_back_finds_nothing_to_do() -> None:
    wanted = desired({P: 2, D: 2})
    fleet = up(wanted)
    again = load(save(wanted))
    assert again == wanted
    assert reconcile(again, fleet.world) == ()
    assert reconcile(again, replace(fleet.world, words={})) == (), "nor before anybody has reported"


def test_a_worker_that_died_is_the_parents_to_start_again() -> None:
    wanted = desired()
    fleet = up(wanted)
    for phase in (Phase.WAITING, Phase.STARTING, Phase.GIVEN_UP):
        fleet.processes["decode-0"] = replace(fleet.processes["decode-0"], phase=phase)
        assert reconcile(wanted, fleet.world) == ()


def test_a_silent_worker_is_killed_and_launched_anew() -> None:
    wanted = desired({P: 1, D: 2})
    fleet = up(wanted)
    fleet.silence.add("decode-0")
    assert reconcile(wanted, fleet.world) == (End("decode-0", 0.0),)
    wanted, _ = fleet.run(wanted)
    assert [o.name for o in reconcile(wanted, fleet.world) if isinstance(o, Launch)] == ["decode-0"]


def test_another_configuration_ends_the_old_process_first() -> None:
    wanted = desired()
    fleet = up(wanted)
    (worker,) = (a for a in wanted.assignments if a.name == "decode-0")
    wanted = wanted.edit("decode-0", worker=replace(worker.worker, max_waiting=7))
    (end,) = reconcile(wanted, fleet.world)
    assert isinstance(end, End)
    assert (end.name, end.within_s) == ("decode-0", 65.0)
    fleet.processes["decode-0"] = replace(fleet.processes["decode-0"], phase=Phase.ENDING)
    assert reconcile(wanted, fleet.world) == ()
    assert states(wanted, fleet)["decode-0"] == "leaving", "before it says so itself"


def test_what_nobody_wants_ends() -> None:
    wanted = desired({P: 1, D: 2})
    fleet = up(wanted)
    assert reconcile(gone(wanted, "decode-1"), fleet.world) == (End("decode-1", 5.0),)


def test_one_that_finishes_is_shown_as_draining_and_ends_when_it_holds_nothing() -> None:
    wanted = desired({P: 1, D: 2})
    fleet = up(wanted)
    fleet.make_ready("decode-1", load=BUSY)
    wanted = drain(wanted, "decode-1", now=False)
    assert states(wanted, fleet) == {"prefill-0": "ready", "decode-0": "ready", "decode-1": "draining"}
    assert reconcile(wanted, fleet.world) == ()
    fleet.make_ready("decode-1", load=Load())
    assert reconcile(wanted, replace(fleet.world, settled=frozenset())) == (), "that was said before gateways knew"
    assert reconcile(wanted, fleet.world) == (End("decode-1", 65.0),)
    wanted, _ = fleet.run(wanted)
    assert reconcile(wanted, fleet.world) == (Forget("decode-1"),)


def test_one_whose_requests_move_is_told_to_end_at_once() -> None:
    wanted = desired({P: 1, D: 2})
    fleet = up(wanted)
    fleet.make_ready("decode-1", load=BUSY)
    wanted = drain(wanted, "decode-1", now=True)
    assert states(wanted, fleet)["decode-1"] == "leaving"
    assert reconcile(wanted, fleet.world) == (End("decode-1", 65.0),)


def test_nobody_leaves_or_turns_before_another_one_does_its_work() -> None:
    wanted = desired({P: 2, D: 2})
    fleet = up(wanted)
    fleet.words["decode-0"] = replace(fleet.words["decode-0"], state=WorkerState.LOADING)
    for edited in (
        wanted.edit("decode-1", leaving=Leaving.MOVE),
        wanted.edit("decode-1", leaving=Leaving.FINISH),
        wanted.edit("decode-1", pool="prefill"),
    ):
        assert reconcile(edited, fleet.world) == ()
        assert states(edited, fleet)["decode-1"] == "ready"
        fleet.make_ready("decode-0")
        assert departing(edited, fleet.world) == {"decode-1"}
        assert reconcile(edited, fleet.world) != ()
        fleet.words["decode-0"] = replace(fleet.words["decode-0"], state=WorkerState.LOADING)


def test_a_worker_is_turned_once_and_shown_as_leaving_until_it_has() -> None:
    wanted = desired({P: 2, D: 1})
    fleet = up(wanted)
    wanted, _ = scale(wanted, {"prefill": 1, "decode": 2}, held={})
    assert reconcile(wanted, fleet.world) == (TurnWorker("prefill-1", "a:1", D),)
    assert reconcile(wanted, replace(fleet.world, turning=frozenset({"prefill-1"}))) == ()
    assert states(wanted, fleet)["prefill-1"] == "leaving"
    wanted, _ = fleet.run(wanted)
    assert {m.name: (m.role, m.state) for m in members(wanted, fleet.world)}["prefill-1"] == ("decode", "ready")
    assert reconcile(wanted, fleet.world) == ()


def test_a_turned_worker_that_is_started_again_is_turned_again() -> None:
    wanted = desired({P: 2, D: 1})
    fleet = up(wanted)
    wanted = fleet.settle(scale(wanted, {"prefill": 1, "decode": 2}, held={})[0])
    fleet.words["prefill-1"] = replace(fleet.words["prefill-1"], role="prefill", pid=99)
    assert states(wanted, fleet)["prefill-1"] == "leaving", "it never serves as what it began"
    assert [type(action) for action in reconcile(wanted, fleet.world)] == [TurnWorker]


def test_two_that_would_take_each_others_role_change_pools_instead() -> None:
    wanted = desired()
    fleet = up(wanted)
    crossed = wanted.edit("prefill-0", pool="decode").edit("decode-0", pool="prefill")
    assert reconcile(crossed, fleet.world) == (), "neither could begin"
    assert untangle(crossed, fleet.world.roles()) == wanted
    assert untangle(wanted, fleet.world.roles()) == wanted


def test_gateways_hear_of_no_load() -> None:
    wanted = desired()
    fleet = up(wanted)
    before = members(wanted, fleet.world)
    fleet.make_ready(load=BUSY)
    assert members(wanted, fleet.world) == before


# --- stories ---------------------------------------------------------------------------------------------------------


def disturb(fleet: Fleet, wanted: Desired, rng: random.Random) -> Desired:
    """An operator's command, a death, a restart of the controller, a rollout, or only time that passes."""
    names = [a.name for a in wanted.assignments]
    what = rng.choice(["scale", "drain", "die", "silent", "busy", "rollout", "abort", "restart", "pass"])
    try:
        match what:
            case "scale":
                counts = {str(role): rng.randrange(5) for role in (P, D)}
                return scale(wanted, counts, {n: fleet.world.held(n) for n in names if fleet.world.is_ready(n)})[0]
            case "drain":
                return drain(wanted, rng.choice(names), now=rng.random() < 0.5)
            case "rollout":
                engine = replace(ENGINE, max_running=rng.randrange(1, 99))
                pools = (replace(p, worker=replace(p.worker, engine=engine)) for p in wanted.pools)
                return rollout.begin(wanted, tuple(pools))
            case "abort":
                return rollout.abort(wanted)
            case "restart":
                return load(save(wanted))
    except BatonError:
        return wanted
    workers = [name for name in names if name in fleet.words]
    if workers:
        name = rng.choice(workers)
        if what == "die":  # and the parent starts it again, as it was launched
            fleet.start(worker_order(next(a for a in wanted.assignments if a.name == name)))
        elif what == "silent":
            fleet.silence.add(name)
        elif what == "busy" and fleet.words[name].load is not None:
            fleet.words[name] = replace(fleet.words[name], load=BUSY)
    return wanted


def sizes(wanted: Desired) -> Counter[str]:
    """How many workers each pool shall have."""
    return Counter(a.pool for a in wanted.staying)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_whatever_happens_it_comes_to_rest_and_never_takes_the_last_pair_away(seed: int) -> None:
    """And in the end each pool has as many workers as commands have left it: neither a turn nor a death nor a rollout,
    to its end or back, makes it larger or smaller."""
    rng = random.Random(seed)
    wanted = desired({P: 1, D: 1})
    fleet = up(wanted)
    asked = sizes(wanted)
    for _ in range(30):
        before, wanted = wanted, disturb(fleet, wanted, rng)
        if before.rollout is None and wanted.rollout is None:
            asked += sizes(wanted) - sizes(before)
            asked -= sizes(before) - sizes(wanted)
        could = {m.role for m in fleet.words.values() if m.state is WorkerState.READY and m.name not in fleet.silence}
        shown = {m.role for m in members(wanted, fleet.world) if m.state is WorkerState.READY}
        assert {"prefill", "decode"} & could <= shown or not {"prefill", "decode"} <= could
        wanted, _ = fleet.run(wanted)
        if fleet.words and rng.random() < 0.7:
            fleet.make_ready(rng.choice(sorted(fleet.words)), load=Load())
        wanted = rollout.advance(wanted, serving(wanted, fleet.world))
    wanted = fleet.settle(wanted)
    assert sizes(wanted) == asked
    assert reconcile(wanted, fleet.world) == ()
    assert fleet.processes.keys() == {a.name for a in wanted.assignments} | {"gateway-0"}
    assert {name: word.role for name, word in fleet.words.items()} == {
        a.name: wanted.role(a) for a in wanted.assignments
    }
