"""The engine on an accelerator: is it right, and how fast: `python -m baton.bench.gpu_engine --out FOLDER`.

Right: greedy tokens and log-probabilities on CUDA against the same checkpoint on CPU, both in float32, for a tiny
model and for one with an 8B model's layers, but two of them. Fast: one step at a time, without scheduler or server, of
models with real shapes and made-up weights.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence as Listing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ..common.config import EngineConfig
from ..common.types import Request, SamplingParams, TokenLogprob
from ..engine.plan import Sampled, Slice, StepPlan
from ..engine.runner import Engine, build_engine
from ..engine.sequence import Sequence
from .record import write

CONFIGS = Path(__file__).parent / "configs"
BLOCK = 16
TOP = 20
CLOSE = 1e-3
"""Two candidates whose log-probabilities on CPU differ by less may be swapped by another order of summation."""
WORST_LOGPROB = 2e-3
DECODE_BATCHES = (1, 8, 64)
DECODE_CONTEXT = 512
DECODE_STEPS = 32
PREFILL = 2048


@dataclass(frozen=True, slots=True)
class Agreement:
    """CUDA against CPU. `tokens` were compared, `ties` prompts ended early at a choice too close to call, `wrong` did
    at any other; `worst` is the largest difference of a log-probability among the candidates of equal prefixes."""

    model: str
    prompts: int
    tokens: int
    ties: int
    wrong: int
    worst: float

    @property
    def good(self) -> bool:
        return self.wrong == 0 and self.worst < WORST_LOGPROB and self.tokens > 0


@dataclass(frozen=True, slots=True)
class Speed:
    """One shape. `bandwidth_bytes_per_s` is what reading memory reaches here; `limit` the tokens/s that reading the
    weights once a step allows at batch 1."""

    model: str
    weight_bytes: int
    bandwidth_bytes_per_s: float
    limit_tokens_per_s: float
    decode_tokens_per_s: dict[int, float]
    prefill_tokens_per_s: float


def sequence(number: int, tokens: Listing[int], room: int, logprobs: int | None = None) -> Sequence:
    """A sequence with blocks of its own for `room` tokens, in an order that is not the natural one."""
    count = -(-room // BLOCK)
    blocks = array("i", range(number * count, (number + 1) * count))
    random.Random(number).shuffle(blocks)
    params = SamplingParams(max_tokens=room, temperature=0.0, ignore_eos=True, logprobs=logprobs)
    return Sequence(("", number), Request(str(number), tuple(tokens), len(tokens), params), 0, 0.0, 0.0, blocks=blocks)


def generate(engine: Engine, sequences: Listing[Sequence], count: int, chunk: int) -> list[list[Sampled]]:
    """Greedy: prefill in chunks of `chunk` tokens, one sequence after the other, then decode all together."""
    outputs: list[list[Sampled]] = [[] for _ in sequences]

    def step(parts: Listing[tuple[int, int]]) -> None:
        plan = StepPlan(1 << 30)
        for index, tokens in parts:
            plan.add(sequences[index], tokens)
        for (index, tokens), sampled in zip(parts, engine.runner.launch(plan).results(), strict=True):
            sequences[index].launched += tokens
            if sampled is not None:
                sequences[index].tokens.append(sampled.token)
                outputs[index].append(sampled)

    for index, one in enumerate(sequences):
        while not outputs[index]:
            step([(index, min(chunk, one.missing))])
    for _ in range(count - 1):
        step([(index, 1) for index in range(len(sequences))])
    return outputs


def compare(name: str, expected: list[list[Sampled]], got: list[list[Sampled]]) -> Agreement:
    """Token by token, until a prompt's outputs part."""
    tokens = ties = wrong = 0
    worst = 0.0
    for theirs, ours in zip(expected, got, strict=True):
        for a, b in zip(theirs, ours, strict=True):
            assert a.logprob is not None and b.logprob is not None, "compared sequences ask for log-probabilities"
            worst = max(worst, _difference(a.logprob, b.logprob))
            tokens += 1
            if a.token != b.token:
                close = a.logprob.top[0][1] - dict(a.logprob.top).get(b.token, float("-inf")) < CLOSE
                ties, wrong = ties + close, wrong + (not close)
                break
    return Agreement(name, len(expected), tokens, ties, wrong, worst)


