"""Pools, the environment, and what makes sense only together."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.common.errors import InvalidRequest
from baton.common.types import Role
from baton.deploy.launch.launcher import Resources
from baton.deploy.settings import PoolConfig, Setting, from_environment, from_text, from_yaml, resolve

BOTH = "pools:\n  p: {role: prefill}\n  d: {role: decode}\n"


def pools(tmp_path: Path, text: str, **environ: str) -> dict[str, PoolConfig]:
    file = tmp_path / "baton.yaml"
    file.write_text(text)
    return {pool.name: pool for pool in resolve([*from_yaml(file), *from_environment(environ)]).pools}


def refusal(tmp_path: Path, text: str, **environ: str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        pools(tmp_path, text, **environ)
    return caught.value.message.replace(str(tmp_path / "baton.yaml"), "FILE")


def test_a_pool_is_one_worker_of_its_role_where_nothing_else_is_said(tmp_path: Path) -> None:
    found = pools(tmp_path, BOTH)
    assert [(p.name, p.role, p.count, p.min, p.max) for p in found.values()] == [
        ("p", Role.PREFILL, 1, 0, 64),
        ("d", Role.DECODE, 1, 0, 64),
    ]
    assert found["p"].resources == Resources(pool="p")


def test_a_pool_says_all_of_its_workers(tmp_path: Path) -> None:
    text = """
launcher: ray
engine: {block_size: 32, kv_memory: 1GiB}
decode_engine: {kv_dtype: int8, kv_memory: 2GiB}
handover: {lease_s: 3}
pools:
  fast:
    role: prefill
    count: 2
    min: 1
    max: 3
    engine: {tp: 4}
    handover: {transport: tcp}
    resources: {cpus: 2, gpus: 1, accelerator_type: H100, custom: {disk: 1, nvlink: 0.5}}
    placement: pack
  slow:
    role: decode
    engine: {kv_memory: 3GiB}
