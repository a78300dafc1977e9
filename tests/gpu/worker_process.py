"""A worker as a process of its own, without a controller: `python -m tests.gpu.worker_process`.

It reads its configuration from its first line of input and says where it is, [address, epoch]; each further line it
answers by the transports that it has sent by. It ends where its input does.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading

from baton.common.child import read_line
from baton.common.clock import RealClock
from baton.common.config import WorkerConfig
from baton.common.json_form import from_json
from baton.worker.assembly import Worker
from baton.worker.compute import build


async def main() -> None:
    config = from_json(read_line(), WorkerConfig)
    worker = Worker(config, build(config, lambda _: None), RealClock())
    await worker.start()
    threading.Thread(target=worker.loop.run, args=(threading.Event(),), daemon=True).start()
    say([worker.ref.address, worker.ref.epoch])
    while await asyncio.to_thread(sys.stdin.readline):
        say(sorted({transport for _, _, transport in worker.plane.outlet._lanes}))
    await worker.stop()


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
