"""From what was asked for to what the cluster shall be."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from baton.deploy.cluster import Place, desired_state
from baton.deploy.control.planner import AutoscaleConfig
from baton.deploy.settings import Setting, resolve

PLACE = Place(Path("/m"), "name", "here:1", 8123, "secret")


def config(**values: object) -> list[Setting]:
    return [Setting(path, value, path) for path, value in values.items()]


def test_one_gateway_has_the_port_to_itself_and_several_share_it_with_one_of_their_own() -> None:
    (alone,) = desired_state(resolve([]), PLACE).gateways
    assert (alone.name, alone.port, alone.reuse_port, alone.own_port) == ("gateway-0", 8123, False, 0)
    two = desired_state(resolve(config(gateways=2)), replace(PLACE, own_ports=(5, 6))).gateways
    assert [(g.name, g.port, g.reuse_port, g.own_port) for g in two] == [
        ("gateway-0", 8123, True, 5),
        ("gateway-1", 8123, True, 6),
    ]


def test_a_worker_that_is_placed_on_a_node_has_the_threads_that_it_is_given_there() -> None:
    placed = desired_state(resolve([*config(launcher="ray"), Setting("engine.tp", 2, "")]), PLACE)
    assert {a.worker.engine.threads for a in placed.assignments} == {2}
    shared = desired_state(resolve(config(launcher="ray", threads=6, prefill=2)), PLACE)
    assert {a.worker.engine.threads for a in shared.assignments} == {2}


def test_workers_that_come_later_get_the_smallest_share_of_threads() -> None:
    wanted = desired_state(resolve(config(threads=5, decode=2)), PLACE)
    assert [a.worker.engine.threads for a in wanted.assignments] == [2, 2, 1]
    assert {pool.worker.engine.threads for pool in wanted.pools} == {1}


def test_the_planner_is_set_up_as_asked() -> None:
    asked = [Setting("autoscale.enabled", True, ""), Setting("autoscale.ttft_s", 3, "")]
    assert desired_state(resolve(asked), PLACE).autoscale == AutoscaleConfig(enabled=True, ttft_s=3.0)


def test_neither_parent_nor_controller_loads_torch_or_ray() -> None:
    modules = "baton.deploy.launch.parent, baton.deploy.control.main"
    code = f"import sys, {modules}; print(' '.join({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=100)
    assert "grpc" in done.stdout.split(), done
    assert not {"torch", "ray", "transformers", "numba", "triton"} & set(done.stdout.split())
