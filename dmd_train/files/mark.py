"""The mark of a file of tensors: a hash by which a flipped bit is found when they are read."""

import hashlib

import torch
from torch import Tensor

MARK_KEY = "dmd.sha256"
"""The safetensors metadata key of the mark. It is of one file: what is read does not pass it on."""


def mark_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256, hexadecimal, over names, dtypes, shapes and bytes of tensors on the CPU.

    With the SHA instructions of a processor nearly three times as fast as BLAKE2b.
    """
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
