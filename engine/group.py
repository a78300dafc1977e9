"""The ranks of one worker as a group that adds up and gathers tensors: NCCL between GPUs, gloo between CPUs.

There is no global world (`init_process_group`): a group is made and dropped with its worker. The ranks find each other
in a file, in a folder that only their user can enter; torch's TCP store would answer anybody.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from .follower import GROUP_TIMEOUT_S

_c10d: Any = torch.distributed
"""Any: torch's type stubs do not know what its single backends can do."""


class RankGroup:
    """One rank's membership. Every rank must make the same calls in the same order.

    All methods raise `RuntimeError`, as torch does, where a rank is gone (at once) or stays away for longer than the
    timeout. Then the group is broken for good. With NCCL a sum is only queued on the device: torch's watchdog ends the
    process instead.
    """

    def __init__(
        self, meeting: str, rank: int, size: int, device: torch.device, timeout_s: float = GROUP_TIMEOUT_S
    ) -> None:
        """Returns when all ranks are here. `meeting`: path of a file that need not exist."""
        self.rank = rank
        self.size = size
        kind = _c10d.ProcessGroupNCCL if device.type == "cuda" else _c10d.ProcessGroupGloo
        options = kind.Options() if device.type == "cuda" else kind._Options()
        options._timeout = timedelta(seconds=timeout_s)
        if device.type == "cpu":  # by itself gloo asks the name service for an address of this machine
            options._devices = [kind.create_device(hostname="127.0.0.1")]
        self._group = kind(_c10d.FileStore(meeting, size), rank, size, options)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` on every rank by the sum over all, and return it."""
        self._group.allreduce([tensor]).wait()
        return tensor

    def least(self, number: int, device: torch.device) -> int:
        """The least of all ranks' numbers."""
        numbers = torch.zeros(self.size, dtype=torch.int64, device=device)
        numbers[self.rank] = number
        return int(self.sum(numbers).min())

    def gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        """All ranks' parts, of one shape, in rank order, on rank 0; nothing on the others."""
        options = _c10d.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else []
        self._group.gather([parts] if parts else [], [part], options).wait()
        return parts

    def sum_in_order(self, tensor: torch.Tensor) -> torch.Tensor:
        """`sum`, added up in the order of the ranks. Where more than two add up, `sum` has another order for each part
        of a tensor, so that a row's bits depend on its place. Costs size / 2 times the traffic."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._group.allgather([parts], [tensor]).wait()
        for part in parts[1:]:
            parts[0].add_(part)
        return tensor.copy_(parts[0])
