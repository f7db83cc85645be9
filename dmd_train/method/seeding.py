"""Randomness as a pure function of (seed, step, purpose), never of history.

A resumed run therefore draws exactly what the uninterrupted run would have drawn. What is drawn
is the whole batch of an update: neither the number of processes nor micro-batches change it.
"""

import hashlib

import torch


def stream_seed(seed: int, *stream: int | str) -> int:
    """A number of 63 bits for one draw; `stream` names it, e.g. (step, "student")."""
    name = repr((seed, *stream)).encode()
    digest = hashlib.blake2b(name, digest_size=8).digest()
    # manual_seed takes a signed 64-bit number
    return int.from_bytes(digest, "little") >> 1


def generator(device: torch.device, seed: int, *stream: int | str) -> torch.Generator:
    """A fresh generator for one draw."""
    return torch.Generator(device).manual_seed(stream_seed(seed, *stream))


def randn(shape: torch.Size | tuple[int, ...], gen: torch.Generator) -> torch.Tensor:
    """Standard normal noise of `shape` on the generator's own device."""
    return torch.randn(shape, generator=gen, device=gen.device)