"""
    found = pools(tmp_path, text)
    fast, slow = found["fast"], found["slow"]
    assert (fast.count, fast.min, fast.max, fast.engine.tp) == (2, 1, 3, 4)
    assert (fast.engine.block_size, fast.engine.kv_memory, fast.engine.kv_dtype) == (32, 1 << 30, "auto")
    assert (fast.handover.lease_s, fast.handover.transport) == (3.0, "tcp")
    custom = (("disk", 1.0), ("nvlink", 0.5))
    assert fast.resources == Resources(
        pool="fast", ranks=4, cpus=2.0, gpus=1.0, accelerator_type="H100", custom=custom, placement="pack"
    )
    assert (slow.engine.block_size, slow.engine.kv_dtype, slow.engine.kv_memory) == (32, "int8", 3 << 30)
    assert slow.handover.transport == "auto"


def test_counts_are_the_short_form_of_pools() -> None:
    config = resolve(
        [Setting("prefill", 1, "--prefill"), Setting("decode", 100, "--decode"), Setting("engine.tp", 2, "")]
    )
    assert [(p.name, p.role, p.count, p.resources.ranks) for p in config.pools] == [
        ("prefill", "prefill", 1, 2),
        ("decode", "decode", 100, 2),
    ]
    assert config.pools[1].max == 100


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "pools:\n  p:\n    rol: prefill\n",
            "FILE:3: pools.p.rol: no such field here; known: count, engine,",
        ),
        ("pools:\n  p:\n    role: both\n", "FILE:3: pools.p.role: 'both' is not one of prefill, decode, colocated"),
        ("pools:\n  p:\n    count: 2\n", "FILE:3: pools.p.count: pool 'p' has no role: prefill, decode or colocated"),
        ("pools:\n  p: {}\n", "FILE:2: pools.p must hold fields"),
        ("pools: 3\n", "FILE:1: pools must hold fields"),
        ("pools:\n  P: {role: prefill}\n", "FILE:2: pools.P.role: 'P' is no name for a pool"),
        ("pools:\n  gateway: {role: prefill}\n", "'gateway' is no name for a pool: another process is called so"),
        ("pools:\n  p: {role: prefill, engine: {model: x}}\n", "FILE:2: pools.p.engine.model: no such field here"),
        ("pools:\n  p: {role: prefill, engine: {tp: 0}}\n", "pools.p.engine.tp: 0 is out of range: it must be above 0"),
        ("pools:\n  p: {role: prefill, engine: {dtype: x}}\n", "pools.p.engine.dtype: 'x' is not one of auto, float32"),
        ("pools:\n  p: {role: prefill, placement: near}\n", "pools.p.placement: 'near' is not one of spread, pack"),
        ("pools:\n  p: {role: prefill, count: -1}\n", "pools.p.count: -1 is out of range: it must be 0 or more"),
        ("pools:\n  p: {role: prefill, resources: {ranks: 2}}\n", "known: accelerator_type, cpus, custom, gpus"),
        ("pools:\n  p: {role: prefill, resources: {custom: [a]}}\n", "custom: it must be names with amounts"),
        (
            "pools:\n  p: {role: prefill, resources: {custom: {a: 0}}}\n",
            "a: 0 is not a resource with an amount",
        ),
        ("name: ../x\n", "FILE:1: name: '../x' is no name for a cluster"),
        ("launcher: slurm\n", "FILE:1: launcher: 'slurm' is not one of local, ray"),
        ("gateways: 0\n", "FILE:1: gateways: 0 is out of range: it must be above 0"),
        ("autoscale: {ttft: 1}\n", "FILE:1: autoscale.ttft: no such field here; known: attainment,"),
        ("autoscale: {attainment: 90}\n", "autoscale.attainment: 90.0 is out of range: it is a share, at most 1"),
    ],
)
def test_what_is_wrong_with_a_field_is_named_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pools:\n  p: {role: prefill}\n", "no worker would decode: give a pool the role decode or colocated"),
        ("pools:\n  p: {role: decode}\n  c: {role: colocated, count: 0}\n", "no worker would prefill: give a pool"),
        ("prefill: 2\n" + BOTH, "FILE:1: prefill: with pools, the count is a pool's: pools.NAME.count"),
        (
            "pools:\n  p: {role: prefill, min: 3, max: 2}\n  d: {role: decode}\n",
            "FILE:2: pools.p.min: min 3 is above max 2",
        ),
        (
            "pools:\n  p: {role: prefill, min: 2}\n  d: {role: decode}\n",
            "FILE:2: pools.p.min: 1 is out of range: this pool has 2 to 64 workers (min, max)",
        ),
        ("pools:\n  p: {role: prefill, max: 2, count: 3}\n  d: {role: decode}\n", "FILE:2: pools.p.count: 3 is out of"),
        (
            "pools:\n  p: {role: prefill}\n  d:\n    role: decode\n    engine: {dtype: float16}\n",
            "FILE:5: pools.d.engine.dtype: float16 here and auto in pool p: workers that compute differently never",
        ),
        (
            "pools:\n  p: {role: prefill, engine: {dummy_weights: true}}\n  d: {role: decode}\n",
            "FILE:2: pools.p.engine.dummy_weights: False here and True in pool p",
        ),
        (
            "pools:\n  p: {role: prefill, engine: {device: cuda}}\n  d: {role: decode, engine: {device: cpu}}\n",
            "FILE:3: pools.d.engine.device: pools p and d use cpu and cuda, where dtype auto differs: set it",
        ),
        (
            "launcher: ray\npools:\n  p: {role: prefill, engine: {tp: 4}, resources: {gpus: 4}}\n  d: {role: decode}\n",
            "FILE:3: pools.p.resources.gpus: 4 is for each rank (there are 4, by engine.tp)",
        ),
        (
            "launcher: ray\nengine: {tp: 2}\npools:\n  p: {role: prefill, resources: {gpus: 0.5}}\n",
            "FILE:4: pools.p.resources.gpus: 0.5 of a GPU for each of 2 ranks",
        ),
        (
            "launcher: ray\nengine: {device: cpu}\npools:\n  p: {role: prefill, resources: {gpus: 1}}\n",
            "FILE:4: pools.p.resources.gpus: GPUs are asked for, but engine.device is cpu",
        ),
        ("autoscale: {min_decode: 3, max_decode: 2}\n", "FILE:1: autoscale.min_decode: min_decode 3 is above"),
    ],
)
def test_what_does_not_go_together_is_named_with_a_line(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(tmp_path, text)


def test_equal_dtypes_go_with_different_devices(tmp_path: Path) -> None:
    text = "engine: {dtype: bfloat16}\npools:\n  p: {role: prefill, engine: {device: cuda}}\n"
    assert len(pools(tmp_path, text + "  d: {role: decode, engine: {device: cpu}}\n")) == 2


# --- the environment -------------------------------------------------------------------------------------------------


def test_variables_go_before_the_file(tmp_path: Path) -> None:
    text = "launcher: ray\npools:\n  long-prompts: {role: prefill, count: 1}\n  d: {role: decode, engine: {tp: 2}}\n"
    found = pools(
        tmp_path,
        text,
        BATON_POOLS__LONG_PROMPTS__COUNT="2",
        BATON_POOLS__D__ENGINE__TP="4",
        BATON_POOLS__D__RESOURCES__CUSTOM="{disk: 1}",
        BATON_ENGINE__KV_MEMORY="2GiB",
        BATON_HOME="/somewhere",
        BATON_CLUSTER_TOKEN="secret",
        PATH="/bin",
    )
    assert found["long-prompts"].count == 2
    assert (found["d"].engine.tp, found["d"].engine.kv_memory) == (4, 2 << 30)
    assert found["d"].resources.custom == (("disk", 1.0),)


def test_flags_go_before_variables() -> None:
    environ = from_environment({"BATON_PORT": "9000", "BATON_NAME": "blue", "BATON_AUTOSCALE__ENABLED": "true"})
    config = resolve([*environ, Setting("port", 9001, "--port")])
    assert (config.port, config.name, config.autoscale.enabled) == (9001, "blue", True)


def test_text_stays_text_in_a_variable() -> None:
    config = resolve(from_environment({"BATON_ADMIN_TOKEN": "0123", "BATON_API_KEYS": "[a, b]"}))
    assert config.admin_token == "0123"
    assert config.api_keys == ("a", "b")


@pytest.mark.parametrize(
    ("variable", "text", "says"),
    [
        ("BATON_ENGINE__KV_MEM", "1", "BATON_ENGINE__KV_MEM: no such field; known there: block_size"),
        ("BATON_ENGIN__TP", "1", "BATON_ENGIN__TP: no such field"),
        ("BATON_POOLS__P__COUNT", "many", "BATON_POOLS__P__COUNT: 'many' is not a whole number"),
        ("BATON_ENGINE__TP", "[", "BATON_ENGINE__TP: '[' is not a value"),
        ("BATON_PORT", "70000", "BATON_PORT: 70000 is not a port"),
    ],
)
def test_a_wrong_variable_is_named(tmp_path: Path, variable: str, text: str, says: str) -> None:
    assert says in refusal(tmp_path, BOTH, **{variable: text})


def test_a_text_from_a_flag_is_read_as_its_field_wants() -> None:
    assert from_text("engine.tp", "2", "--set").value == 2
    assert from_text("engine.dtype", "1", "--set").value == "1"
    assert from_text("engine.nonsense", "on", "--set").value is True
