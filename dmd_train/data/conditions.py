"""What the samples are conditioned on. A row is a number: a class, or a prompt of a list."""

import hashlib
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from ..files.shards import Shards
from ..method.network import Condition


def name_of(texts: list[str]) -> str:
    """SHA-256 of the texts, hexadecimal: what is made from conditions is known by it."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


class Conditions(ABC):
    """Numbered conditions, each as likely as any other. name: see `name_of`."""

    def __init__(self, count: int, name: str) -> None:
        self.count, self.name = count, name

    def rows(self, size: int, gen: torch.Generator) -> Tensor:
        """`size` random rows, (size,) int64 on the CPU; `gen` is the CPU's."""
        return torch.randint(self.count, (size,), generator=gen)

    def balanced(self, size: int) -> Tensor:
        """`size` rows in order, round robin: for sheets and for measuring."""
        return torch.arange(size) % self.count

    @abstractmethod
    def take(self, rows: Tensor, device: torch.device) -> Condition:
        """The conditions of these rows, on `device`."""


class Classes(Conditions):
    """Class labels 0..count-1 (DMD2 section C)."""

    def __init__(self, count: int) -> None:
        super().__init__(count, name_of([]))

    def take(self, rows: Tensor, device: torch.device) -> Condition:
        return {"label": rows.to(device)}


class Encoder(Protocol):
    """A text encoder."""

    def encode(self, prompts: list[str]) -> Condition:
        """The conditions of these prompts, one batch."""


class Prompts(Conditions):
    """Prompts of a list: encoded before, on disk, or live."""

    def __init__(self, prompts: list[str], encoded: Shards | Encoder) -> None:
        super().__init__(len(prompts), name_of(prompts))
        self.prompts, self.encoded = prompts, encoded

    def take(self, rows: Tensor, device: torch.device) -> Condition:
        if isinstance(self.encoded, Shards):
            text = self.encoded.take(rows)
        else:
            text = self.encoded.encode([self.prompts[row] for row in rows.tolist()])
        return {key: value.float().to(device) for key, value in text.items()}
