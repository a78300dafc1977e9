"""From sequences to what the sampling kernels read, and from what they draw to `Results`.

What is computed, and in which order, stands in `kernels/sampling.py`. Reported log-probabilities are of the model's own
distribution: log_softmax of the untouched logits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import numpy.typing as npt
import torch

from ..common.errors import EngineFailure
from ..common.types import TokenLogprob
from ..kernels import sampling
from ..kernels.sampling import IN_PROMPT, MOST, RECORD
from .knobs import Knobs, Words
from .pages import Pages
from .plan import Results
from .sequence import Sequence
from .slots import Slots

WAIT_S = 60.0
"""A step that is not through by then will never be."""
_POLL_S = 20e-6
_NOTHING: Words = np.empty(0, np.int64)


class Sampler:
    """`eos_ids` are what min_tokens holds back, beside a request's own stop token ids. `rows`: sequences that draw in
    one step, for which memory is taken at once; for more of them it is taken when they come.

    One thread, and on CUDA one stream: that on which the logits are computed.
    """

    def __init__(
        self, eos_ids: frozenset[int], vocab_size: int, device: torch.device | None = None, rows: int = 0
    ) -> None:
        self._eos = tuple(sorted(eos_ids))
        self._device = device or torch.device("cpu")
        self._slots = Slots()
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int16, device=self._device)
        self._spare = torch.empty(0, vocab_size, dtype=torch.int32, device=self._device)
        self._sent: _Sent | None = None
        self._ends: list[int] = []
        self._further = 0
        self._begin([], [])
        self._make_room(rows, rows)

    def sample(
        self, logits: torch.Tensor, owners: list[Sequence], ends: list[int], out: torch.Tensor | None = None
    ) -> Drawn:
        """One token for each row of logits [R, V] float32, which are overwritten; `owners[r]` draws in row r, and its
        token gets the position `ends[r]`. `out` [R] int64: where the tokens shall lie on the device. Nothing here waits
        for one. Raises `EngineFailure` where the tokens of a sequence with penalties are not known: one that draws must
        have drawn in the step before, or have no pending token."""
        if owners != self._rows.owners:
            self._begin(owners, [owner.knobs or self._knobs(owner) for owner in owners])
        self._ends, self._further, self._sent = ends, 0, None
        return self._sample(logits, out)

    def sample_on(self, logits: torch.Tensor, out: torch.Tensor | None = None) -> Drawn:
        """The same for the owners of the call before, each of which is a token further."""
        self._further += 1
        if self._rows.edited:
            self._sent = None
        elif self._sent is not None:
            self._sent.step()
        return self._sample(logits, out)

    def _sample(self, logits: torch.Tensor, out: torch.Tensor | None) -> Drawn:
        rows = self._rows
        if rows.asked:
            (asked,) = self._send(np.array(rows.asked))
            untouched = logits[asked]  # a copy
        if rows.greedy:
            tokens = sampling.greedy(logits, out)
        else:
            sent = self._sent = self._sent or self._records()
            tokens = sampling.draw(logits, sent.words, sent.pairs, self._counts, self._spare, out)
        logprobs = None
        if rows.asked:
            counts = [rows.knobs[row].logprobs or 0 for row in rows.asked]
            logprobs = _Logprobs.of(untouched, tokens[asked], rows.asked, counts)
        return Drawn.of(tokens, next(self._pages), logprobs)

    def _begin(self, owners: list[Sequence], knobs: list[Knobs]) -> None:
        """Two steps are under way at most, so what one draws comes to the page of the one before the last."""
        self._rows = _Rows.of(owners, knobs)
        self._pages = cycle([_Page.of(len(owners), self._device) for _ in range(2)])

    def _knobs(self, sequence: Sequence) -> Knobs:
        knobs = sequence.knobs = Knobs.of(sequence, self._eos)
        return knobs

    def _records(self) -> _Sent:
        """All that the kernels read goes to the device in one copy."""
        records, rows = np.frombuffer(bytearray(self._rows.records), RECORD), self._rows
        records["position"] = ends = np.array(self._ends) + self._further
        self._make_room(len(records), len(rows.penalised))
        added, *fill = self._edit(records, ends.tolist()) if rows.edited else (_NOTHING,)
        words, pairs, *fills = self._send(records.view(np.int64), added, *fill)
        if fills:
            sampling.fill(self._counts, *fills)
        return _Sent(records, words, pairs)

    def _edit(self, records: npt.NDArray[np.void], ends: list[int]) -> tuple[Words, ...]:
        """Write into the records what is done to the logits of `edited` rows: with which pairs, which are returned, and
        by which slots, for which `sampling.fill` is to be called where more is returned."""
        knobs, edited, penalised = self._rows.knobs, self._rows.edited, self._rows.penalised
        pairs = [knobs[row].added(ends[row]) for row in edited]
        upto = np.cumsum([len(mine) for mine in pairs])
        records["added_from"][edited[1:]], records["added_to"][edited] = upto[:-1], upto
        slots, fills = [], []
        for row in penalised:
            owner = self._rows.owners[row]
            slot, right = self._slots.take(owner.key, ends[row])
            slots.append(slot)
            if not right:
                fills.append((slot, *_said(owner, ends[row])))
        records["slot"][penalised] = slots
        return np.concatenate(pairs), *self._fills(fills)

    def _fills(self, fills: list[tuple[int, Words, Words]]) -> tuple[Words, ...]:
        """Slots, places in the flat table, and entries, for `sampling.fill`."""
        if not fills:
            return ()
        slots, tokens, entries = zip(*fills, strict=True)
        size = self._counts.shape[1]
        places = [slot * size + mine for slot, mine in zip(slots, tokens, strict=True)]
        return np.array(slots), np.concatenate(places), np.concatenate(entries)

    def _make_room(self, rows: int, penalised: int) -> None:
        if self._device.type == "cuda" and rows > len(self._spare):
            self._spare = self._spare.new_empty(rows, self._spare.shape[1])
        missing = 2 * penalised - self._slots.count
        if missing > 0:
            self._slots.make_room(2 * penalised)
            self._counts = torch.cat((self._counts, self._counts.new_zeros(missing, self._counts.shape[1])))

    def _send(self, *parts: Words) -> list[torch.Tensor]:
        """To the device, in one copy that nobody waits for."""
        words = torch.from_numpy(np.concatenate(parts))
        if self._device.type == "cuda":
            words = words.pin_memory().to(self._device, non_blocking=True)
        return list(words.split_with_sizes([len(part) for part in parts]))


class _Sent:
    """What the kernels read: `words` [R, 8] and `pairs`, both on the device."""

    def __init__(self, records: npt.NDArray[np.void], words: torch.Tensor, pairs: torch.Tensor) -> None:
        self.words = words.view(len(records), -1)
        self.pairs = pairs
        self._there = words.view(torch.uint8)
        self._bytes = records.view(np.uint8).data
        self._positions = records["position"]
        self._pages: Pages | None = None

    def step(self) -> None:
        """All rows are a token further, and nothing else has changed."""
        self._pages = self._pages or Pages(len(self._bytes), self._there.is_cuda)
        self._positions += 1
        self._there.copy_(self._pages.write(self._bytes), non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the knobs of a step's rows come to, which stays for as long as the same sequences draw in the same order.

    owners      of the rows
    greedy      all rows are
    asked       rows whose log-probabilities are reported
    edited      rows whose logits are changed, and `penalised` those of them that what has been said changes
    records     one after the other
    """

    owners: list[Sequence]
    knobs: list[Knobs]
    greedy: bool
    asked: list[int]
    edited: list[int]
    penalised: list[int]
    records: bytes

    @classmethod
    def of(cls, owners: list[Sequence], knobs: list[Knobs]) -> _Rows:
        return cls(
            owners=owners,
            knobs=knobs,
            greedy=all(k.greedy for k in knobs),
            asked=[row for row, k in enumerate(knobs) if k.logprobs is not None],
            edited=[row for row, k in enumerate(knobs) if k.edits],
            penalised=[row for row, k in enumerate(knobs) if k.penalised],
            records=b"".join([k.record for k in knobs]),
        )


