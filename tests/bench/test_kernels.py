"""The kernels' bench, end to end in Triton's interpreter, and what it calls right and near."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baton.bench.ceilings import Ceilings
from baton.bench.kernels import __main__ as bench
from baton.bench.kernels import sweep
from baton.bench.kernels.cases import Case, Measured, measure, relative_error
from baton.bench.kernels.shapes import BLOCK, LLAMA_8B, pool, rows
from baton.kernels.attention import PREFILL, SPLIT, Config

CPU = torch.device("cpu")


def test_all_kernels_run_and_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "SPLITS", (SPLIT,))
    monkeypatch.setattr(sweep, "PREFILLS", (PREFILL,))
    assert bench.main(["--interpret", "--sweep", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "kernels.json").read_text())["results"]
    kernels = [row["kernel"] for row in found["kernels"]]
    assert set(kernels) == {
        *("decode attention", "verify attention", "prefill attention", "add and norm", "SiLU and multiply"),
        *("rotate and store", "pack", "unpack", "sampling, greedy", "sampling, mixed"),
    }
    assert [row["config"] for row in found["kernels"] if row["config"]] == [str(SPLIT), str(PREFILL)]
    assert found["wrong"] == [] and found["ceilings"]["copy"] > 0
    assert capsys.readouterr().out.count("µs") == len(kernels)


def test_a_kernel_that_is_wrong_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Measured("k", "s", 1.0, "bytes", 1.0, 0.0, 0.5, float("nan"))
    monkeypatch.setattr(bench, "run", lambda *_: iter([({"dtype": "float32"}, wrong)]))
    assert bench.main(["--interpret", "--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "kernels.json").read_text())["results"]["wrong"] == ["k, s: error nan"]


def test_what_is_near_enough_depends_on_the_type() -> None:
    off = Measured("k", "s", 1.0, "bytes", 1.0, 0.0, 0.5, 5e-3)
    assert bench.right(off, "bfloat16") and not bench.right(off, "float32")


def test_a_share_is_of_the_longer_of_two_times() -> None:
    ceilings = Ceilings("", "float32", copy=1e9, product=1e12)
    found = measure(CPU, Case("k", "s", 1000, 10**9, [lambda: sum(range(20_000))]), ceilings)
    assert found.bound == "flops" and found.share == pytest.approx(1e-3 / found.seconds)
    found = measure(CPU, Case("k", "s", 10**7, 10**9, [lambda: None], lambda: 0.25), ceilings, "c")
    assert found.bound == "bytes" and found.error == 0.25 and found.config == "c"


def test_what_was_not_written_is_an_error() -> None:
    out, reference = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])
    assert math.isnan(relative_error(out, reference))
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_each_block_has_one_owner_and_rows_are_the_last_tokens() -> None:
    kv = pool(LLAMA_8B, 10 * BLOCK, CPU)
    own = rows([1, 1, 3], [17, 16, 40], kv)
    assert sorted(own.tables.tolist()) == sorted(set(own.tables.tolist())) and len(own.tables) == 6
    assert own.table_starts.tolist() == [0, 2, 3, 6] and own.singles == 2
    assert own.positions.tolist() == [16, 15, 37, 38, 39]
    assert own.slots[1] == own.tables[2] * BLOCK + 15 and own.slots[4] == own.tables[5] * BLOCK + 7


def test_a_sweep_leaves_out_what_does_not_fit_a_multiprocessor() -> None:
    assert sweep.fits(SPLIT)
    assert not sweep.fits(Config(rows=32, values=16384, warps=4, stages=5, resident=1))
    assert SPLIT in sweep.SPLITS and PREFILL in sweep.PREFILLS


ONE_EACH = """
from baton.bench.kernels import compiled, sweep
compiled.SPLITS, compiled.PREFILLS = (sweep.SPLITS[12],), (sweep.PREFILLS[0],)
for found in compiled.configurations():
    print(found.kernel, found.registers <= 255, found.spilled, found.shared, found.programs)
"""


def test_what_a_configuration_takes_is_known_without_a_device() -> None:
    """Three tiles of 32 KiB on their way, or one of K and V beside what is computed with; the rest is small."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", ONE_EACH], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    split, prefill = (line.split() for line in done.stdout.splitlines())
    assert split[:3] == ["split", "True", "0"] and 3 * 32768 < int(split[3]) < 4 * 32768 and int(split[4]) == 2
    assert prefill[:3] == ["prefill", "True", "0"] and int(prefill[4]) == 1