def _difference(a: TokenLogprob, b: TokenLogprob) -> float:
    other = dict(b.top)
    return max(abs(value - other[token]) for token, value in a.top[: TOP // 2] if token in other)


def agreement(name: str, folder: Path, vocab: int, device: str) -> Agreement:
    """Sixteen prompts of 5 to 230 tokens, 32 tokens each, on CPU and on `device`."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, vocab) for _ in range(5 + 15 * i)] for i in range(16)]
    results = []
    for where in ("cpu", device):
        config = EngineConfig(
            model=str(folder), dtype="float32", device=where, block_size=BLOCK, kv_memory=1 << 30, max_batch_tokens=64,
            max_model_len=512,
        )  # fmt: skip
        engine = build_engine(config, lambda share: None)
        sequences = [sequence(i, prompt, 288, TOP) for i, prompt in enumerate(prompts)]
        results.append(generate(engine, sequences, 32, chunk=64))
    return compare(name, *results)


def checkpoint(folder: Path, **overrides: Any) -> Path:
    """A random Llama checkpoint; a large `initializer_range` spreads its logits, so that greedy choices are clear."""
    config = transformers.LlamaConfig(**{"tie_word_embeddings": False, "initializer_range": 0.06} | overrides)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def speed(name: str, device: str, kv_memory: int) -> Speed:
    """Decode at several widths over a context of `DECODE_CONTEXT`, and one prefill of `PREFILL` tokens."""
    config = EngineConfig(
        model=str(CONFIGS / name), device=device, block_size=BLOCK, kv_memory=kv_memory, max_model_len=4096,
        max_batch_tokens=PREFILL, dummy_weights=True,
    )  # fmt: skip
    engine = build_engine(config, lambda share: None)
    vocab = engine.vocab_size
    decode = {batch: batch / _median_step(engine, _decoders(batch, vocab)) for batch in DECODE_BATCHES}
    prompt = sequence(0, _tokens(PREFILL, vocab), PREFILL + 1)
    prefill = PREFILL / _median_step(engine, [Slice.of(prompt, 0, PREFILL)], repeats=5)
    shape = engine.model_config
    size = _weights_read(shape) * (2 if device != "cpu" else 4)
    bandwidth = read_bandwidth(device)
    return Speed(name, size, bandwidth, bandwidth / size, decode, prefill)


def _decoders(batch: int, vocab: int) -> list[Slice]:
    room = DECODE_CONTEXT + 2
    owners = [sequence(i, _tokens(DECODE_CONTEXT + 1, vocab), room) for i in range(batch)]
    return [Slice.of(owner, DECODE_CONTEXT, 1) for owner in owners]


def _tokens(count: int, vocab: int) -> list[int]:
    return random.Random(count).choices(range(vocab), k=count)


def _median_step(engine: Engine, slices: list[Slice], repeats: int = DECODE_STEPS) -> float:
    """Seconds of one step. The sampled tokens come back to the host, so a step's end is seen here."""
    times = []
    for turn in range(repeats + 3):
        begin = time.perf_counter()
        engine.runner.launch(StepPlan(1 << 30, list(slices))).results()
        if turn >= 3:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _weights_read(shape: Any) -> int:
    """Parameters that one decode step reads: all but the embedding table, of which it reads a row a token."""
    layer = shape.hidden_size * (shape.qkv_size + shape.num_heads * shape.head_dim + 3 * shape.intermediate_size)
    return int(shape.num_layers * layer + shape.vocab_size * shape.hidden_size)


def read_bandwidth(device: str) -> float:
    """Bytes a second of a copy inside the device's memory, read and written bytes both counted."""
    size = (2 << 30) if device != "cpu" else (128 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        _wait(device)
        begin = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size / best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> int:
    """0 where everything ran and agreed."""
    parser = argparse.ArgumentParser(description="Check and time the engine on an accelerator.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result file")
    parser.add_argument("--models", default="llama-3.1-8b qwen3-8b", help="names in bench/configs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kv-gib", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2, help="of the large checkpoint; 0: without it")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    found: list[Agreement] = []
    with tempfile.TemporaryDirectory() as folder:
        tiny = {"vocab_size": 640, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3,
                "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}  # fmt: skip
        large = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
                 "num_hidden_layers": options.layers, "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
        shapes = {"tiny": tiny} | ({f"8B-shaped, {options.layers} layers": large} if options.layers else {})
        for number, (name, shape) in enumerate(shapes.items()):
            path = checkpoint(Path(folder) / str(number), **shape)
            found.append(agreement(name, path, shape["vocab_size"], options.device))
            print(found[-1], "agrees" if found[-1].good else "DOES NOT AGREE", flush=True)
    device = torch.cuda.get_device_name() if options.device != "cpu" else "CPU"
    parameters = {"torch": torch.__version__, "kv_gib": options.kv_gib}
    speeds: list[Speed] = []
    for name in ("", *options.models.split()):  # written after each, so that a run cut short leaves what it found
        if name:
            speeds.append(speed(name, options.device, options.kv_gib << 30))
            print(speeds[-1], flush=True)
        results = {"device": device, "agreement": [asdict(a) for a in found], "speed": [asdict(s) for s in speeds]}
        path = write("gpu_engine", "gpu_engine", results, parameters, options.out)
    print(f"wrote {path.name}")
    return 0 if all(a.good for a in found) else 1


if __name__ == "__main__":
    sys.exit(main())
