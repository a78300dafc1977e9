"""A step that is taken from the one before is the one that asking every sequence gives."""

from __future__ import annotations

import random
from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.common.hashing import BlockHasher
from baton.decode.planner import ContinuousBatching
from baton.engine.block_table import BlockTable, Flight
from baton.engine.plan import StepPlan
from baton.engine.sequence import Sequence
from tests.toy import request

SIZE = 4
TURNS = ["step"] * 12 + ["join"] * 3 + ["stop", "pause", "resume", "recompute", "unlaunched", "tight"]


class Decoding:
    """A planner over its own table, driven by chance. `forgetful`: it knows nothing of the step before."""

    def __init__(self, seed: int, blocks: int, forgetful: bool, outputs: tuple[int, ...] = (2, 5, 40)) -> None:
        self.rng, self.forgetful, self.outputs = random.Random(seed), forgetful, outputs
        self.table = BlockTable(blocks, BlockHasher(SIZE))
        self.planner = ContinuousBatching(self.table)
        self.flights: deque[tuple[StepPlan, Flight]] = deque()
        self.tickets = self.repeated = 0
        self.last: list[Sequence] = []

    def join(self) -> None:
        self.tickets += 1
        prompt = [self.rng.randrange(99) for _ in range(self.rng.randrange(1, 12))]
        what = request("", prompt, self.rng.choice(self.outputs))
        sequence = Sequence(("r", self.tickets), what, 1, self.rng.random(), 9.0)
        if self.planner.preempted or not self.table.admit(sequence, 0, len(prompt) + self.rng.choice([0, 1, 9])):
            return
        self.table.advance(sequence, len(prompt))
        sequence.tokens.append(self.rng.randrange(99))
        self.planner.join(sequence)

    def someone(self) -> Sequence | None:
        return self.rng.choice(self.planner.running) if self.planner.running else None

    def turn(self, what: str) -> object:
        sequence = self.someone()
        if what == "join":
            self.join()
        elif what == "stop" and sequence:
            self.planner.remove(sequence)
        elif what == "pause" and sequence:
            self.planner.pause(sequence)
        elif what == "resume":
            for paused in sorted(self.planner._paused, key=lambda s: s.key):
                self.planner.resume(paused)
        elif what == "recompute" and sequence:
            self.planner.recompute(sequence)
        elif what in ("step", "unlaunched", "tight"):
            return self.step(self.rng.randrange(4) if what == "tight" else 99, what != "unlaunched")
        return None

    def step(self, budget: int, launch: bool) -> object:
        if self.forgetful:
            self.planner._before = None
        plan = StepPlan(budget, ahead=bool(self.flights))
        self.planner.plan(plan)
        if plan.short:
            self.collect()
        elif launch and plan:
            self.flights.append((plan, self.table.launch(plan)))
            self.repeated += plan.decodes is self.last
            self.last = plan.decodes
        if len(self.flights) > 1 or not plan:
            self.collect()
        parts = [(part.sequence.key, part.start, part.count, part.samples) for part in plan.parts]
        held = [(s.key, s.blocks.tolist(), s.launched, s.computed, s.pending) for s in self.table.holders()]
        return parts, plan.short, plan.budget, held, self.planner.preemptions

    def collect(self) -> None:
        if not self.flights:
            return
        plan, flight = self.flights.popleft()
        self.table.computed(plan)
        for part in plan.parts:
            sequence = part.sequence
            if part.samples and sequence not in flight.gone and sequence.accept(self.rng.randrange(99)):
                self.planner.remove(sequence)
        self.table.end()
        self.table.check()


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1 << 30), blocks=st.integers(6, 40), turns=st.lists(st.sampled_from(TURNS), max_size=60))
def test_whatever_happens_between_the_steps(seed: int, blocks: int, turns: list[str]) -> None:
    one, other = (Decoding(seed, blocks, forgetful) for forgetful in (False, True))
    for what in turns:
        assert one.turn(what) == other.turn(what)
    assert other.repeated == 0


def test_it_is_the_usual_way() -> None:
    decoding = Decoding(seed=1, blocks=999, forgetful=False, outputs=(40,))
    for what in ["join"] * 5 + ["step"] * 31:
        decoding.turn(what)
    assert decoding.repeated == 30
