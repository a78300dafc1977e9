"""The controller in numbers, for Prometheus, read at the moment of a scrape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .view import pool_rows

if TYPE_CHECKING:
    from .controller import Controller


class Numbers(Collector):
    """`baton_controller_…`."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        controller, world = self._controller, self._controller.world()
        wanted = GaugeMetricFamily(
            "baton_controller_workers_wanted", "Workers that a pool shall have.", labels=["pool", "role"]
        )
        ready = GaugeMetricFamily(
            "baton_controller_workers_ready", "Workers of a pool that serve.", labels=["pool", "role"]
        )
        for row in pool_rows(controller.desired, world):
            wanted.add_metric([row.name, row.role], row.wanted)
            ready.add_metric([row.name, row.role], row.ready)
        yield wanted
        yield ready
        restarts = CounterMetricFamily(
            "baton_controller_restarts", "Starts of a process after its death.", labels=["process"]
        )
        for process in world.processes.values():
            restarts.add_metric([process.name], process.restarts)
        yield restarts
        turns = CounterMetricFamily("baton_controller_turns", "Workers asked to turn.", labels=["result"])
        turns.add_metric(["turned"], controller.turns.turned)
        turns.add_metric(["refused"], controller.turns.refused)
        yield turns
        yield CounterMetricFamily(
            "baton_controller_decisions", "Changes that the planner has made.", value=controller.autoscaler.decisions
        )
        yield GaugeMetricFamily(
            "baton_controller_revision", "Generation of workers.", value=controller.desired.revision
        )
        yield GaugeMetricFamily(
            "baton_controller_gateways", "Gateways that attend.", value=len(controller.gateways.present)
        )
