"""One run over the processes of `accelerate launch`; a run of one process is the usual case.

Each process has whole networks and its part of the batch; or, with FSDP, its part of both.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UserError


class Processes:
    """This process among those of its run.

    rank, count: 0 and 1 where nobody launched several. device: where this one computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.count, self.device = 0, 1, device
        if dist.is_torchelastic_launched():
            from accelerate import PartialState

            state = PartialState(cpu=device.type == "cpu")
            self.rank, self.count, self.device = (
                state.process_index,
                state.num_processes,
                state.device,
            )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def part(self, whole: Tensor) -> Tensor:
        """This process's share of a batch: every count-th, so that shares are alike."""
        if len(whole) % self.count:
            raise UserError(
                f"a batch of {len(whole)} cannot be shared by {self.count} processes. "
                "Set batch_size and pair_batch_size to multiples of their number."
            )
        return whole[self.rank :: self.count]

    @property
    def is_sharded(self) -> bool:
        """Whether networks are spread over the processes: `accelerate launch --use_fsdp`."""
        return self.count > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"

    def shard(self, module: nn.Module) -> None:
        """Spread its parameters, where that is asked for: they become DTensors, block by block."""
        if not self.is_sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard  # torch 2.6

        mesh = init_device_mesh(self.device.type, (self.count,))
        for child in module.children():
            for block in child if isinstance(child, nn.ModuleList) else ():
                fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Gradients become their mean over processes, in place: that of the whole batch."""
        if self.count == 1 or self.is_sharded:  # a sharded backward averages itself
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        pending = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
        for work, gradient in zip(pending, gradients, strict=True):
            assert work is not None
            work.wait()
            gradient.div_(self.count)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of each value over processes."""
        if self.count > 1:
            dist.all_reduce(values)
            values = values / self.count
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process says so. All must ask."""
        if self.count == 1:
            return flag
        told = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(told)
        return bool(told)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


def is_spread(value: Tensor) -> bool:
    """Whether each process has a part of it alone."""
    return hasattr(value, "full_tensor")  # of DTensors alone, which old versions of torch lack


def whole(value: Any) -> Tensor:
    """A tensor as it is, or put together again from all processes; all must ask."""
    together: Tensor = value.full_tensor() if is_spread(value) else value
    return together


def as_spread(value: Tensor, like: Any) -> Tensor:
    """A whole tensor, spread over the processes as `like` is."""
    if not is_spread(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
