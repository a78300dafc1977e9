"""The judge of greedy output: Hugging Face transformers, in float32, on the same weights as the server.

Teacher forcing makes the comparison exact and cheap. One forward pass over prompt and output gives, at every position,
what the reference would choose after the same prefix; by induction the output is the reference's greedy output if and
only if each of its tokens is that choice. A token that differs is forgiven only where the reference itself cannot
tell the two apart: their logits differ by less than `CLOSE`. What follows it is judged on its own prefix all the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.prompts import Prompt

CLOSE = 1e-4
"""Logits nearer than this are equal, as far as float32 in another order of summation can tell."""
FORGIVEN = 0.01
"""Share of all positions that may differ, all of them close."""

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Positions of an output at which it differs from the reference: `wrong` ones, and `close` ones."""

    wrong: Tokens = ()
    close: Tokens = ()

    def until(self, length: int) -> Verdict:
        """Of the output's first `length` tokens."""
        return Verdict(tuple(p for p in self.wrong if p < length), tuple(p for p in self.close if p < length))


@dataclass(slots=True)
class Judge:
    """Holds the reference model. Verdicts are kept, so an output that comes again, or a part of it, costs nothing."""

    model: Any
    tokenizer: Any
    pool: ThreadPoolExecutor
    """Each thread computes by itself: torch's own threads would wait for each other wherever the machine is busy."""
    known: dict[Tokens, list[tuple[Tokens, Verdict]]] = field(default_factory=dict)
    """Prompt → outputs judged so far."""
    judged: int = 0
    """Outputs that `check` was asked about, and below, their tokens and the differences that it forgave."""
    tokens: int = 0
    forgiven: int = 0

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """From a checkpoint folder."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,))
        return cls(model, AutoTokenizer.from_pretrained(folder), pool)

    def encode(self, prompt: Prompt) -> Tokens:
        """The prompt's tokens by the reference's own tokenizer and chat template."""
        if isinstance(prompt, str):
            return tuple(self.tokenizer(prompt)["input_ids"])
        return tuple(self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Their text, without special tokens, as clients see it."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def generate(self, prompt: Tokens, count: int) -> Tokens:
        """What transformers' own greedy `generate` says, whatever it thinks of the end of a text."""
        tokens = torch.tensor([prompt])
        with torch.inference_mode():
            out = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=count,
                eos_token_id=None,
                pad_token_id=0,
            )
        return tuple(out[0, len(prompt) :].tolist())

    def verdict(self, prompt: Tokens, output: Tokens) -> Verdict:
        """Where `output` is not what the reference continues `prompt` with."""
        known = self.known.setdefault(prompt, [])
        for longer, verdict in known:
            if longer[: len(output)] == output:
                return verdict.until(len(output))
        verdict = self._judge(prompt, output)
        known.append((output, verdict))
        return verdict

    def check(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> None:
        """Fail unless every (prompt, output) is the reference's, but for a few positions that are close."""
        asked: dict[Tokens, list[Tokens]] = {}
        for prompt, output in sorted(pairs, key=lambda pair: len(pair[1]), reverse=True):
            asked.setdefault(prompt, []).append(output)
        # The longest output of a prompt comes first: if all is well, the others are parts of it.
        list(self.pool.map(lambda prompt: [self.verdict(prompt, output) for output in asked[prompt]], asked))
        verdicts = [self.verdict(*pair) for pair in pairs]
        for (prompt, output), verdict in zip(pairs, verdicts, strict=True):
            assert not verdict.wrong, (
                f"differs from the reference at {verdict.wrong} after the prompt {self.decode(prompt)[:80]!r} of "
                f"{len(prompt)} tokens: {output}"
            )
        tokens = sum(len(output) for _, output in pairs)
        forgiven = sum(len(verdict.close) for verdict in verdicts)
        self.judged += len(pairs)
        self.tokens += tokens
        self.forgiven += forgiven
        assert forgiven <= FORGIVEN * tokens, f"{forgiven} of {tokens} tokens differ, all at close logits"

    def logprobs(self, prompt: Tokens, output: Tokens) -> list[float]:
        """Log-probability of each token of `output`."""
        logprobs = self._logits(prompt, output).log_softmax(dim=-1)
        return [float(row[token]) for row, token in zip(logprobs, output, strict=True)]

    def _logits(self, prompt: Tokens, output: Tokens) -> torch.Tensor:
        """[output, vocabulary]: what each token of `output` was chosen from."""
        with torch.inference_mode():
            logits: torch.Tensor = self.model(torch.tensor([prompt + output]), logits_to_keep=len(output) + 1).logits
        return logits[0, :-1]

    def _judge(self, prompt: Tokens, output: Tokens) -> Verdict:
        logits = self._logits(prompt, output)
        best = logits.max(dim=-1).values
        behind = best - logits.gather(1, torch.tensor([output]).T)[:, 0]
        chosen = logits.argmax(dim=-1) == torch.tensor(output)
        close = ~chosen & (behind < CLOSE)
        return Verdict(_where(~chosen & ~close), _where(close))


def _where(mask: torch.Tensor) -> Tokens:
    return tuple(mask.nonzero()[:, 0].tolist())
