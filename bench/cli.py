"""`baton bench`: the commands in front of this room. Each imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from .sweep import Plan

app = typer.Typer(
    help="Measure: load on a server, systems side by side, the gateway alone, memory.", no_args_is_help=True
)

N = TypeVar("N", int, float)

Threads = Annotated[int, typer.Option(min=1, help="CPU threads in total.")]
Save = Annotated[str, typer.Option("--save", help="Write bench/results/NAME.json and NAME.png.", metavar="NAME")]


@app.command(epilog="Example: baton bench load http://127.0.0.1:8000 --concurrency 1,8,32 --input 128 --output 128")
def load(
    url: Annotated[str, typer.Argument(help="Root of an OpenAI-compatible server.")],
    concurrency: Annotated[str, typer.Option(help="Closed loop: requests in flight; several: 1,8,32.")] = "",
    rate: Annotated[str, typer.Option(help="Open loop: Poisson arrivals a second; several: 0.5,1,2.")] = "",
    trace: Annotated[Path | None, typer.Option(help="Open loop: replay a trace (see bench/trace.py).")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each run.")] = 64,
    input_len: Annotated[int, typer.Option("--input", min=1, help="Tokens of each prompt.")] = 128,
    output_len: Annotated[int, typer.Option("--output", min=1, help="Tokens of each answer.")] = 128,
    shared: Annotated[float, typer.Option(min=0, max=1, help="Share of each prompt that all have in common.")] = 0.0,
    speed: Annotated[float, typer.Option(min=1e-3, help="Trace: replay this many times faster.")] = 1.0,
    limit: Annotated[int, typer.Option(min=0, help="Trace: first N requests; 0: all.")] = 100,
    shrink: Annotated[int, typer.Option(min=1, help="Trace: divide all lengths by this.")] = 1,
    max_len: Annotated[int, typer.Option(min=0, help="Trace: leave out longer requests; 0: none.")] = 0,
    slo_ttft: Annotated[float, typer.Option(min=0, help="SLO on TTFT in ms; 0: no goodput.")] = 0.0,
    slo_tpot: Annotated[float, typer.Option(min=0, help="SLO on TPOT in ms.")] = 0.0,
    model: Annotated[str, typer.Option(help="Model name; empty: the server's first.")] = "",
    tokenizer: Annotated[str, typer.Option(help="Folder with tokenizer.json: prompts of real words.")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Ask /v1/chat/completions; needs --tokenizer.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Send text, not token ids; needs --tokenizer.")] = False,
    eos: Annotated[bool, typer.Option("--respect-eos", help="Do not send ignore_eos: answers may be shorter.")] = False,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before each run that are not counted.")] = 4,
    seed: Annotated[int | None, typer.Option(help="Of prompts and arrivals; drawn and recorded if left out.")] = None,
    api_key: Annotated[str, typer.Option(envvar="BATON_API_KEY", help="Bearer token.")] = "",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request counts as failed.")] = 600.0,
    save: Save = "",
) -> None:
    """Load a server and measure TTFT, ITL, TPOT, end-to-end latency, tokens/s and goodput."""
    from . import sweep

    if sum((bool(concurrency), bool(rate), trace is not None)) != 1:
        raise typer.BadParameter("choose one of --concurrency, --rate and --trace")
    if (chat or text) and not tokenizer:
        raise typer.BadParameter("prompts as text need --tokenizer to have exact lengths")
    if bool(slo_ttft) != bool(slo_tpot):
        raise typer.BadParameter("--slo-ttft and --slo-tpot go together")
    plan = sweep.Plan(
        url=url, api_key=api_key, model=model, tokenizer=tokenizer, chat=chat, text=text or chat, ignore_eos=not eos,
        timeout_s=timeout, concurrency=_numbers(concurrency, int), rates=_numbers(rate, float), trace=trace,
        speed=speed, limit=limit, shrink=shrink, max_len=max_len, requests=requests, input_len=input_len,
        output_len=output_len, shared=shared, warmup=warmup, seed=sweep.fresh_seed() if seed is None else seed,
        slo_s=(slo_ttft / 1e3, slo_tpot / 1e3) if slo_ttft else None,
    )  # fmt: skip
    _sweep(plan, save)


def _sweep(plan: Plan, save: str) -> None:
    from . import record, report, sweep

    console = Console()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        bar = progress.add_task("", total=0)
        try:
            runs = sweep.run(plan, lambda label, total: progress.reset(bar, description=label, total=total),
                             lambda: progress.advance(bar))  # fmt: skip
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
    console.print(report.table([summary for summary, _ in runs], f"{plan.title} (seed {plan.seed})"))
    if save:
        from .plot import draw_load

        path = record.write(save, "load", [report.plain(summary) for summary, _ in runs], plan.parameters())
        draw_load(path.with_suffix(".png"), runs, plan.title)
        console.print(f"wrote results/{path.name} and its plot")


@app.command(epilog="Example: baton bench compare demo --threads 2 --concurrency 1,8,32 --rounds 3 --save compare")
def compare(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, GGUF file, or 'demo'.")] = "demo",
    threads: Threads = 2,
    concurrency: Annotated[str, typer.Option(help="Requests at once.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1, help="Times that every system runs.")] = 3,
    input_len: Annotated[int, typer.Option("--input", min=1, help="Tokens of each prompt.")] = 128,
    output_len: Annotated[int, typer.Option("--output", min=2, help="Tokens of each answer.")] = 128,
    systems: Annotated[str, typer.Option(help="Which: colocated, 1p1d, transformers.")] = "colocated,1p1d,transformers",
    save: Save = "",
) -> None:
    """Compare Baton colocated, Baton 1P1D and transformers in one run, with equal threads in total."""
    from . import compare as side_by_side
    from . import record, verdict
    from .machine import read_bandwidth, weight_bytes
    from .plot import draw_comparison
    from .sweep import fresh_seed
    from .systems import model_folder

    known = {name.split()[-1].lower(): name for name in side_by_side.SYSTEMS}
    wanted = [name.strip().lower() for name in systems.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise typer.BadParameter(f"no such system: {', '.join(unknown)}; known: {', '.join(known)}")
    folder = model_folder(model)
    plan = side_by_side.Plan(
        model=folder, threads=threads, rounds=rounds, widths=_numbers(concurrency, int), input_len=input_len,
        output_len=output_len, systems=tuple(known[name] for name in wanted), seed=fresh_seed(),
    )  # fmt: skip
    console = Console()
    load_before = _warn_if_busy(console)
    bandwidth, weights = read_bandwidth(threads), weight_bytes(folder)
    with console.status("") as status:
        results = asyncio.run(side_by_side.compare(plan, status.update))
    bandwidth = max(bandwidth, read_bandwidth(threads))  # a limit is not lowered by what else ran when it was measured
    console.print(verdict.table(results, bandwidth / weights))
    for bar, held in verdict.bars(results).items():
        console.print(f"{'reached' if held else 'MISSED'}: {bar}")
    if save:
        parameters = {
            "threads": threads, "rounds": rounds, "input": input_len, "output": output_len, "seed": plan.seed,
            "load_average_before": load_before,
        }  # fmt: skip
        path = record.write(save, "compare", verdict.document(results, bandwidth, weights), parameters)
        points = {
            name: {w: (m.tokens_per_s(w), statistics.median(m.pooled(w, "itl"))) for w in m.bursts}
            for name, m in results.items()
            if m.bursts
        }
        draw_comparison(path.with_suffix(".png"), points, bandwidth / weights, f"{Path(model).name}, {threads} threads")
        console.print(f"wrote results/{path.name} and its plot")


@app.command(epilog="Example: baton bench gateway demo --streams 64 --tokens 512 --save gateway")
def gateway(
    model: Annotated[str, typer.Argument(help="Model whose tokenizer is used.")] = "demo",
    streams: Annotated[int, typer.Option(min=1, help="Streams at once.")] = 64,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of each stream.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each measurement runs.")] = 5,
    save: Save = "",
) -> None:
    """Measure gateway and router by themselves, in front of a worker that emits tokens at once."""
    from . import record
    from .gateway import measure
    from .systems import model_folder

    console = Console()
    load_before = _warn_if_busy(console)
    with console.status("") as status:
        result = uvloop.run(measure(model_folder(model), streams, tokens, rounds, status.update))
    named = {f"streamed tokens/s at {streams} streams": result.tokens, "small requests/s": result.requests}
    for what, rate in named.items():
        console.print(f"{what}: {rate.per_s:.0f} ({rate.per_core:.0f} per core)")
    for paced in result.paced:
        times = ", ".join(f"{name} {getattr(paced.added, name) * 1e3:.2f} ms" for name in ("p50", "p90", "p99"))
        console.print(
            f"added latency at {paced.tokens.per_s:.0f} tokens/s: {times} ({paced.tokens.per_core:.0f} per core)"
        )
    if save:
        parameters = {"streams": streams, "tokens": tokens, "rounds": rounds, "load_average_before": load_before}
        path = record.write(save, "gateway", asdict(result), parameters)
        console.print(f"wrote results/{path.name}")


@app.command(epilog="Example: baton bench host --save host")
def host(
    steps: Annotated[int, typer.Option(min=1, help="Steps that are measured, for each line of the table.")] = 200,
    save: Save = "",
) -> None:
    """Measure what a worker's Python costs a step, on a device that computes nothing."""
    from . import record
    from .engine import host as measuring

    console = Console()
    load_before = _warn_if_busy(console)
    with console.status("") as status:
        found = uvloop.run(measuring.run(steps, status.update))  # as a worker's process does
    console.print(*measuring.tables(found))
    for bar, held in measuring.bars(found).items():
        console.print(f"{'reached' if held else 'MISSED'}: {bar}")
    if save:
        parameters = {"steps": steps, "prompt": measuring.PROMPT, "load_average_before": load_before}
        path = record.write(save, "host", measuring.document(found), parameters)
        console.print(f"wrote results/{path.name}")


