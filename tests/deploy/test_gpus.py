"""Which GPUs of one machine the local launcher gives to whom."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from baton.common.config import GatewayConfig
from baton.deploy.launch import gpus as module
from baton.deploy.launch.gpus import Gpus, installed
from baton.deploy.launch.launcher import LocalLauncher, Resources, Spec

SHOW = "import os; print('sees', os.environ.get('CUDA_VISIBLE_DEVICES'))"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLACE_S", 0.05)


async def test_each_gets_its_own_and_the_least_used_first() -> None:
    gpus = Gpus(["0", "1", "2", "3"])
    assert await gpus.take(2, 1.0) == ("0", "1")
    assert await gpus.take(1, 0.5) == ("2",)
    assert await gpus.take(1, 0.5) == ("3",)
    assert await gpus.take(1, 0.5) == ("2",)
    gpus.give_back(("0", "1"), 1.0)
    assert await gpus.take(2, 1.0) == ("0", "1")


async def test_parts_of_one_gpu_add_up_to_all_of_it() -> None:
    gpus = Gpus(["0"])
    for _ in range(3):
        await gpus.take(1, 1 / 3)
    with pytest.raises(OSError, match="GPU 0 has"):
        await gpus.take(1, 1 / 3)
    for _ in range(3):
        gpus.give_back(("0",), 1 / 3)
    assert await gpus.take(1, 1.0) == ("0",)


async def test_a_worker_waits_for_room_but_not_for_what_there_never_is() -> None:
    gpus = Gpus(["a", "b"])
    taken = await gpus.take(2, 1.0)
    with pytest.raises(OSError, match=r"no room for 1 × 1 GPU: GPU a has 0 free, GPU b has 0 free"):
        await gpus.take(1, 1.0)
    waiting = asyncio.create_task(gpus.take(1, 1.0))
    await asyncio.sleep(0)
    gpus.give_back(taken, 1.0)
    assert await waiting == ("a",)
    with pytest.raises(OSError, match="3 GPUs are wanted, and this machine shows 2"):
        await gpus.take(3, 0.1)


def test_what_the_variable_leaves_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-1")
    assert installed() == ("3", "GPU-1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert installed() == ()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert len(installed()) == len(list(Path("/dev").glob("nvidia[0-9]*")))


async def test_a_worker_sees_what_it_is_given_and_gives_it_back_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    lines: list[str] = []
    launcher = LocalLauncher(lambda _, line: lines.append(line), (sys.executable, "-P", "-c", SHOW))
    config = GatewayConfig(model="m", model_name="n")
    for needs in (Resources(ranks=2, gpus=1.0), Resources(gpus=0.5), Resources(gpus=1.0), Resources()):
        process = await launcher.start(Spec("w", config, resources=needs))
        assert await process.wait() == 0
        assert await process.wait() == 0
    assert lines == ["sees 5,6", "sees 5", "sees 5", "sees 5,6"]
    broken = LocalLauncher(print, ("/no/such/program",), launcher.gpus)
    with pytest.raises(FileNotFoundError):
        await broken.start(Spec("w", config, resources=Resources(ranks=2, gpus=1.0)))
    assert await launcher.gpus.take(2, 1.0) == ("5", "6")
