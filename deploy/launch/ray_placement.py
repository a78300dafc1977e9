"""Which node of a Ray cluster a worker goes to. Pure: what the cluster is like is passed in, and nothing of Ray is
imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .launcher import Resources

TYPE_SHARE = 0.001
"""What a rank takes of the resource by which Ray names a node's accelerator: its presence matters, not its amount."""
DIGITS = 4
"""Ray counts in ten-thousandths."""
TOLD_NODES = 6
"""Nodes of which a complaint speaks at most."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node that lives. `free` is what of `total` nobody has."""

    id: str
    name: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Place:
    """What one worker has, or is about to get, and where. `node` is empty while no node has room."""

    pool: str
    node: str
    needs: Mapping[str, float]


def needs(resources: Resources) -> dict[str, float]:
    """All ranks of a worker together, in Ray's names: one bundle, since a bundle never spans nodes and an actor sees
    the GPUs of one bundle only."""
    each = {"CPU": resources.cpus, "GPU": resources.gpus, **dict(resources.custom)}
    if resources.accelerator_type:
        each[f"accelerator_type:{resources.accelerator_type}"] = TYPE_SHARE
    return {name: round(amount * resources.ranks, DIGITS) for name, amount in each.items() if amount}


def survey(
    table: Sequence[Mapping[str, Any]], free: Mapping[str, Mapping[str, float]], places: Collection[Place]
) -> list[Node]:
    """The nodes that live, from `ray.nodes()` and from what Ray says is free on each. That word is a moment old: what
    `places` take is counted at once."""
    nodes = []
    for row in table:
        if not row["Alive"]:
            continue
        total, said = row["Resources"], free.get(row["NodeID"], {})
        ours: Counter[str] = Counter()  # of floats
        for place in places:
            if place.node == row["NodeID"]:
                ours.update(place.needs)
        left = {name: min(amount - ours[name], said.get(name, 0.0)) for name, amount in total.items()}
        nodes.append(Node(row["NodeID"], row["NodeName"], row["NodeManagerAddress"], total, left))
    return nodes


def choose(
    nodes: Sequence[Node], wanted: Place, placement: str, places: Collection[Place], avoid: Collection[str]
) -> Node | None:
    """The node for a worker, `placement` being spread or pack; None where no node has room.

    Spread: where the fewest workers of its pool are, then the fewest of all pools. Pack: where the most are. Nodes in
    `avoid` come last.
    """
    sign = -1 if placement == "pack" else 1
    of_pool = Counter(place.node for place in places if place.pool == wanted.pool)
    of_all = Counter(place.node for place in places)
    fitting = [node for node in nodes if not _lacks(node.free, wanted.needs)]
    return min(
        fitting,
        key=lambda node: (node.id in avoid, sign * of_pool[node.id], sign * of_all[node.id], node.id),
        default=None,
    )


def complaint(nodes: Sequence[Node], wanted: Mapping[str, float]) -> str:
    """Why no node can take `wanted`, in one line."""
    what = _amounts(wanted, list(wanted))
    reasons = []
    for node in nodes[:TOLD_NODES]:
        never, now = _lacks(node.total, wanted), _lacks(node.free, wanted)
        if never:
            reasons.append(f"{node.name} has {_amounts(node.total, never)} at all")
        elif now:
            reasons.append(f"{node.name} has {_amounts(node.free, now)} free")
        else:
            reasons.append(f"{node.name} has room but did not take it")
    if len(nodes) > TOLD_NODES:
        reasons.append(f"and {len(nodes) - TOLD_NODES} nodes more")
    return f"no node has room for {what}: {'; '.join(reasons) or 'no node lives'}"


def _lacks(has: Mapping[str, float], wanted: Mapping[str, float]) -> list[str]:
    return [name for name, amount in wanted.items() if round(has.get(name, 0.0), DIGITS) < amount]


def _amounts(has: Mapping[str, float], names: Sequence[str]) -> str:
    return ", ".join(_amount(name, has.get(name, 0.0)) for name in names)


def _amount(name: str, amount: float) -> str:
    if amount <= 0:
        return f"no {name}"
    return name if ":" in name else f"{name} {amount:g}"  # accelerator_type:H100
