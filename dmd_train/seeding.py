"""Randomness as a pure function of (seed, step, rank, purpose), never of history.

A resumed run therefore draws exactly what the uninterrupted run would have drawn.
"""

import hashlib

import torch


def generator(device: torch.device, seed: int, *stream: int | str) -> torch.Generator:
    """A fresh generator for one draw; `stream` names it, e.g. (step, rank, "student noise")."""
    name = repr((seed, *stream)).encode()
    digest = hashlib.blake2b(name, digest_size=8).digest()
    # manual_seed takes a signed 64-bit number
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def randn(shape: torch.Size | tuple[int, ...], gen: torch.Generator) -> torch.Tensor:
    """Standard normal noise of `shape` on the generator's own device."""
    return torch.randn(shape, generator=gen, device=gen.device)