def _said(sequence: Sequence, end: int) -> tuple[Words, Words]:
    """The distinct tokens of a sequence that draws at `end`, and their entries in a table of counts."""
    if end != len(sequence.tokens):
        raise EngineFailure(f"{sequence.key} has a pending token, and draws as if it had drawn none before")
    tokens = np.array(sequence.tokens, np.int64)
    distinct, where = np.unique(tokens, return_inverse=True)
    entries = np.minimum(np.bincount(where[sequence.prompt_len :], minlength=len(distinct)), MOST)
    entries[where[: sequence.prompt_len]] |= IN_PROMPT
    return distinct, entries


@dataclass(frozen=True, slots=True)
class _Page:
    """Where a step's tokens come to, in memory that a device can write by itself, and what tells that they have."""

    tokens: torch.Tensor
    ended: torch.cuda.Event | None

    @classmethod
    def of(cls, rows: int, device: torch.device) -> _Page:
        on_cuda = device.type == "cuda"
        tokens = torch.empty(rows, dtype=torch.int64, pin_memory=on_cuda)
        return cls(tokens, torch.cuda.Event() if on_cuda else None)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Drawn:
    """`tokens` [R] int64 lie on the device, where the next step reads them; `results` waits until they are here. It has
    to be asked before the step after the next one is sampled, which takes the memory."""

    tokens: torch.Tensor
    _here: _Page
    _logprobs: _Logprobs | None

    @classmethod
    def of(cls, tokens: torch.Tensor, here: _Page, logprobs: _Logprobs | None = None) -> Drawn:
        here.tokens.copy_(tokens, non_blocking=True)
        if here.ended is not None:
            here.ended.record()
        return cls(tokens, here, logprobs)

    def results(self, wait_s: float = WAIT_S) -> Results:
        """One entry for each row. Raises `EngineFailure` where they do not come in time, or the device has failed."""
        deadline = time.monotonic() + wait_s
        try:
            while self._here.ended is not None and not self._here.ended.query():  # type: ignore[no-untyped-call]
                if time.monotonic() > deadline:
                    raise EngineFailure(f"a step is not through after {wait_s:g} s")
                time.sleep(_POLL_S)
        except RuntimeError as error:  # of the device, and of some kernel before
            raise EngineFailure(f"a step failed on the device: {error}") from error
        return Results(self._here.tokens.tolist(), self._logprobs.results() if self._logprobs else {})


@dataclass(frozen=True, slots=True)
class _Logprobs:
    """Log-probabilities on their way here: of the chosen token [W] of each of `rows`, and of the best [W, n]."""

    rows: list[int]
    counts: list[int]
    chosen: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, tokens: torch.Tensor, rows: list[int], counts: list[int]) -> _Logprobs:
        """Of untouched logits [W, V] and the tokens [W] drawn from them; `counts`: alternatives that each row wants."""
        logprobs = torch.log_softmax(logits, dim=-1)
        best = logprobs.topk(max(counts))
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        here = (part.to("cpu", non_blocking=True) for part in (chosen, best.values, best.indices))
        return cls(rows, counts, *here)

    def results(self) -> dict[int, TokenLogprob]:
        """By the row that each belongs to. Only once they are here."""
        lists = zip(self.chosen.tolist(), self.tokens.tolist(), self.values.tolist(), self.counts, strict=True)
        made = [TokenLogprob(chosen, tuple(zip(ids[:n], best[:n], strict=True))) for chosen, ids, best, n in lists]
        return dict(zip(self.rows, made, strict=True))
