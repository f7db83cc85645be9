"""What the samples are conditioned on. A row is a number: a class, or a prompt of a list."""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..files.shards import Shards
from ..method.network import Condition

if TYPE_CHECKING:
    from ..networks.text import TextEncoder


class Conditions(Protocol):
    """A source of conditions for the student and the critic."""

    def rows(self, size: int, gen: torch.Generator) -> Tensor:
        """`size` random rows, (size,) int64 on the CPU; `gen` is the CPU's."""

    def balanced(self, size: int) -> Tensor:
        """`size` rows in order, round robin: for sheets and for measuring."""

    def take(self, rows: Tensor, device: torch.device) -> Condition:
        """The conditions of these rows, on `device`."""


class Classes:
    """Class labels 0..count-1, uniform (DMD2 section C)."""

    def __init__(self, count: int) -> None:
        self.count = count

    def rows(self, size: int, gen: torch.Generator) -> Tensor:
        return torch.randint(self.count, (size,), generator=gen)

    def balanced(self, size: int) -> Tensor:
        return torch.arange(size) % self.count

    def take(self, rows: Tensor, device: torch.device) -> Condition:
        return {"label": rows.to(device)}


class Prompts(Classes):
    """Prompts of a list, uniform: encoded before, on disk, or live."""

    def __init__(self, prompts: list[str], encoded: "Shards | TextEncoder") -> None:
        super().__init__(len(prompts))
        self.prompts, self.encoded = prompts, encoded

    def take(self, rows: Tensor, device: torch.device) -> Condition:
        if isinstance(self.encoded, Shards):
            text = self.encoded.take(rows)
        else:
            text = self.encoded.encode([self.prompts[row] for row in rows.tolist()])
        return {key: value.float().to(device) for key, value in text.items()}