@app.command(epilog="Example: baton bench kvtransfer --save kvtransfer")
def kvtransfer(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, GGUF file, or 'demo': for real workers.")] = "demo",
    parts: Annotated[str, typer.Option(help="Which: speed (and checksums), hiding, stall.")] = "speed,hiding,stall",
    tokens: Annotated[str, typer.Option(help="Speed: tokens that are handed over.")] = "1024,4096,32768",
    rounds: Annotated[str, typer.Option(help="Speed: rounds at each of these sizes.")] = "16,10,4",
    transports: Annotated[str, typer.Option(help="Speed: only these; empty: all that are here.")] = "",
    prompt: Annotated[int, typer.Option(min=1, help="Hiding: tokens of a prompt.")] = 4096,
    windows: Annotated[int, typer.Option(min=1, help="Stall: windows of each kind, 2.5 s long.")] = 20,
    save: Save = "",
) -> None:
    """Measure the handover: transports against their media, checksums, what hides, whether decoding stalls."""
    from ..common.config import TRANSPORTS
    from . import record
    from .kvtransfer import plots, suite
    from .kvtransfer.stall import Load
    from .systems import model_folder

    wanted = tuple(parts.split(","))
    if unknown := set(wanted) - set(suite.PARTS):
        raise typer.BadParameter(f"no such part: {', '.join(sorted(unknown))}; known: {', '.join(suite.PARTS)}")
    sizes, turns = _numbers(tokens, int), _numbers(rounds, int)
    if len(sizes) != len(turns):
        raise typer.BadParameter("--tokens and --rounds go together, one for one")
    plan = suite.Plan(
        model=model_folder(model), parts=wanted, sizes=tuple(zip(sizes, turns, strict=True)), prompt=prompt,
        transports=tuple(transports.split(",")) if transports else TRANSPORTS, load=Load(windows=windows),
    )  # fmt: skip
    console = Console()
    load_before = _warn_if_busy(console)
    with console.status("") as status:
        results = suite.run(plan, status.update)
    console.print(*suite.tables(results))
    for bar, held in suite.bars(results).items():
        console.print(f"{'reached' if held else 'MISSED'}: {bar}")
    if save:
        parameters = {"sizes": plan.sizes, "prompt": prompt, "windows": windows, "load_average_before": load_before}
        path = record.write(save, "kvtransfer", suite.document(results), parameters)
        plots.draw(path.parent, save, results)
        console.print(f"wrote results/{path.name} and its plots")


