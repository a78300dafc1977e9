"""What a rollout may change, checked at the door."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from baton.common.errors import InvalidRequest
from baton.common.types import Role
from baton.deploy.control.desired import Desired
from baton.deploy.control.revise import revise
from tests.deploy.pools import desired, pool

D = Role.DECODE


def test_options_are_those_of_workers_for_all_pools_or_one() -> None:
    changes = {"engine.kv_memory": "1GiB", "worker.drain_s": 7, "decode.engine.max_running": 3, "handover.lease_s": 2}
    prefill, decode = revise(desired(), None, changes)
    assert (prefill.worker.engine.kv_memory, prefill.worker.drain_s, prefill.worker.handover.lease_s) == (1 << 30, 7, 2)
    assert (prefill.worker.engine.max_running, decode.worker.engine.max_running) == (256, 3)
    assert revise(desired(), None, {"decode.engine.tp": 2})[1].resources.ranks == 2
    for path, value in (("router.lease_s", 1), ("engine.x", 1), ("nobody.engine.tp", 2), ("engine.tp", "two"), ("", 1)):
        with pytest.raises(InvalidRequest):
            revise(desired(), None, {path: value})


def test_other_weights_must_have_the_same_tokenizer(tmp_path: Path) -> None:
    for name, tokenizer in (("old", "{}"), ("new", "{}"), ("alien", "{ }")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(tokenizer)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    old = pool(D)
    engine = replace(old.worker.engine, model=str(tmp_path / "old"))
    wanted = Desired(pools=(replace(old, worker=replace(old.worker, engine=engine)),))
    assert revise(wanted, str(tmp_path / "new"), {})[0].worker.engine.model == str(tmp_path / "new")
    with pytest.raises(InvalidRequest, match="another tokenizer"):
        revise(wanted, str(tmp_path / "alien"), {})
    with pytest.raises(InvalidRequest):
        revise(wanted, str(tmp_path / "nowhere"), {})
