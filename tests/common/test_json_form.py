from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from baton.common.config import ControllerConfig, EngineConfig, GatewayConfig, HandoverConfig, WorkerConfig
from baton.common.errors import InvalidRequest
from baton.common.json_form import from_json, from_plain, to_json, to_plain
from baton.common.types import Role

WORKER = WorkerConfig(
    name="prefill-ä", role=Role.PREFILL, cluster_token="s\n", engine=EngineConfig(model="m", tp=2, device_memory=0.5),
    handover=HandoverConfig(transport="tcp"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Inner:
    number: float


@dataclass(frozen=True, slots=True)
class Outer:
    role: Role
    inner: Inner | None = None
    pairs: tuple[tuple[int, str], ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)


FULL = Outer(Role.DECODE, Inner(0.1), ((1, "a"), (2, "b")), {"x": 3}, {"y": [1, None, {"z": True}]})


@pytest.mark.parametrize("value", [FULL, Outer(Role.DECODE), WORKER])
def test_what_is_written_is_read(value: object) -> None:
    line = to_json(value)
    assert b"\n" not in line
    assert from_json(line, type(value)) == value
    assert from_plain(to_plain(value), type(value)) == value


def test_every_configuration_has_a_form() -> None:
    for kind in (WorkerConfig, GatewayConfig, ControllerConfig):
        with pytest.raises(InvalidRequest, match="required field missing"):
            from_plain({}, kind)


def test_the_form_is_plain_json() -> None:
    assert to_json(FULL) == (
        b'{"role":"decode","inner":{"number":0.1},"pairs":[[1,"a"],[2,"b"]],"counts":{"x":3},'
        b'"rest":{"y":[1,null,{"z":true}]}}'
    )
    assert to_json("prefill-ä") == '"prefill-ä"'.encode()


def test_unknown_fields_are_passed_over_so_that_a_newer_end_may_say_more() -> None:
    assert from_json(b'{"role":"decode","newer":1}', Outer) == Outer(Role.DECODE)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"{}", r"required field missing @ \$.role"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "invalid value"),
        (b'{"role":"chief"}', r"expected Role @ \$.role"),
        (b'{"role":"decode","inner":{"number":"much"}}', r"expected float @ \$.inner.number"),
        (b'{"role":"decode","counts":{"x":"many"}}', r"expected int @ \$.counts\['x'\]"),
        (b'{"role":"decode","pairs":[[1,"a"],["b","c"]]}', r"expected int @ \$.pairs\[1\]\[0\]"),
        (b'{"role":"decode","counts":{"x":1.5}}', r"expected int @ \$.counts\['x'\]"),
        (b'{"role":"decode","counts":{"x":true}}', r"expected int @ \$.counts\['x'\]"),
        (b'{"role":"decode","inner":{"number":"1"}}', r"expected float @ \$.inner.number"),
        (b'{"role":"decode","pairs":[[1,null]]}', r"expected str @ \$.pairs\[0\]\[1\]"),
        (b'{"role":"a","counts":{"x":"many"}}', r"\$.role; .* \$.counts"),
    ],
)
def test_what_is_wrong_is_named(data: bytes, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        from_json(data, Outer)


@pytest.mark.parametrize("value", [[], ["lease_s"], "lease_s", 5, None])
def test_what_is_no_object_does_not_pass_for_one_whose_fields_are_all_left_out(value: object) -> None:
    for kind in (HandoverConfig, dict[str, Any]):
        with pytest.raises(InvalidRequest):
            from_plain(value, kind)
    with pytest.raises(InvalidRequest, match=r"expected HandoverConfig @ \$.handover"):
        from_plain({**to_plain(WORKER), "handover": value}, WorkerConfig)


@pytest.mark.parametrize("written", ["false", 0, None])
def test_only_true_and_false_are_either(written: object) -> None:
    with pytest.raises(InvalidRequest, match=r"expected bool @ \$.checksums"):
        from_plain({"checksums": written}, HandoverConfig)


def test_a_whole_number_is_a_number() -> None:
    assert from_json(b'{"number":1}', Inner) == Inner(1.0)


def test_what_json_has_no_number_for_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        to_json(Inner(math.nan))
