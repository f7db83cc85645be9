"""Pickles: with code in them, endless, huge, or of other things than weights."""

import os
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import torch
from kit.command_attempt import Attempt
from kit.hostile.values import CONTROL
from kit.hostile.weights import DTYPES, Weights, damage, given
from kit.outcome import PROOF


class Bomb:
    """A pickle that leaves a proof when its code is run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {PROOF}",))


class Touch:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(PROOF),))


def any_pickle(tensors: Weights, random: Random, folder: Path) -> Attempt:
    """Pickles of every kind."""
    name = random.choice(["model.bin", "model.pt", "model.pth", "model.ckpt", "m.safetensors"])
    path = folder / name
    old = {"_use_new_zipfile_serialization": random.random() < 0.5}
    endless: list[Any] = []
    for _ in range(40):
        endless = [endless, endless]
    huge = torch.zeros(1).expand(10**11)
    inner: Any = random.choice(
        [
            Bomb(),
            {"a": Bomb()},
            {"state_dict": tensors, "x": Touch()},
            {"state_dict": damage(random, tensors)},
            {"state_dict": tensors},
            {"state_dict": {"state_dict": tensors}},
            {"param_groups": [], "state": {}},
            {CONTROL: 1},
            {1: torch.zeros(2)},
            {"a": {"b": torch.zeros(2)}},
            {b"a": torch.zeros(2)},
            {"x" * 1_000_000: 5},
            {},
            [],
            None,
            5,
            torch.zeros(2),
            endless,
            {"a": endless},
            {"model.map_label.weight": huge, "model.map_layer0.weight": huge},
            {key: torch.zeros(1).expand(10**10, 7) for key in tensors},
            {key: torch.empty(10**9, 10**3, device="meta") for key in tensors},
            {key: torch.sparse_coo_tensor(size=(10**6, 10**6)) for key in tensors},
            {"a": torch.zeros(2, requires_grad=True), "b": torch.nn.Parameter(torch.ones(2))},
            {key: value.to(random.choice(DTYPES)) for key, value in tensors.items()},
            torch.nn.Linear(2, 2),
        ]
    )
    way = random.randrange(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way == 0:
            try:
                path.write_bytes(pickle.dumps(inner, protocol=random.randrange(2, 6)))
            except Exception:
                path.write_bytes(pickle.dumps(Bomb()))
        elif way == 1:
            raw_pickle(random, path)
        else:
            torch.save(inner, path, **old)
            if way == 2:
                data = bytearray(path.read_bytes())
                for _ in range(random.randrange(1, 10)):
                    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
                path.write_bytes(data if random.random() < 0.7 else data[: len(data) // 2])
    return given(random, folder, name, [])


def raw_pickle(random: Random, path: Path) -> None:
    """Written by hand: no pickler makes these."""
    code = random.choice(
        [
            b"\x80\x02cos\nsystem\nX\x0e\x00\x00\x00touch executed\x85R.",
            b"\x80\x02c__builtin__\neval\nX\x02\x00\x00\x00()\x85R.",
            b"\x80\x02cbuiltins\nbytearray\nI100000000000\n\x85R.",
            b"\x80\x04\x95" + b"\xff" * 8,
            b"\x80\x02" + b"(" * 1_000_000,
            b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
            b"\x80\x02X\xff\xff\xff\x7f",
            b"\x80\x02I" + b"9" * 100_000 + b"\n.",
            b"\x80\x63.",
            b"\x80\x02.",
            b"\x80",
            b"PK",
            b"PK\x03\x04" + b"\0" * 100,
        ]
    )
    if random.random() < 0.5:
        with zipfile.ZipFile(path, "w", random.choice([0, 8])) as file:
            file.writestr("archive/version", "3\n")
            if random.random() < 0.3:
                code = b"\x80\x02X" + struct.pack("<I", 2**31 - 8) + b" " * 300_000_000
            file.writestr("archive/data.pkl", code)
            file.writestr("archive/../../../there/thesis.txt", "x")
    else:
        path.write_bytes(code)
