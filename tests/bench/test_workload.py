"""Prompts and arrivals, and the traces they can come from. Samples are inline: the traces are no part of this
repository."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise

import pytest

from baton.bench.trace import MOONCAKE_TICK_S, TraceRow, fit, read_trace
from baton.bench.workload import Words, poisson, random_jobs, trace_jobs


def test_prompts_have_exact_lengths_and_share_nothing_unless_asked():
    jobs = random_jobs(50, 32, 4, seed=3, words=Words())
    assert {len(job.prompt) for job in jobs} == {32}
    assert len({job.prompt[:4] for job in jobs}) == 50
    assert jobs == random_jobs(50, 32, 4, seed=3, words=Words())
    assert jobs != random_jobs(50, 32, 4, seed=4, words=Words())


def test_a_shared_prefix_has_exactly_its_share():
    jobs = random_jobs(50, 32, 4, seed=3, words=Words(), shared=0.5)
    assert len({job.prompt[:16] for job in jobs}) == 1
    assert len({job.prompt[:20] for job in jobs}) == 50
    assert {len(job.prompt) for job in jobs} == {32}


def test_text_needs_words_that_are_one_token_each():
    words = Words([7, 8, 9], [" one", " two", " six"])
    ids = random_jobs(1, 5, 1, seed=0, words=words)[0].prompt
    text = random_jobs(1, 5, 1, seed=0, words=words, text=True)[0].prompt
    assert text == "".join({7: " one", 8: " two", 9: " six"}[i] for i in ids)
    with pytest.raises(ValueError, match="tokenizer"):
        random_jobs(1, 5, 1, seed=0, words=Words(), text=True)


def test_poisson_arrivals_have_the_rate():
    timed = poisson(random_jobs(4000, 1, 1, seed=0, words=Words()), rate=50, seed=1)
    assert timed[0].arrival == 0.0
    assert all(a.arrival < b.arrival for a, b in pairwise(timed))
    assert timed[-1].arrival == pytest.approx(4000 / 50, rel=0.1)


MOONCAKE = [
    {"timestamp": 3000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 3000, "input_length": 1030, "output_length": 6, "hash_ids": [0, 1, 3]},
    {"timestamp": 6000, "input_length": 600, "output_length": 7, "hash_ids": [0, 9]},
]
WEKA = [
    {
        "id": "a", "block_size": 64, "hash_id_scope": "local",
        "requests": [
            {"t": 0.0, "in": 130, "out": 2, "hash_runs": [[1, 2]]},
            {"t": 5.0, "type": "subagent", "requests": [{"t": 1.5, "in": 70, "out": 3, "hash_runs": [[8, 1]]}]},
            {"t": 9.0, "in": 200},
        ],
    },
    {"id": "b", "block_size": 64, "hash_id_scope": "local",
     "requests": [{"t": 0.0, "in": 64, "out": 1, "hash_runs": [[1, 1]]}]},
]  # fmt: skip


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_mooncake_arrivals_are_spread_within_their_tick(tmp_path):
    path = tmp_path / "mooncake.jsonl.gz"
    with gzip.open(path, "wt") as out:
        out.write(jsonl(MOONCAKE * 20))
    rows = read_trace(path)
    assert len(rows) == 60
    assert rows[0].arrival == 0.0
    assert len({row.arrival for row in rows}) == 60
    first_tick = [row.arrival for row in rows if row.output_len in (5, 6)]
    assert MOONCAKE_TICK_S / 2 < max(first_tick) <= MOONCAKE_TICK_S
    assert rows == read_trace(path)
    assert next(row for row in rows if row.output_len == 5).prefix == ["/0", "/1", "/2"]


def test_equal_prefix_ids_become_equal_tokens(tmp_path):
    path = tmp_path / "mooncake.jsonl"
    path.write_text(jsonl(MOONCAKE))
    rows = sorted(read_trace(path), key=lambda row: row.output_len)
    one, two, three = (job.prompt for job in trace_jobs(rows, seed=0, words=Words(), speed=2))
    assert [len(p) for p in (one, two, three)] == [1100, 1030, 600]
    assert one[:1024] == two[:1024] and one[1024:1028] != two[1024:1028]
    assert one[:512] == three[:512] and one[512:516] != three[512:516]
    assert [job.arrival for job in trace_jobs(rows, seed=0, words=Words(), speed=2)] == [r.arrival / 2 for r in rows]


def test_azure_and_servegen(tmp_path):
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
    )
    assert read_trace(azure)[0] == TraceRow(0.0, 4808, 10)
    assert read_trace(azure)[1].arrival == pytest.approx(0.052)
    servegen = tmp_path / "servegen.csv"
    servegen.write_text("timestamp_s,client_id,input_length,output_length\n0.157,18,138,919\n0.169,66,188,12250\n")
    assert [(r.input_len, r.output_len) for r in read_trace(servegen)] == [(138, 919), (188, 12250)]
    assert read_trace(servegen)[1].arrival == pytest.approx(0.012)


def test_weka_sessions_keep_their_own_ids_and_times(tmp_path):
    path = tmp_path / "weka.jsonl"
    path.write_text(jsonl(WEKA))
    rows = {(row.scope, row.output_len): row for row in read_trace(path)}
    assert set(rows) == {("a", 2), ("a", 3), ("b", 1)}  # a request without an output length is left out
    assert rows["a", 3].arrival - rows["a", 2].arrival == pytest.approx(6.5)
    assert rows["a", 2].prefix == ["a/1", "a/2"]
    assert rows["b", 1].prefix == ["b/1"]


def test_an_unknown_file_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b,c\n1,2,3\n")
    with pytest.raises(ValueError, match="no reader"):
        read_trace(path)


def test_fit_shrinks_drops_and_limits():
    rows = [TraceRow(0.0, 1600, 160, ((0, 4),), 512), TraceRow(1.0, 16000, 160), TraceRow(2.0, 8, 8)]
    assert fit(rows, shrink=16, max_len=200) == [TraceRow(0.0, 100, 10, ((0, 4),), 32), TraceRow(2.0, 1, 1)]
    assert fit(rows, limit=1) == rows[:1]
