"""The GPU check names what an image lacks, asks for nothing that it does not load, and stops where nothing can run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from baton.bench import gpu_needs


def test_it_asks_for_what_it_loads_and_no_more():
    """A package that is wanted for nothing would keep the check from running where it could."""
    ours = "baton.bench.engine.__main__, baton.bench.engine.pair, baton.bench.gpu_kvtransfer, baton.deploy.process"
    ours += ", baton.bench.kernels.attention, tests.gpu.two_workers, tests.tiny, transformers"
    code = f"import sys, {ours}, pytest; print(*sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=root
    )
    assert set(gpu_needs.NEEDED) <= set(done.stdout.split())


def test_missing_packages_are_named(monkeypatch):
    names = {"json": "json", "no_such_package": "one", "no_such_package.part": "two"}
    monkeypatch.setattr(gpu_needs, "NEEDED", names)
    problem = gpu_needs.problems()[0]
    assert "one two" in problem and "json" not in problem


def test_the_script_ends_at_once_where_something_is_missing():
    script = Path(__file__).parents[2] / "bench" / "gpu_check.sh"
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "CUDA" in done.stderr
