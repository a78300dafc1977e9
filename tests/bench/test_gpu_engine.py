"""What the GPU check calls agreement, tried on CPU; and that it names what an image lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton.bench import gpu_needs
from baton.bench.gpu_engine import CONFIGS, Speed, compare, generate, sequence, speed
from baton.common.config import EngineConfig
from baton.common.types import TokenLogprob
from baton.engine.model_config import ModelConfig
from baton.engine.plan import Sampled
from baton.engine.runner import build_engine
from tests.tiny import make_checkpoint


def said(token: int, **logprobs: float) -> Sampled:
    top = tuple(sorted(((int(k[1:]), v) for k, v in logprobs.items()), key=lambda item: -item[1]))
    return Sampled(token, TokenLogprob(dict(top)[token], top))


def test_equal_tokens_agree():
    one = [[said(1, t1=-0.1, t2=-2.0), said(2, t2=-0.5, t1=-0.9)]]
    found = compare("x", one, one)
    assert (found.tokens, found.ties, found.wrong, found.worst, found.good) == (2, 0, 0, 0.0, True)


def test_another_token_is_wrong_unless_the_two_were_too_close_to_call():
    clear, close = said(1, t1=-0.1, t2=-2.0), said(1, t1=-0.7, t2=-0.7005)
    assert compare("x", [[clear]], [[said(2, t1=-2.0, t2=-0.1)]]).wrong == 1
    swapped = compare("x", [[close, clear]], [[said(2, t1=-0.7005, t2=-0.7), clear]])
    assert (swapped.ties, swapped.wrong, swapped.tokens) == (1, 0, 1)  # what comes after has another prefix
    assert swapped.good


def test_drifting_logprobs_are_wrong_even_where_tokens_agree():
    assert not compare("x", [[said(1, t1=-0.1, t2=-2.0)]], [[said(1, t1=-0.2, t2=-2.0)]]).good


def test_generate_gives_the_same_in_chunks_of_any_size(tmp_path):
    path = make_checkpoint(tmp_path)
    config = EngineConfig(model=str(path), threads=2, device="cpu", kv_memory=8 << 20, max_batch_tokens=64)
    engine = build_engine(config, lambda share: None)
    prompts = [[3 + (7 * i + j) % 300 for j in range(20 + 30 * i)] for i in range(3)]

    def run(chunk: int) -> list[list[Sampled]]:
        return generate(engine, [sequence(i, p, 128, 20) for i, p in enumerate(prompts)], 8, chunk)

    whole, pieces = run(64), run(16)
    assert [len(tokens) for tokens in whole] == [8, 8, 8]
    assert compare("x", whole, pieces).good


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.1-8b", (7.4, 7.6)), ("llama-3.1-70b", (69, 70)), ("qwen3-8b", (7.5, 7.7))]
)
def test_shapes_are_what_their_names_say(name, billions):
    from baton.bench.gpu_engine import _weights_read

    shape = ModelConfig.load(CONFIGS / name)
    assert billions[0] < _weights_read(shape) / 1e9 < billions[1]


def test_speed_counts_tokens(tmp_path, monkeypatch):
    from baton.bench import gpu_engine

    make_checkpoint(tmp_path / "tiny")
    monkeypatch.setattr(gpu_engine, "CONFIGS", tmp_path)
    monkeypatch.setattr(gpu_engine, "PREFILL", 256)
    monkeypatch.setattr(gpu_engine, "DECODE_STEPS", 3)
    monkeypatch.setattr(gpu_engine, "DECODE_CONTEXT", 100)
    found = speed("tiny", "cpu", 64 << 20)
    assert isinstance(found, Speed)
    assert set(found.decode_tokens_per_s) == {1, 8, 64} and min(found.decode_tokens_per_s.values()) > 0
    assert found.prefill_tokens_per_s > 0 and found.limit_tokens_per_s > 0


def test_it_asks_for_what_it_loads_and_no_more():
    """A package that is wanted for nothing would keep the check from running where it could."""
    ours = "baton.bench.gpu_engine, baton.bench.gpu_kvtransfer, tests.gpu.two_workers, tests.tiny"
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
