"""Dashboard and alerts ask only for metrics, labels and buckets that really exist."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import promql_parser
import pytest
import yaml

from baton.common.cluster import Phase, ProcessStatus
from baton.common.config import EngineConfig, WorkerConfig
from baton.common.messages import Load
from baton.common.types import Role
from baton.deploy.control.desired import Desired, Pool, add
from baton.deploy.control.metrics import Numbers
from baton.deploy.control.reconcile import World
from baton.deploy.launch.launcher import Resources
from baton.gateway.fleet_metrics import FleetNumbers
from baton.gateway.metrics import Metrics
from baton.router.stats import Snapshot, Stats, WorkerSnapshot

FOLDER = Path(__file__).parents[2] / "deploy" / "observability"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana-dashboard.json").read_text())
ALERTS: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = {rule["alert"]: rule["expr"] for rule in ALERTS} | {
    f"{panel['title']} {target['refId']}": target["expr"].replace("$__rate_interval", "5m").replace("$worker", ".*")
    for panel in PANELS
    for target in panel["targets"]
}

Sample = tuple[str, dict[str, str]]


def gateway_samples() -> list[Sample]:
    """All that a gateway shows to Prometheus after some traffic."""
    stats = Stats()
    for counter in (stats.decisions, stats.retries, stats.moves):
        counter["some"] += 1
    load = Load(total_blocks=4, handover_aborts=(("corrupt_block", 1),))
    worker = WorkerSnapshot("prefill-0", Role.PREFILL, "ready", 1, load, 0, 0, 0)
    snapshot = Snapshot((worker,), 0, 0, 0, stats, members=Counter({("prefill", "ready"): 1}))
    metrics = Metrics("gateway-0", FleetNumbers(lambda: snapshot, lambda: 0.0))
    metrics.arrived(0.1, 2, first=True)
    metrics.requests.labels("stop").inc()
    return [(s.name, s.labels) for family in metrics.registry.collect() for s in family.samples]


def controller_samples() -> list[Sample]:
    """All that a controller shows to Prometheus that keeps one worker and has started it again."""
    worker = WorkerConfig(name="", role=Role.PREFILL, engine=EngineConfig(model="m"))
    desired = add(Desired(pools=()), pool := Pool(name="prefill", worker=worker, resources=Resources()))
    process = ProcessStatus("prefill-0", Phase.RUNNING, restarts=1)
    controller = SimpleNamespace(
        desired=replace(desired, pools=(pool,)),
        world=lambda: World(processes={"prefill-0": process}, words={}),
        turns=SimpleNamespace(turned=0, refused=0),
        autoscaler=SimpleNamespace(decisions=0),
        gateways=SimpleNamespace(present=()),
    )
    return [(s.name, s.labels) for family in Numbers(cast(Any, controller)).collect() for s in family.samples]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return gateway_samples() + controller_samples()


def selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    """Every selector of a parsed query."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for part in ("expr", "lhs", "rhs", "vector_selector", "vs", "args"):
        below = getattr(node, part, None)
        for child in below if isinstance(below, list) else [below]:
            if child is not None and not isinstance(child, str):
                yield from selectors(child)


def fits(selector: promql_parser.VectorSelector, sample: Sample) -> bool:
    name, labels = sample
    if name != selector.name:
        return False
    for matcher in selector.matchers.matchers:
        if matcher.name not in labels:
            return False
        value, kind = labels[matcher.name], str(matcher.op)
        if "Not" not in kind and "Re" not in kind and value != matcher.value:
            return False
        if "Not" not in kind and "Re" in kind and not re.fullmatch(matcher.value, value):
            return False
    return True


@pytest.mark.parametrize("title", QUERIES)
def test_each_query_finds_its_metrics(title: str, samples: list[Sample]) -> None:
    found = list(selectors(promql_parser.parse(QUERIES[title])))
    assert found
    for selector in found:
        assert any(fits(selector, sample) for sample in samples), f"{selector}: there is no such metric"


@pytest.mark.parametrize("title", QUERIES)
def test_what_it_groups_by_is_a_label(title: str, samples: list[Sample]) -> None:
    labels = {label for _, found in samples for label in found}
    for group in re.findall(r"\bby \(([^)]*)\)", QUERIES[title]):
        assert {name.strip() for name in group.split(",")} <= labels


def test_a_query_for_what_does_not_exist_is_noticed(samples: list[Sample]) -> None:
    for query in ("baton_nothing", 'baton_kv_blocks{state="lost"}', "baton_kv_blocks{color=~'.*'}"):
        (selector,) = selectors(promql_parser.parse(f"sum(rate({query}[5m]))"))
        assert not any(fits(selector, sample) for sample in samples)


def test_the_dashboard_is_whole() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]}
    assert len(places) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert all("{{" not in t["legendFormat"] or t["legendFormat"].count("}}") for t in panel["targets"])


def test_each_alert_says_what_is_wrong_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS)
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"] and len(rule["annotations"]["description"]) > 20
