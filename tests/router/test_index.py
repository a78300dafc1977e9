"""The prefix index against a model of plain sets, its bound, and its order of eviction."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.common.messages import KvEvents
from baton.router.index import PrefixIndex

HASHES = [bytes([i]) * 16 for i in range(12)]
WORKERS = ("a", "b", "c")

some = st.lists(st.sampled_from(HASHES), max_size=5).map(tuple)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("event"), st.sampled_from(WORKERS), some, some),
        st.tuples(st.just("lost"), st.sampled_from(WORKERS), some, some),  # an event that never arrives
        st.tuples(st.just("reset"), st.sampled_from(WORKERS), some, st.just(())),
        st.tuples(st.just("drop"), st.sampled_from(WORKERS), st.just(()), st.just(())),
    ),
    max_size=40,
)


class Model:
    """What each worker caches, and what an index may know of it: everything, or nothing after a miss."""

    def __init__(self) -> None:
        self.seq = dict.fromkeys(WORKERS, 0)
        self.next: dict[str, int | None] = dict.fromkeys(WORKERS)
        self.known: dict[str, set[bytes]] = {w: set() for w in WORKERS}

    def event(self, w: str, stored: tuple[bytes, ...], evicted: tuple[bytes, ...]) -> tuple[KvEvents, bool]:
        self.seq[w] += 1
        events = KvEvents(self.seq[w], stored, evicted)
        missed = self.next[w] is not None and self.next[w] != self.seq[w]
        if self.next[w] == self.seq[w]:
            self.known[w] = (self.known[w] - set(evicted)) | set(stored)
            self.next[w] = self.seq[w] + 1
        elif missed:
            self.known[w], self.next[w] = set(), None
        return events, missed


@settings(max_examples=150, deadline=None)
@given(steps, st.lists(st.sampled_from(HASHES), max_size=8))
def test_index_knows_what_the_events_said_and_nothing_after_a_miss(
    script: list[tuple[str, str, tuple[bytes, ...], tuple[bytes, ...]]], chain: list[bytes]
) -> None:
    index, model = PrefixIndex(10_000), Model()
    for kind, w, stored, evicted in script:
        match kind:
            case "event":
                events, missed = model.event(w, stored, evicted)
                assert index.apply(w, events) is missed
            case "lost":
                model.seq[w] += 1
            case "reset":
                assert not index.apply(w, KvEvents(model.seq[w], stored, reset=True))
                model.known[w], model.next[w] = set(stored), model.seq[w] + 1
            case _:
                index.drop_worker(w)
                model.known[w], model.next[w] = set(), None
        assert len(index) == sum(map(len, model.known.values()))
    expected = {}
    for w, known in model.known.items():
        held = next((i for i, h in enumerate(chain) if h not in known), len(chain))
        if held:
            expected[w] = held
    assert index.match(chain) == expected


@settings(max_examples=100, deadline=None)
@given(steps, st.integers(1, 8))
def test_index_never_exceeds_its_bound(
    script: list[tuple[str, str, tuple[bytes, ...], tuple[bytes, ...]]], bound: int
) -> None:
    index = PrefixIndex(bound)
    for w in WORKERS:
        index.apply(w, KvEvents(0, reset=True))
    for seq, (_, w, stored, _) in enumerate(script):
        index.apply(w, KvEvents(seq, stored, reset=True))
        assert len(index) <= bound
        assert len(index) == sum(index.blocks(name) for name in WORKERS)


def test_the_least_recently_touched_goes_first_and_a_chain_loses_its_end_before_its_head() -> None:
    index = PrefixIndex(6)
    first, second, third = HASHES[:3], HASHES[3:6], HASHES[6:9]
    index.apply("a", KvEvents(0, tuple(first), reset=True))
    index.apply("a", KvEvents(1, tuple(second)))
    index.touch("a", first)
    index.apply("a", KvEvents(2, tuple(third[:2])))
    assert index.match(first) == {"a": 3}
    assert index.match(second) == {"a": 1}
    assert index.match(third) == {"a": 2}


def test_the_largest_worker_gives_way() -> None:
    index = PrefixIndex(5)
    index.apply("large", KvEvents(0, tuple(HASHES[:4]), reset=True))
    index.apply("small", KvEvents(0, tuple(HASHES[:2]), reset=True))
    assert (index.blocks("large"), index.blocks("small")) == (3, 2)


def test_a_miss_is_reported_once_and_a_reset_heals_it() -> None:
    index = PrefixIndex(100)
    index.apply("a", KvEvents(5, tuple(HASHES[:2]), reset=True))
    assert index.apply("a", KvEvents(7, (HASHES[3],)))
    assert index.match(HASHES) == {}
    assert not index.apply("a", KvEvents(8, (HASHES[0],)))
    assert index.match(HASHES) == {}
    index.apply("a", KvEvents(8, tuple(HASHES[:3]), reset=True))
    index.apply("a", KvEvents(9, (HASHES[3],), (HASHES[2],)))
    assert index.match(HASHES) == {"a": 2}
