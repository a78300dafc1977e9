"""What to send, and when: prompts of exact lengths, and arrival processes. Everything follows from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .client import Prompt
from .trace import TraceRow

ORDINARY_IDS = range(1000, 30000)
"""Token ids that are plain text in practically every vocabulary: above the bytes and control tokens, below 32,000."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request to be sent: seconds after the start of the run, prompt, and output tokens to ask for."""

    arrival: float
    prompt: Prompt
    output_len: int


class Words:
    """Draws prompts: as token ids, or as text that has exactly as many tokens.

    Text needs a vocabulary of words that stay one token each when they are joined; `from_tokenizer` finds them.
    """

    def __init__(self, ids: Sequence[int] = ORDINARY_IDS, texts: Sequence[str] | None = None) -> None:
        self._ids, self._texts = ids, texts

    @classmethod
    def from_tokenizer(cls, folder: str, count: int = 2000) -> Words:
        """Words of the tokenizer.json in `folder`: a space and ASCII letters, so that words never merge."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        ids: list[int] = []
        texts: list[str] = []
        for token in sorted(tokenizer.get_vocab().values()):
            text = tokenizer.decode([token])
            if text.startswith(" ") and len(text) > 3 and text[1:].isascii() and text[1:].islower():
                alone = tokenizer.encode(text, add_special_tokens=False).ids == [token]
                twice = tokenizer.encode(text * 2, add_special_tokens=False).ids == [token, token]
                if alone and twice and text[1:].isalpha():
                    ids.append(token)
                    texts.append(text)
            if len(ids) == count:
                break
        return cls(ids, texts)

    @property
    def ids(self) -> Sequence[int]:
        return self._ids

    def draw(self, rng: random.Random, length: int) -> list[int]:
        """Indices of `length` random words."""
        return rng.choices(range(len(self._ids)), k=length)

    def prompt(self, indices: Sequence[int], text: bool) -> Prompt:
        if not text:
            return tuple(self._ids[i] for i in indices)
        if self._texts is None:
            raise ValueError("prompts as text need a tokenizer: their length in tokens depends on it")
        return "".join(self._texts[i] for i in indices)


def random_jobs(
    count: int, input_len: int, output_len: int, *, seed: int, words: Words, shared: float = 0.0, text: bool = False
) -> list[Job]:
    """`count` prompts of exactly `input_len` tokens, all due at once. The first `shared` (0 to 1) of each is the
    same in all of them; beyond it no two share a prefix."""
    rng = random.Random(seed)
    common = words.draw(rng, round(input_len * shared))
    return [
        Job(0.0, words.prompt(common + words.draw(rng, input_len - len(common)), text), output_len)
        for _ in range(count)
    ]


def trace_jobs(
    rows: Sequence[TraceRow], *, seed: int, words: Words, speed: float = 1.0, text: bool = False
) -> list[Job]:
    """Prompts for the rows of a trace: equal prefix ids become equal tokens, and what has no id is random.
    Arrivals are divided by `speed`."""
    rng = random.Random(seed)
    jobs: list[Job] = []
    for row in rows:
        indices: list[int] = []
        for name in row.prefix:
            indices += words.draw(random.Random(f"{seed}/{name}"), row.block)
        del indices[row.input_len :]
        indices += words.draw(rng, row.input_len - len(indices))
        jobs.append(Job(row.arrival / speed, words.prompt(indices, text), row.output_len))
    return jobs


def poisson(jobs: Sequence[Job], rate: float, seed: int) -> list[Job]:
    """The same jobs with exponential times between arrivals, `rate` a second."""
    rng = random.Random(seed)
    now = 0.0
    timed: list[Job] = []
    for job in jobs:
        timed.append(Job(now, job.prompt, job.output_len))
        now += rng.expovariate(rate)
    return timed
