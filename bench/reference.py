"""transformers behind standard input and output: `python -m baton.bench.reference FOLDER THREADS`.

Each line in is one batch of prompts of equal length, {"prompts": [[ids]], "output_len": n}; each line out says when
each token had been chosen. `generate` as anyone would call it: float32, greedy, its own KV cache.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class _Stamps(StoppingCriteria):
    """Never stops; it is called after each step, and notes when."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate(model: Any, prompts: list[list[int]], output_len: int) -> dict[str, Any]:
    """One batched `generate` of exactly `output_len` tokens for each prompt."""
    tokens = torch.tensor(prompts)
    stamps = _Stamps()
    begin = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            min_new_tokens=output_len,
            max_new_tokens=output_len,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([stamps]),
        )
    wall = time.perf_counter() - begin
    assert out.shape == (len(prompts), len(prompts[0]) + output_len), "generate stopped early"
    return {"steps": [t - begin for t in stamps.times], "wall_s": wall}


def main() -> None:
    """Load, then answer until standard input ends."""
    folder, threads = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to standard error, not among the answers
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(generate(model, job["prompts"], job["output_len"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
