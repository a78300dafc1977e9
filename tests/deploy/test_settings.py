"""Settings from YAML and flags: what they become, and the line that names what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from baton.common.config import split_threads
from baton.common.errors import InvalidRequest
from baton.common.types import Role
from baton.deploy.cluster import Place, desired_state
from baton.deploy.settings import KNOWN, ServeConfig, Setting, from_yaml, parse_size, resolve

PLACE = Place(Path("/m"), "name", "here:1", 1234, "secret")


def flags(**values: object) -> list[Setting]:
    return [Setting(path.replace("__", "."), value, f"--{path}") for path, value in values.items()]


def test_nothing_said_is_one_prefill_and_one_decode_of_the_demo() -> None:
    config = resolve([])
    assert replace(config, pools=()) == ServeConfig()
    assert [(pool.name, pool.role, pool.count) for pool in config.pools] == [
        ("prefill", Role.PREFILL, 1),
        ("decode", Role.DECODE, 1),
    ]
    assert (config.model, config.prefill, config.decode, config.colocated) == ("demo", 1, 1, 0)


def test_colocated_replaces_the_default_pair_and_stands_beside_one_that_was_asked_for() -> None:
    alone = resolve(flags(colocated=2))
    assert (alone.prefill, alone.decode, alone.colocated) == (0, 0, 2)
    beside = resolve(flags(colocated=1, prefill=1))
    assert (beside.prefill, beside.decode, beside.colocated) == (1, 0, 1)


def test_file_and_flags_meet_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text(
        "model: demo\nport: 9000\napi_keys: [one, two]\nengine:\n  kv_memory: 1.5GiB\n  block_size: 32\n"
        "router:\n  lease_s: 3\nhandover:\n  headroom_tokens: 0\nworker:\n  heartbeat_s: 0.25\ngateway:\n  drain_s: 0\n"
    )
    config = resolve([*from_yaml(file), *flags(port=9001, engine__block_size=8)])
    assert (config.port, config.api_keys) == (9001, ("one", "two"))
    assert (config.engine.kv_memory, config.engine.block_size) == (3 << 29, 8)
    assert (config.router.lease_s, config.handover.headroom_tokens) == (3.0, 0)
    assert (config.worker.heartbeat_s, config.gateway.drain_s) == (0.25, 0.0)


@pytest.mark.parametrize(("written", "meant"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on")])
def test_on_and_off_are_words_though_yaml_takes_them_for_truths(tmp_path: Path, written: str, meant: str) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text(f"engine: {{overlap: {written}}}\n")
    assert resolve(from_yaml(file)).engine.overlap == meant


def test_prefill_and_decode_engines_are_the_common_one_but_for_what_is_said_of_them(tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text("decode_engine: {tp: 3, max_model_len: 0}\nengine: {block_size: 32, max_model_len: 90}\n")
    config = resolve([*from_yaml(file), *flags(prefill_engine__kv_dtype="int8", colocated=1, prefill=1, decode=1)])
    prefill, decode, colocated = (each.worker.engine for each in desired_state(config, PLACE).assignments)
    assert (prefill.tp, prefill.block_size, prefill.max_model_len, prefill.kv_dtype) == (1, 32, 90, "int8")
    assert (decode.tp, decode.block_size, decode.max_model_len, decode.kv_dtype) == (3, 32, 0, "auto")
    assert (colocated.tp, colocated.kv_dtype) == (1, "auto")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("port: 1\nprefil: 2\n", ":2: prefil: no such field here; known: admin_host, admin_port,"),
        ("engine:\n  kv_memory: 2 potatoes\n", ":2: engine.kv_memory: '2 potatoes' is not a size"),
        ("engine:\n  model: x\n", ":2: engine.model: no such field here; known: block_size,"),
        ("port: eighty\n", ":1: port: 'eighty' is not a whole number"),
        ("port: 70000\n", ":1: port: 70000 is not a port"),
        ("port: true\n", ":1: port: True is not a whole number"),
        ("threads: -1\n", ":1: threads: -1 is out of range: it must be 0 or more"),
        ("router:\n  lease_s: .nan\n", ":2: router.lease_s: nan is out of range: it must be above 0"),
        ("router:\n  lease_s: .inf\n", ":2: router.lease_s: it must be a number that has an end"),
        (f"router:\n  lease_s: {10**400}\n", ":2: router.lease_s: the number is too large"),
        ("engine:\n  dtype: int3\n", ":2: engine.dtype: 'int3' is not one of auto, float32"),
        (
            "engine:\n  kv_dtype: int3\n",
            ":2: engine.kv_dtype: 'int3' is not one of auto, float32, bfloat16, float16, int8",
        ),
        ("decode_engine:\n  dtype: int3\n", ":2: decode_engine.dtype: 'int3' is not one of auto, float32"),
        ("decode_engine:\n  tp: 0\n", ":2: decode_engine.tp: 0 is out of range: it must be above 0"),
        ("engine: fast\n", ":1: engine must hold fields"),
        ("- port\n", ":1: the file must hold fields"),
        ("port: 1\n\nport: 2\n", ":3: port: given twice"),
        ("port: [1\n", ":2: not YAML"),
        ("model: 2024-13-45\n", ":1: model: month must be in 1..12"),
        ("model: !!python/name:os.system\n", ":1: not YAML: could not determine a constructor"),
        ("api_keys: ['']\n", ":1: api_keys: it must be a text, or a list of texts"),
        ("engine:\n  overlap: maybe\n", ":2: engine.overlap: 'maybe' is not one of auto, on, off"),
        ("engine:\n  dummy_weights: 1\n", ":2: engine.dummy_weights: 1 is not true or false"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_line_and_field(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        resolve(from_yaml(file))
    assert says in caught.value.message
    assert str(file) in caught.value.message


def test_an_empty_file_says_nothing_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert from_yaml(tmp_path / "empty.yaml") == []
    with pytest.raises(InvalidRequest, match=r"--config: cannot read .*No such file"):
        from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(("prefill", "decode", "lacks"), [(0, 1, "prefill"), (1, 0, "decode"), (0, 0, "prefill")])
def test_a_cluster_needs_both_phases(prefill: int, decode: int, lacks: str) -> None:
    with pytest.raises(InvalidRequest, match=f"no worker would {lacks}"):
        resolve(flags(prefill=prefill, decode=decode))


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("512M", 512 << 20), ("1.5g", 3 << 29), ("64 kb", 64 << 10), (7, 7), ("9", 9)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2GiBs", "1e3", "0x10", "1 000", True])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(InvalidRequest, match="is not a size"):
        parse_size(text)


def test_every_field_that_may_be_set_is_one_of_the_configuration() -> None:
    pool = resolve([]).pools[0]
    for path in KNOWN.keys() - {"pool.placement"}:  # a pool's workers need it: it is a field of `Resources`
        value: object = pool if path.startswith(("pool.", "resources.")) else ServeConfig()
        path = path.removeprefix("pool.")
        for name in path.split("."):
            value = getattr(value, name)


def test_each_process_gets_its_configuration() -> None:
    config = resolve(flags(prefill=1, decode=2, threads=4, engine__block_size=8, port=1234, router__lease_s=2))
    desired = desired_state(config, PLACE)
    workers = [assignment.worker for assignment in desired.assignments]
    assert [(w.name, w.role, w.engine.threads) for w in workers] == [
        ("prefill-0", Role.PREFILL, 2),
        ("decode-0", Role.DECODE, 1),
        ("decode-1", Role.DECODE, 1),
    ]
    assert {w.engine.model for w in workers} == {"/m"}
    assert {(w.controller, w.cluster_token) for w in workers} == {("here:1", "secret")}
    (gateway,) = desired.gateways
    assert (gateway.port, gateway.block_size, gateway.router.lease_s, gateway.model_name) == (1234, 8, 2.0, "name")


@pytest.mark.parametrize(("total", "workers"), [(2, 2), (2, 3), (7, 3), (1, 1), (16, 5)])
def test_threads_are_shared_evenly_and_none_goes_without(total: int, workers: int) -> None:
    shares = split_threads(total, workers)
    assert len(shares) == workers
    assert min(shares) >= 1
    assert max(shares) - min(shares) <= 1
    assert sum(shares) == max(total, workers)
