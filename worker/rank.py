"""Entry of a rank that is not rank 0: `python -m baton.worker.rank`, started by its worker (`ranks.py`).

It loads its shard and then does what rank 0 says, one command after the other (`engine/follower.py`).
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from ..common import log
from ..common.child import EXIT_FAILED, die_with, read_line, show_as
from ..common.errors import BatonError, WorkerLost
from ..common.json_form import from_json
from ..engine.batch import Batch
from ..engine.follower import MEET, PROGRESS, READY, Follower
from ..engine.group import RankGroup
from ..engine.rank import Rank, load_rank, resolve
from ..engine.runner import RUN
from .compute import PoolMemory, following_plane
from .rank_plane import reached_by_grpc
from .ranks import RankConfig
from .spread import commands, reports

logger = logging.getLogger("baton")


def main() -> int:
    """Read the configuration, be that rank, and return the process's exit code."""
    config = from_json(read_line(), RankConfig)
    name = f"{config.worker.name}/{config.rank}"
    show_as(name)
    log.setup(name)
    die_with(config.parent)
    try:
        follow(config)
    except WorkerLost:
        logger.info("rank 0 is gone")
    except BatonError as error:
        logger.error("%s", error.message)
    except Exception:  # the edge of the process: whatever ended it belongs into its log
        logger.exception("ended by an unexpected error")
    return EXIT_FAILED


def follow(config: RankConfig) -> None:
    """Be this rank until rank 0 hangs up, which raises `WorkerLost`."""
    follower = Follower(config.address, config.token, config.rank, config.timeout_s)
    follower.expect(MEET)
    engine = config.worker.engine
    device, _ = resolve(engine, config.rank)
    group = RankGroup(config.meeting, config.rank, engine.tp, device, config.timeout_s)
    memory = PoolMemory()
    rank = load_rank(engine, lambda share: follower.report(PROGRESS, share), memory.allocator, group)
    gc.freeze()  # as rank 0 does: all ranks wait for the one whose garbage is collected
    make_plane = partial(following_plane, config, rank.pool, memory, reports(follower))
    with reached_by_grpc(config.worker.host, config.worker.cluster_token, make_plane) as plane:
        follower.report(READY, dict(plane.door))
        follower.follow({RUN: runs(rank, plane.outlet.layer), **commands(plane)})


def runs(rank: Rank, on_layer: Callable[[int], None]) -> Callable[..., None]:
    """The handler of a step. `on_layer` is called as `plan.OnLayer` says, with this rank's pool."""

    def run(*batch: Any) -> None:
        rank.forward(Batch.unpack(*batch), on_layer=on_layer)

    return run


if __name__ == "__main__":
    sys.exit(main())
