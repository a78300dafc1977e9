"""Whole workers on loopback, with the toy model: every message and every KV byte goes over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest

from baton.common.errors import BatonError, StaleEpoch
from baton.common.messages import Cancel, Endpoint, Failed, Hello, Ping, Reserve, Reserved, StepReport, Submit
from baton.common.types import FinishReason, Request, Role, WorkerInfo, WorkerRef
from baton.protos.rpc import Peer
from baton.worker.assembly import Worker
from tests.house import House, hold
from tests.toy import LAYERS, ToyEngine, endpoint, oracle, request

DEADLINE_S = 10.0


class Client:
    """A router of a few lines: one session, and what came of each ticket."""

    def __init__(self, worker: Worker, name: str = "router") -> None:
        self._peer = Peer(worker.ref.address, "secret")
        self.stream = self._peer.session()
        self._name = name
        self.reports: list[StepReport] = []
        self.info: WorkerInfo | None = None
        self._changed = asyncio.Event()

    async def open(self, epoch: int = 0) -> None:
        await self.stream.write(Hello(self._name, 7, epoch))
        self.info = await asyncio.wait_for(self.stream.read(), DEADLINE_S)  # type: ignore[assignment]
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._ping())]
        await self.until(lambda: any(r.kv for r in self.reports))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.stream.cancel()
        await self._peer.close()

    async def _read(self) -> None:
        with contextlib.suppress(BatonError):
            while (message := await self.stream.read()) is not None:
                self.reports.append(message)  # type: ignore[arg-type]
                self._changed.set()

    async def _ping(self) -> None:
        with contextlib.suppress(BatonError):
            while True:
                await self.stream.write(Ping())
                await asyncio.sleep(0.2)

    async def until(self, condition: object) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # type: ignore[operator]
                self._changed.clear()
                await self._changed.wait()

    def tokens(self, ticket: int) -> list[int]:
        return [t.token for r in self.reports for t in r.tokens if t.ticket == ticket]

    def positions(self, ticket: int) -> list[int]:
        return [t.position for r in self.reports for t in r.tokens if t.ticket == ticket]

    def finish(self, ticket: int) -> FinishReason | None:
        return next((f.reason for r in self.reports for f in r.finished if f.ticket == ticket), None)

    def failure(self, ticket: int) -> Failed | None:
        return next((f for r in self.reports for f in r.failed if f.ticket == ticket), None)


async def connect(worker: Worker) -> Client:
    client = Client(worker)
    await client.open()
    return client


async def submit(client: Client, ticket: int, what: Request, decode: WorkerRef | None = None) -> None:
    await client.stream.write(Submit(ticket, 1, what, decode))


PROMPT = list(range(10, 33))


async def test_colocated(house: House) -> None:
    worker = await house.worker("colocated-0", Role.COLOCATED)
    client = await connect(worker)
    await submit(client, 1, request("a", PROMPT, 20))
    await client.until(lambda: client.finish(1))
    assert client.tokens(1) == oracle(PROMPT, 20)
    assert client.positions(1) == list(range(23, 43))
    assert client.finish(1) is FinishReason.LENGTH
    await house.balanced()


async def test_handover(house: House) -> None:
    prefill = await house.worker("prefill-0", Role.PREFILL)
    decode = await house.worker("decode-0", Role.DECODE)
    up, down = await connect(prefill), await connect(decode)
    await submit(up, 1, request("a", PROMPT, 20), decode.ref)
    await down.until(lambda: down.finish(1))
    assert up.tokens(1) == []
    assert down.tokens(1) == oracle(PROMPT, 20)
    await up.until(lambda: any(r.handed_over for r in up.reports))
    # Again: what decode still caches does not travel.
    await submit(up, 2, request("b", PROMPT, 20), decode.ref)
    await down.until(lambda: down.finish(2))
    assert down.tokens(2) == oracle(PROMPT, 20)
    await up.until(lambda: sum(len(r.handed_over) for r in up.reports) == 2)
    load = prefill.loop.load()
    assert load.handovers == 2 and load.handover_skipped_blocks == len(PROMPT) // 4
    await house.balanced()


async def test_first_token_ends_it(house: House) -> None:
    prefill = await house.worker("prefill-0", Role.PREFILL)
    decode = await house.worker("decode-0", Role.DECODE)
    up, _ = await connect(prefill), await connect(decode)
    await submit(up, 1, request("a", PROMPT, 1), decode.ref)
    await up.until(lambda: up.finish(1))
    assert up.tokens(1) == oracle(PROMPT, 1)
    await house.balanced()


async def test_stop_token_and_min_tokens(house: House) -> None:
    worker = await house.worker("colocated-0", Role.COLOCATED)
    client = await connect(worker)
    expected = oracle(PROMPT, 20)
    await submit(client, 1, request("a", PROMPT, 20, stop_token_ids=(expected[6],)))
    await submit(client, 2, request("b", PROMPT, 20, stop_token_ids=(expected[6],), min_tokens=10))
    await client.until(lambda: client.finish(1) and client.finish(2))
    assert client.tokens(1) == expected[:7] and client.finish(1) is FinishReason.STOP
    assert client.tokens(2) == expected and client.finish(2) is FinishReason.LENGTH


async def test_resumed_elsewhere_goes_on_where_it_was(house: House) -> None:
    worker = await house.worker("colocated-0", Role.COLOCATED)
    client = await connect(worker)
    expected = oracle(PROMPT, 20)
    await submit(client, 1, request("a", PROMPT + expected[:7], 20, prompt_len=len(PROMPT)))
    await client.until(lambda: client.finish(1))
    assert client.tokens(1) == expected[7:]
    assert client.positions(1)[0] == len(PROMPT) + 7


async def test_cancel_frees_both_sides(house: House) -> None:
    prefill = await house.worker("prefill-0", Role.PREFILL)
    decode = await house.worker("decode-0", Role.DECODE)
    up, down = await connect(prefill), await connect(decode)
    for ticket in range(20):
        await submit(up, ticket, request(str(ticket), [ticket, *PROMPT], 150), decode.ref)
    await down.until(lambda: len({t.ticket for r in down.reports for t in r.tokens}) > 3)
    for ticket in range(20):
        for client in (up, down):
            await client.stream.write(Cancel(ticket))
    await house.balanced()


async def test_short_prompts_wait_at_prefill_and_are_not_refused(house: House) -> None:
    """Many fit the tokens that are looked ahead; opened all at once, most would be refused and wait out a back-off."""
    prefill = await house.worker("prefill-0", Role.PREFILL, max_sending=3)
    decode = await house.worker("decode-0", Role.DECODE, max_sending=3)
    up, down = await connect(prefill), await connect(decode)
    for ticket in range(24):
        await submit(up, ticket, request(str(ticket), [ticket, 1], 5), decode.ref)
    await down.until(lambda: all(down.finish(t) or up.failure(t) for t in range(24)))
    assert [up.failure(t) for t in range(24)] == [None] * 24
    await house.balanced()


async def test_a_worker_that_falls_idle_by_a_cancel_tells_so(house: House) -> None:
    """Nothing is said to the router of a cancelled request; the next heartbeat must still know of the freed blocks, or
    the router waits for room that is there."""
    engine = ToyEngine()
    engine.runner.before = lambda plan: time.sleep(0.005)
    client = await connect(await house.worker("colocated-0", Role.COLOCATED, engine))
    await submit(client, 1, request("a", PROMPT, 170))
    await client.until(lambda: client.tokens(1))
    await client.stream.write(Cancel(1))

    def idle() -> bool:
        load = client.reports[-1].load
        return load is not None and load.running == 0 and load.free_blocks + load.cached_blocks == load.total_blocks

    await client.until(idle)
    assert client.finish(1) is None


async def test_a_source_that_calls_again_has_lost_what_it_began_before(house: House) -> None:
    """It noticed the broken stream before its target did: the old reservation must not live on for its lease."""
    decode = await house.worker("decode-0", Role.DECODE, lease_s=60.0)
    await connect(decode)
    source, what = endpoint("prefill-0", epoch=7), request("a", PROMPT, 20)
    peer = Peer(decode.ref.address, "secret")
    old, new = peer.control(), peer.control()
    await old.write(source)
    await old.read()
    await old.write(Reserve(1, 1, 1, "router@7", what, decode.ref))
    assert await asyncio.wait_for(old.read(), DEADLINE_S) == Reserved(1, 0, "tcp")
    await new.write(source)
    hello = await asyncio.wait_for(new.read(), DEADLINE_S)
    assert isinstance(hello, Endpoint) and hello.ref == decode.ref
    await house.balanced()
    await peer.close()


async def test_router_gone_frees_both_sides(house: House) -> None:
    prefill = await house.worker("prefill-0", Role.PREFILL)
    decode = await house.worker("decode-0", Role.DECODE)
    up, down = await connect(prefill), await connect(decode)
    for ticket in range(8):
        await submit(up, ticket, request(str(ticket), [ticket, *PROMPT], 150), decode.ref)
    await down.until(lambda: any(r.tokens for r in down.reports))
    await up.close()
    await down.close()
    await house.balanced()


async def test_pool_full_is_refused_at_once(house: House) -> None:
    prefill = await house.worker("prefill-0", Role.PREFILL)
    decode = await house.worker("decode-0", Role.DECODE, ToyEngine(num_blocks=4))
    up, _ = await connect(prefill), await connect(decode)
    await submit(up, 1, request("a", PROMPT, 20), decode.ref)
    await up.until(lambda: up.failure(1))
    assert up.failure(1).code == "pool_full"  # type: ignore[union-attr]
    await house.balanced()


@pytest.mark.parametrize(("what", "code"), [("fingerprint", "fingerprint_mismatch"), ("epoch", "handover_failed")])
async def test_strangers_are_refused(house: House, what: str, code: str) -> None:
    prefill = await house.worker("prefill-0", Role.PREFILL)
    other = ToyEngine(fingerprint="other") if what == "fingerprint" else ToyEngine()
    decode = await house.worker("decode-0", Role.DECODE, other)
    up, _ = await connect(prefill), await connect(decode)
    meant = decode.ref if what == "fingerprint" else WorkerRef(decode.ref.name, decode.ref.address, 1)
    await submit(up, 1, request("a", PROMPT, 20), meant)
    await up.until(lambda: up.failure(1))
    assert up.failure(1).code == code  # type: ignore[union-attr]
    await house.balanced()


async def test_wrong_epoch_in_hello(house: House) -> None:
    worker = await house.worker("decode-0", Role.DECODE)
    client = Client(worker)
    await client.stream.write(Hello("router", 7, 12345))
    with pytest.raises(StaleEpoch):
        await asyncio.wait_for(client.stream.read(), DEADLINE_S)
    client.stream.cancel()


async def test_dead_target_is_told(house: House) -> None:
    prefill = await house.worker("prefill-0", Role.PREFILL)
    up = await connect(prefill)
    await submit(up, 1, request("a", PROMPT, 20), WorkerRef("decode-9", "127.0.0.1:9", 5))
    await up.until(lambda: up.failure(1))
    assert up.failure(1).code == "handover_failed"  # type: ignore[union-attr]
    await house.balanced()


async def test_preempted_in_mid_decode(house: House) -> None:
    prefill = await house.worker("prefill-0", Role.PREFILL)
    decode = await house.worker("decode-0", Role.DECODE, ToyEngine(num_blocks=40))
    hold(decode, decoding := threading.Event())
    up, down = await connect(prefill), await connect(decode)
    prompts = {t: [t, *PROMPT] for t in range(4)}
    for ticket, prompt in prompts.items():
        await submit(up, ticket, request(str(ticket), prompt, 100), decode.ref)
    await down.until(lambda: sum(len(down.tokens(t)) for t in prompts) >= 2)  # in the end two want 62 blocks
    decoding.set()
    await down.until(lambda: all(down.finish(t) for t in prompts))
    for ticket, prompt in prompts.items():
        assert down.tokens(ticket) == oracle(prompt, 100)
    assert (await decode.check()).preemptions > 0
    await house.balanced()


@pytest.mark.parametrize("ignored", [False, True])
async def test_eos_ends(house: House, ignored: bool) -> None:
    expected = oracle(PROMPT, 20)
    prefill = await house.worker("prefill-0", Role.PREFILL)
    decode = await house.worker("decode-0", Role.DECODE, ToyEngine(eos_ids=frozenset({expected[6]})))
    up, down = await connect(prefill), await connect(decode)
    await submit(up, 1, request("a", PROMPT, 20, ignore_eos=ignored), decode.ref)
    await down.until(lambda: down.finish(1))
    assert down.tokens(1) == expected[: 20 if ignored else 7]
    assert down.finish(1) is (FinishReason.LENGTH if ignored else FinishReason.STOP)


async def test_layers_leave_in_order(house: House) -> None:
    prefill = await house.worker("prefill-0", Role.PREFILL)
    decode = await house.worker("decode-0", Role.DECODE)
    up, down = await connect(prefill), await connect(decode)
    await submit(up, 1, request("a", PROMPT, 20), decode.ref)
    await down.until(lambda: down.finish(1))
    (left,) = prefill.plane.outlet.trace.left_at.values()
    assert list(left) == list(range(LAYERS)) and sorted(left.values()) == list(left.values())