@app.command(epilog="Example: baton bench simulate --prefill 1 --decode 2 --rate 3 --requests 1000")
def simulate(
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(min=0, help="Decode workers.")] = 1,
    colocated: Annotated[int, typer.Option(min=0, help="Workers that do both.")] = 0,
    rate: Annotated[float, typer.Option(min=1e-6, help="Poisson arrivals a second.")] = 1.0,
    trace: Annotated[Path | None, typer.Option(help="Arrivals and lengths of a trace instead.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests; of a trace: the first so many.")] = 1000,
    input_len: Annotated[int, typer.Option("--input", min=1, help="Tokens of each prompt.")] = 128,
    output_len: Annotated[int, typer.Option("--output", min=1, help="Tokens of each answer.")] = 128,
    shrink: Annotated[int, typer.Option(min=1, help="Trace: divide all lengths by this.")] = 1,
    num_blocks: Annotated[int, typer.Option(min=1, help="KV blocks of each worker.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
) -> None:
    """Run the real router and engine loops in virtual time, under a constant cost model."""
    from . import report, workload
    from .simulate import Shape
    from .simulate import simulate as run
    from .trace import fit, read_trace

    words, shape = workload.Words(), Shape(prefill=prefill, decode=decode, colocated=colocated, num_blocks=num_blocks)
    if trace is not None:
        longest = min(shape.max_model_len, num_blocks * shape.block_size)
        rows = fit(read_trace(trace, seed), shrink=shrink, max_len=longest, limit=requests)
        jobs = workload.trace_jobs(rows, seed=seed, words=words)
    else:
        jobs = workload.poisson(
            workload.random_jobs(requests, input_len, output_len, seed=seed, words=words), rate, seed
        )
    title = f"{prefill} prefill, {decode} decode, {colocated} colocated, in virtual time"
    Console().print(report.table([report.summarise("simulated", run(jobs, shape).run)], title))


@app.command(epilog="Example: baton bench autoscale --save autoscale")
def autoscale(
    workers: Annotated[int, typer.Option(min=2, help="Workers in all.")] = 6,
    ttft: Annotated[float, typer.Option(min=1e-3, help="SLO on TTFT in seconds.")] = 3.0,
    tpot: Annotated[float, typer.Option(min=1e-3, help="SLO on TPOT in seconds.")] = 0.06,
    trace: Annotated[Path | None, typer.Option(help="A window of a trace instead of the load that flips.")] = None,
    begin: Annotated[float, typer.Option(min=0, help="Trace: where the window begins, in seconds.")] = 0.0,
    seconds: Annotated[float, typer.Option(min=1, help="Trace: how long it is.")] = 600.0,
    speed: Annotated[float, typer.Option(min=1e-3, help="Trace: replay this many times faster.")] = 1.0,
    shrink: Annotated[int, typer.Option(min=1, help="Trace: divide all lengths by this.")] = 1,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    save: Save = "",
) -> None:
    """Compare the planner of pool sizes with every fixed split, in virtual time, on a load that flips."""
    from ..deploy.control.planner import AutoscaleConfig
    from . import autoscale as planning
    from . import record
    from .simulate import Shape

    shape, config = Shape(max_running=256), AutoscaleConfig(enabled=True, ttft_s=ttft, tpot_s=tpot)
    window: dict[str, float | int] = {"begin_s": begin, "seconds": seconds, "speed": speed, "shrink": shrink}
    try:
        load = (
            planning.flip_load(seed=seed)
            if trace is None
            else planning.trace_load(
                trace,
                begin_s=begin,
                seconds=seconds,
                speed=speed,
                shrink=shrink,
                max_len=shape.max_model_len,
                seed=seed,
            )
        )
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    console = Console()
    with console.status("") as status:
        done = planning.compare(load, workers, config, shape, status.update)
    console.print(planning.table(done))
    if save:
        parameters = {
            "workers": workers, "seed": seed, "window": window if trace is not None else None, "shape": asdict(shape),
            "costs": asdict(planning.COSTS), "autoscale": asdict(config),
        }  # fmt: skip
        path = record.write(save, "autoscale", planning.document(done), parameters)
        planning.draw(path.with_suffix(".png"), done)
        console.print(f"wrote results/{path.name} and its plot")


@app.command(epilog="Example: baton bench memory --threads 2 --model models/demo")
def memory(
    threads: Threads = 2,
    model: Annotated[Path | None, typer.Option(help="Model folder: state the limit on tokens/s as well.")] = None,
) -> None:
    """Read bandwidth of this machine's memory, and what it allows: tokens/s of one sequence."""
    from .machine import read_bandwidth, weight_bytes

    bandwidth = read_bandwidth(threads)
    typer.echo(f"read bandwidth, {threads} threads: {bandwidth / 1e9:.1f} GB/s")
    if model is not None:
        size = weight_bytes(model)
        typer.echo(
            f"weights {size / 1e6:.0f} MB, each read once a step: at most {bandwidth / size:.1f} tokens/s at batch 1"
        )


def _warn_if_busy(console: Console) -> float:
    """The load average, and a word where it will be in the results."""
    from .machine import busy

    load = busy()
    if load > 0.5:
        console.print(f"[yellow]this machine is busy (load average {load:.1f}): expect noise[/yellow]")
    return load


def _numbers(text: str, kind: type[N]) -> tuple[N, ...]:
    try:
        numbers = tuple(kind(part) for part in text.split(",") if part)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers") from error
    if any(number <= 0 for number in numbers):
        raise typer.BadParameter(f"{text!r}: numbers above 0 are wanted")
    return numbers


REST = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Of commands whose options belong to the module that they start, which must run without this one's packages too."""


@app.command(context_settings=REST, add_help_option=False)
def kernels(context: typer.Context) -> None:
    """Each GPU kernel against its roofline, right first; --interpret proves the code without a GPU."""
    from .kernels.__main__ import main

    raise typer.Exit(main(context.args))


@app.command(context_settings=REST, add_help_option=False)
def engine(context: typer.Context) -> None:
    """The engine on a GPU against what the device can do: decode, prefill, throughput, idle shares."""
    from .engine.__main__ import main

    raise typer.Exit(main(context.args))


@app.command(context_settings=REST, add_help_option=False)
def pair(context: typer.Context) -> None:
    """Two worker processes on one GPU, 1P1D, against one that does both, at the same load."""
    from .engine.pair import main

    raise typer.Exit(main(context.args))


@app.command(context_settings=REST, add_help_option=False)
def loading(context: typer.Context) -> None:
    """How long a checkpoint of 16 GB takes to load, against reading the same files; --device cuda for a GPU."""
    from .engine.loading import main

    raise typer.Exit(main(context.args))
