"""The handover's GPU check, tried on CPU: it measures what it says, and does not take nothing for a success."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from baton.bench import gpu_kvtransfer
from baton.bench.gpu_kvtransfer import LLAMA_8B, Found, Pair, handovers, kernels, memcpy
from baton.common.config import HandoverConfig

SMALL = replace(LLAMA_8B, num_layers=2)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def pair():
    pair = Pair(SMALL, 8, "cpu")
    yield pair
    pair.close()


def test_transports_carry_between_two_processes(monkeypatch, pair):
    monkeypatch.setattr(gpu_kvtransfer, "FRAMES", (1 << 20,))
    found = list(handovers(pair, {"shm": (64, 128), "tcp": (128,)}, limit=1.0, rounds=1))
    assert [(one.transport, one.tokens) for one in found] == [("shm", 64), ("shm", 128), ("tcp", 128)]
    assert all(one.size == one.tokens * 2 * 4096 and one.gb_per_s > 0 for one in found)


def test_what_did_not_arrive_is_seen(pair):
    pair.handover("tcp", 4, HandoverConfig())
    assert pair.arrived(4)
    assert not pair.arrived(5)


def test_a_transport_that_does_not_serve_the_two_says_why(pair):
    assert pair.nccl(1.0) == ""  # gloo does serve two ranks
    pair.handover("tcp", 4, HandoverConfig())
    pair._ends[True].plane.stop()
    assert pair.nccl(5.0)


def test_the_kernels_are_timed_one_by_one():
    limit = memcpy("cpu", 1 << 20)
    found = kernels("cpu", 1 << 20, limit, programs=(4,))
    assert {(k.operation, k.checked) for k in found} == {
        *(("pack", True), ("pack", False), ("unpack", True), ("unpack", False), ("sum", True))
    }
    assert all(k.gb_per_s > 0 and k.share == k.gb_per_s / limit for k in found)


def test_what_is_missing_is_named():
    limit = memcpy("cpu", 1 << 20)
    found = Found("cpu", limit, kernels("cpu", 1 << 20, limit, programs=(4,)))
    assert found.missing(("cuda-ipc", "tcp")) == ["handovers by cuda-ipc", "handovers by tcp", "what NCCL says"]
    found = replace(found, kernels=found.kernels[:1], nccl="no")
    assert found.missing(()) == ["the kernel that unpacks", "the kernel that sums"]


def test_without_a_gpu_it_fails(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "baton.bench.gpu_kvtransfer", "--out", str(tmp_path)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1 and "nothing was measured" in done.stderr
    assert list(tmp_path.iterdir()) == []
