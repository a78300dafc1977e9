"""The engine's bench: what it calls agreement, the limits that it computes, idle shares, and all of it on a CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from baton.bench import ceilings, timing
from baton.bench.ceilings import Ceilings
from baton.bench.engine.__main__ import CONFIGS, main
from baton.bench.engine.agreement import compare, generate, sequence
from baton.bench.engine.idle import idle_of, intervals
from baton.bench.engine.limits import Costs, decode_step_s, prefill_s, throughput
from baton.bench.engine.loop import Load, closed_loop
from baton.bench.engine.served import Streams, served_loop
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
    config = EngineConfig(model=str(path), threads=1, device="cpu", kv_memory=8 << 20, max_batch_tokens=64)
    engine = build_engine(config, lambda share: None)
    prompts = [[3 + (7 * i + j) % 300 for j in range(20 + 30 * i)] for i in range(3)]

    def run(chunk: int) -> list[list[Sampled]]:
        return generate(engine, [sequence(i, p, 128, 20) for i, p in enumerate(prompts)], 8, chunk)

    whole, pieces = run(64), run(16)
    assert [len(tokens) for tokens in whole] == [8, 8, 8]
    assert compare("x", whole, pieces).good


# --- limits -----------------------------------------------------------------------------------------------------------

H100 = Ceilings("H100", "bfloat16", copy=3.0e12, product=700e12)
"""About what one was measured to do."""


def costs(name: str = "llama-3.1-8b") -> Costs:
    shape = ModelConfig.load(CONFIGS / name)
    return Costs.of(shape, "bfloat16", shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * 2)


def test_costs_of_an_8b_model_by_hand() -> None:
    layer = 4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336
    assert costs().matrices == 32 * layer == 6_979_321_856
    assert costs().head == 4096 * 128256 == 525_336_576
    assert costs().weights == 15_009_316_864
    assert costs().kv == 131_072
    assert costs().attention == 4 * 32 * 128 * 32
    assert costs().prefill_flops(2) == 2 * (2 * costs().matrices + costs().head) + 3 * costs().attention


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.1-8b", (7.4, 7.6)), ("llama-3.1-70b", (69, 70)), ("qwen3-8b", (7.5, 7.7))]
)
def test_shapes_are_what_their_names_say(name: str, billions: tuple[float, float]) -> None:
    assert billions[0] < costs(name).weights / 2e9 < billions[1]


def test_a_decode_step_reads_weights_and_kv_once() -> None:
    assert decode_step_s(costs(), H100, 1, 0) == pytest.approx(15.009e9 / 3e12, rel=1e-3)
    assert decode_step_s(costs(), H100, 256, 1024) == pytest.approx((15.009e9 + 34.360e9) / 3e12, rel=1e-3)


def test_a_prefill_takes_its_flops() -> None:
    flops = 2 * (6.979e9 * 4096 + 0.525e9) + 524_288 * 4096 * 4097 / 2
    assert prefill_s(costs(), H100, 4096) == pytest.approx(flops / 700e12, rel=1e-3)


def test_the_limit_of_one_h100_is_what_it_was_said_to_be() -> None:
    """About 10,000 and 24,000 tokens/s in bf16, with about 500,000 tokens of KV beside the weights."""
    long, short = (throughput(costs(), H100, n, n, 500_000) for n in (1000, 128))
    assert long.tokens_per_s == pytest.approx(10_000, rel=0.05) and long.batch == 333
    assert short.tokens_per_s == pytest.approx(24_000, rel=0.05) and short.batch == 2604


def test_the_limit_counts_both_phases_and_the_longer_of_bytes_and_flops() -> None:
    model = Costs(matrices=90, head=10, attention=0, item=1, kv=1)
    device = Ceilings("", "", copy=1e3, product=1e4)
    # 8 requests with 12 tokens each on average: 100 + 96 bytes a step, and 8 / 4 prompts of 10 tokens.
    assert throughput(model, device, 10, 4, 100).tokens_per_s == pytest.approx(8 / (0.196 + 2 * 1820 / 1e4))
    slow = Ceilings("", "", copy=1e3, product=1e2)
    assert throughput(model, slow, 10, 4, 100).tokens_per_s == pytest.approx(8 / (16 + 2 * 1820 / 1e2))


# --- idle shares ------------------------------------------------------------------------------------------------------


def test_gaps_are_idle_and_long_ones_are_the_hosts() -> None:
    found = idle_of([(60.0, 100.0), (0.0, 10.0), (5.0, 20.0), (22.0, 30.0), (24.0, 26.0)])
    assert (found.seconds, found.events) == (pytest.approx(1e-4), 5)
    assert found.idle_share == pytest.approx(0.32)  # 20 to 22 and 30 to 60
    assert found.late_share == pytest.approx(0.30)


def test_nothing_that_ran_is_no_idle_device() -> None:
    assert math.isnan(idle_of([]).idle_share)


def test_only_what_ran_on_the_device_counts() -> None:
    events = [
        {"cat": "kernel", "ts": 1.0, "dur": 2.0}, {"cat": "cpu_op", "ts": 0.0, "dur": 9.0}, {"ph": "i"},
        {"cat": "gpu_memcpy", "ts": 5, "dur": 1}, {"cat": "kernel", "ts": 3.0},
    ]  # fmt: skip
    assert intervals({"traceEvents": events}) == [(1.0, 3.0), (5.0, 6.0)]


# --- timing -----------------------------------------------------------------------------------------------------------


def test_times_are_of_one_call_and_ceilings_are_rates() -> None:
    turns: list[int] = []
    calls = [lambda: turns.append(1), lambda: turns.append(2)]
    assert 0 < timing.median_s(torch.device("cpu"), calls, repeats=3, warm=1) < 1
    assert turns == [1, 2] * 4
    assert timing.sets_beyond_cache(torch.device("cuda"), 4 << 20) * (4 << 20) > timing.CACHE_BYTES
    assert timing.sets_beyond_cache(torch.device("cuda"), 1 << 30) == 2
    found = ceilings.measure(torch.device("cpu"), torch.float32, ceilings.TINY)
    assert found.dtype == "float32" and found.copy > 1e6 and found.product > 1e5


# --- all of it --------------------------------------------------------------------------------------------------------


def test_a_closed_loop_keeps_so_many_requests_and_leaves_nothing(tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(make_checkpoint(tmp_path)), threads=1, device="cpu", kv_memory=8 << 20, max_batch_tokens=64
    )
    engine = build_engine(config, lambda share: None)
    with closed_loop(engine, Load(6, 20, 12), 64, overlap=False) as loop:
        assert loop.live == 6
        window = next(found for _ in range(100) if (found := loop.run(0.2)).finished)  # later where others compute too
        assert window.tokens and window.steps and not window.preemptions
        assert loop.live == 6
    report = loop.loop.inspect()
    assert report.ok and report.sequences == 0 and report.free_blocks + report.cached_blocks == report.total_blocks


def test_the_whole_bench_runs_on_a_cpu(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", max_position_embeddings=4096)
    options = ["--device", "cpu", "--tiny", "--max-running", "8", "--max-batch-tokens", "64", "--model", str(folder)]
    assert main([*options, "--out", str(tmp_path), "--parts", "steps,throughput,idle,deterministic"]) == 0
    found = json.loads((tmp_path / "engine.json").read_text())["results"]
    assert [step["kind"] for step in found["steps"]] == ["decode", "decode", "prefill"]
    assert len(found["deterministic"]) == 3
    assert [(row["overlap"], row["served"]) for row in found["idle"]] == [(True, False), (False, False), (True, True)]
    assert found["idle"][2]["router"]["tokens"] >= 2 * 5  # two streams, of every step that was measured
    assert found["throughput"][0]["tokens_per_s"] > 0 and found["throughput"][0]["limit_batch"] > 1000


def test_streams_whose_prompts_take_several_steps_are_all_under_way_when_they_are_measured(tmp_path: Path) -> None:
    """Each runs from its first chunk on, and has no token before the last."""
    config = EngineConfig(
        model=str(make_checkpoint(tmp_path)), threads=1, device="cpu", kv_memory=8 << 20, max_batch_tokens=16
    )
    with served_loop(build_engine(config, lambda share: None), config, Streams(2, 60, 64)) as served:
        served.step(4)
        assert served.said()["tokens"] >= 2 * 4


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
