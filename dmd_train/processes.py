"""One run over the processes of `accelerate launch`; a run of one process is the usual case."""

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from .errors import UserError


class Processes:
    """This process among those of its run.

    rank, count: 0 and 1 where nobody launched several. device: where this one computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.count, self.device = 0, 1, device
        if dist.is_torchelastic_launched():
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

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """In place, the mean over processes: the gradient of the whole batch."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        pending = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
        for work, gradient in zip(pending, gradients, strict=True):
            assert work is not None
            work.wait()
            gradient.div_(self.count)

    def mean(self, values: Tensor) -> Tensor:
        """Over processes."""
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
