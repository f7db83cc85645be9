"""What the samples are conditioned on: a batch is a pure function of the generator it is given."""

from typing import Protocol

import torch

from .network import Condition


class Conditions(Protocol):
    """A source of conditions for the student and the critic."""

    def batch(self, size: int, gen: torch.Generator) -> Condition:
        """`size` random conditions on the generator's device."""

    def balanced(self, size: int, device: torch.device) -> Condition:
        """`size` conditions in order, round robin: for sheets and for measuring."""


class Classes:
    """Class labels 0..count-1, uniform (DMD2 section C)."""

    def __init__(self, count: int) -> None:
        self.count = count

    def batch(self, size: int, gen: torch.Generator) -> Condition:
        return {"label": torch.randint(self.count, (size,), generator=gen, device=gen.device)}

    def balanced(self, size: int, device: torch.device) -> Condition:
        return {"label": torch.arange(size, device=device) % self.count}
