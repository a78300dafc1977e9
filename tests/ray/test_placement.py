"""Where workers go: a pure function of nodes and of what is placed already."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from baton.deploy.launch.launcher import Resources
from baton.deploy.launch.ray_placement import Node, Place, choose, complaint, needs, survey


def node(name: str, **free: float) -> Node:
    return Node(name, name, "10.0.0.1", {"CPU": 8.0, "GPU": 8.0} | free, {"CPU": 8.0, "GPU": 8.0} | free)


def row(name: str, alive: bool = True, **total: float) -> dict[str, object]:
    return {
        "NodeID": name,
        "NodeName": name,
        "NodeManagerAddress": "10.0.0.1",
        "Alive": alive,
        "Resources": total,
    }


NODES = [node("a"), node("b"), node("c")]


def fill(placement: str, pools: list[str], nodes: list[Node], **wanted: float) -> list[str]:
    """The nodes that workers of these pools get, one after the other; room is without end."""
    places: list[Place] = []
    for pool in pools:
        place = Place(pool, "", wanted)
        chosen = choose(nodes, place, placement, places, ())
        assert chosen is not None
        places.append(replace(place, node=chosen.id))
    return [place.node for place in places]


def test_spread_puts_a_pool_on_as_many_nodes_as_there_are_and_pools_beside_each_other() -> None:
    assert fill("spread", ["p", "p", "d", "d", "d"], NODES[:2]) == ["a", "b", "a", "b", "a"]
    assert fill("spread", ["p", "d", "p"], NODES) == ["a", "b", "c"], "an empty node before one with another pool"


def test_pack_fills_a_node_and_begins_where_others_are() -> None:
    assert fill("pack", ["p", "p", "d", "d"], NODES) == ["a"] * 4


def test_only_nodes_with_room_count_and_suspects_come_last() -> None:
    nodes = [node("a", GPU=1.0), node("b", GPU=2.0), node("c", GPU=2.0)]
    wanted = Place("p", "", {"GPU": 2.0})
    assert choose(nodes, wanted, "spread", (), ()) == nodes[1]
    assert choose(nodes, wanted, "spread", (), {"b"}) == nodes[2]
    assert choose(nodes, wanted, "spread", (), {"b", "c"}) == nodes[1], "better than none"
    assert choose(nodes, Place("p", "", {"GPU": 4.0}), "spread", (), ()) is None


def test_the_ranks_of_a_worker_are_one_bundle() -> None:
    resources = Resources(ranks=3, cpus=0.1, gpus=1, accelerator_type="H100", custom=(("fast", 2.0), ("none", 0.0)))
    assert needs(resources) == {"CPU": 0.3, "GPU": 3.0, "fast": 6.0, "accelerator_type:H100": 0.003}
    assert needs(Resources()) == {"CPU": 1.0}


def test_what_was_placed_a_moment_ago_is_taken_though_ray_does_not_say_so_yet() -> None:
    table = [row("a", CPU=4.0), row("b", CPU=4.0), row("gone", alive=False, CPU=4.0)]
    said = {"a": {"CPU": 4.0}, "b": {"CPU": 1.5}}
    nodes = survey(table, said, [Place("p", "a", {"CPU": 3.0}), Place("p", "b", {"CPU": 1.0})])
    assert [(n.id, n.free["CPU"]) for n in nodes] == [("a", 1.0), ("b", 1.5)]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"GPU": 9.0}, "no node has room for GPU 9: a has GPU 8 at all"),
        ({"CPU": 8.0, "accelerator_type:H100": 0.001}, "CPU 8, accelerator_type:H100: a has no accelerator_type:H100"),
        ({"CPU": 3.0}, "no node has room for CPU 3: a has CPU 2 free"),
    ],
)
def test_a_complaint_says_what_is_missing_where(wanted: dict[str, float], said: str) -> None:
    lacking = replace(node("a"), free={"CPU": 2.0, "GPU": 0.0})
    assert said in complaint([lacking], wanted)


def test_a_complaint_is_one_short_line_on_a_large_cluster() -> None:
    words = complaint([node(f"node-{i}", GPU=0.0) for i in range(1000)], {"GPU": 1.0})
    assert words.endswith("and 994 nodes more") and len(words) < 300
    assert complaint([], {"CPU": 1.0}).endswith("no node lives")


def test_without_ray_asked_for_ray_is_not_imported() -> None:
    code = "import sys, baton.deploy.cli, baton.deploy.launch.launcher; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
