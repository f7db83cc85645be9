"""Files of weights: damaged bytes, headers that lie, tensors and metadata of wrong kinds."""

import json
import struct
from pathlib import Path
from random import Random

import torch
from kit.command_attempt import Attempt
from kit.hostile.settings import RUN, write_settings
from kit.hostile.values import CONTROL, strange
from safetensors.torch import save, save_file
from torch import Tensor

from dmd_train.method.recipe import Recipe

Weights = dict[str, Tensor]

DTYPES = (
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.int64,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.float8_e4m3fn,
)
NAMES = (
    CONTROL,
    "",
    ".",
    "a" * 100_000,
    "down_blocks.99999999999999999999.resnets.0.conv1.weight",
    "down_blocks.x.resnets.0.conv1.weight",
    "model.diffusion_model.input_blocks.99999999.0.weight",
    "model.diffusion_model.output_blocks.x",
    "model.enc.x",
    "model.enc.99999999999x99999999999_block0.conv0.weight",
    "model.enc.xx",
    "lora_unet_.lora_down.weight",
    "lora_unet_x.lora_up.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.x",
    "first_stage_model.decoder.up.9.x",
    "conditioner.embedders.0.x",
    "ztsnr",
    "v_pred",
    "edm_mean",
)


def given(random: Random, folder: Path, name: str, extra: list[str]) -> Attempt:
    """A command that reads this file."""
    if not extra and random.random() < 0.3:
        write_settings(folder, RUN | {"teacher": name, "steps": 1})
        return Attempt([random.choice(["train", "plan"]), "run.yaml"], ("run/", "run"))
    return Attempt(["sample", name, *extra, "--count", "1", "--out", "out.npy"], ("out.npy",))


def broken_bytes(whole: bytes, random: Random, folder: Path) -> Attempt:
    """The embedded teacher with damaged bytes."""
    data = bytearray(whole)
    length = struct.unpack("<Q", whole[:8])[0]
    match random.randrange(8):
        case 0:
            del data[random.randrange(len(data)) :]
        case 1:
            data += random.randbytes(random.randrange(1, 100))
        case 2:
            for _ in range(random.randrange(1, 20)):
                data[8 + random.randrange(length)] ^= 1 << random.randrange(8)
        case 3:
            lie = random.choice(
                [0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 100_000_000]
            )
            data[:8] = struct.pack("<Q", lie)
        case 4:
            data = bytearray(random.randbytes(random.choice([1, 7, 8, 100, 10_000])))
        case 5:
            data = bytearray(b"<!DOCTYPE html><html>\x1b[31mnot found</html>\n" * 50)
        case 6:
            data[8 : 8 + length] = b" " * length
        case 7:
            at = random.randrange(len(data))
            data[at : at + 64] = b"\0" * 64
    name = random.choice(["model.safetensors"] * 3 + ["model.bin", "model.pt", "model.ckpt", "x"])
    (folder / name).write_bytes(data)
    return given(random, folder, name, [])


def lying_header(tensors: Weights, about: dict[str, str], random: Random, folder: Path) -> Attempt:
    """A header that lies, of a body that is whole."""
    whole = save(tensors, about)
    length = struct.unpack("<Q", whole[:8])[0]
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    key = random.choice([key for key in header if key != "__metadata__"])
    text = None
    match random.randrange(12):
        case 0:
            header[key]["shape"] = random.choice([[], [0], [2**62, 4], [-1], [1] * 100_000, "x"])
        case 1:
            kinds = ["I8", "F64", "BOOL", "F8_E4M3", "F4", "C64", "XX", CONTROL, None, "U16"]
            header[key]["dtype"] = random.choice(kinds)
        case 2:
            header[key]["data_offsets"] = random.choice(
                [[0, 0], [0, 2**63], [5, 1], [-1, 1], [0, len(body)], [], None, [0.5, 1]]
            )
        case 3:
            header[random.choice([CONTROL, "\ud800", "x" * 5_000_000, ""])] = header.pop(key)
        case 4:
            header[key] = strange(random)
        case 5:
            header["__metadata__"] = random.choice(
                [None, [], "x", {"a": 1}, {"a": {}}, {CONTROL: "a"}]
            )
        case 6:
            text = random.choice(["[" * 100_000, '{"a":' * 100_000, "null", "[]", "{}", '"x"', "{"])
        case 7:
            text = json.dumps(header)[:-1] + "," + json.dumps({key: header[key]})[1:]
        case 8:
            entry = {"dtype": "F32", "shape": [0], "data_offsets": [len(body)] * 2}
            header |= {f"x{i}": entry for i in range(300_000)}
        case 9:
            header["__metadata__"]["note"] = "x" * 6_000_000
        case 10:
            header["__metadata__"] |= {f"{i}": "x" for i in range(300_000)}
        case 11:
            header[key]["extra"] = strange(random)
    if text is None:
        text = json.dumps(header)
    data = text.encode("utf-8", "surrogatepass")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + body)
    return given(random, folder, "model.safetensors", [])


def damage(random: Random, tensors: Weights) -> Weights:
    """Tensors of other shapes, kinds and names."""
    tensors = dict(tensors)
    for _ in range(random.choice([1, 1, 1, 2, 5])):
        key = random.choice(list(tensors) or ["x"])
        value = tensors.get(key, torch.zeros(2, 2))
        if random.random() < 0.4:  # the keys by which a layout is known, and sizes are read off
            telling = [k for k in tensors if k.endswith(("to_k.weight", "lora_down.weight"))]
            telling += [k for k in tensors if any(p in k for p in ("conv_in", "map_", "_conv"))]
            key = random.choice(telling or [key])
            value = tensors[key]
        match random.randrange(13):
            case 0:
                tensors[key] = torch.tensor(1.0)
            case 1:
                tensors[key] = value.flatten()
            case 2:
                tensors[key] = value[None]
            case 3:
                tensors[key] = value.T.contiguous() if value.ndim == 2 else value.flatten()[:1]
            case 4:
                tensors[key] = torch.zeros(random.choice([(0,), (0, 7), (5, 0), (0, 2**40)]))
            case 5:
                tensors[key] = value.to(random.choice(DTYPES))
            case 6:
                del tensors[key]
            case 7:
                tensors[random.choice(NAMES)] = tensors.pop(key)
            case 8:
                tensors[random.choice(NAMES)] = random.choice([torch.tensor(1.0), torch.ones(2, 2)])
            case 9:
                kind = random.choice(DTYPES)
                tensors = {k: v.to(kind) for k, v in tensors.items()}
            case 10:
                kind = random.choice([torch.tensor(1.0), torch.ones(3), torch.ones(2, 2)])
                tensors = {k: kind.clone() for k in tensors}
            case 11:
                tensors[key] = torch.full_like(value, float("nan"), dtype=torch.float32)
            case 12:
                tensors[key] = torch.cat([value, value]) if value.ndim else torch.zeros(0)
        if not tensors:
            break
    return tensors


def _damaged_metadata(random: Random, about: dict[str, str]) -> dict[str, str]:
    """What a file says, damaged in one of its values."""
    about = dict(about)
    keys = ["dmd.recipe", "dmd.network", "modelspec.license", "modelspec.resolution"]
    key = random.choice([*(set(keys) & about.keys()), *keys, "modelspec.prediction_type"])
    try:
        inner = json.loads(about.get(key, ""))
    except ValueError:
        inner = None
    if not isinstance(inner, dict) or random.random() < 0.2:
        about[key] = random.choice(
            [
                *("", "null", "[]", "{}", "5", "{", "[" * 100_000, '{"a":' * 100_000, CONTROL),
                *("x" * 5_000_000, "-5x-5", "99999999999x99999999999", "1x1", "9" * 5000, "nan"),
                *(json.dumps({"family": "edm-unet"}), json.dumps({"family": CONTROL})),
            ]
        )
        return about
    target = inner
    config = inner.get("config")
    if isinstance(config, dict) and config and random.random() < 0.6:
        target = config
    odd = strange(random)
    where = random.choice([*target, "unknown", "__class__", "sample_size"])
    target[where] = odd
    if where == "timesteps" and random.random() < 0.5:
        target[where] = list(range(2_000_000, 0, -1))
    about[key] = json.dumps(inner)
    return about


def broken_weights(
    tensors: Weights, about: dict[str, str], extra: list[str], random: Random, folder: Path
) -> Attempt:
    name = "model.safetensors"
    if about and random.random() < 0.25:
        about = _damaged_metadata(random, about)
    else:
        tensors = damage(random, tensors)
    if about == {} and random.random() < 0.3:
        name = "pytorch_model.bin"
        torch.save(tensors, folder / name)
    else:
        save_anyhow(folder / name, tensors, about)
    return given(random, folder, name, extra)


def save_anyhow(path: Path, tensors: Weights, about: dict[str, str]) -> None:
    """Whatever its names are: safetensors' own writer refuses lone surrogates."""
    clean = {key.encode("utf-8", "replace").decode(): value for key, value in about.items()}
    clean = {key: value.encode("utf-8", "replace").decode() for key, value in clean.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, clean)


def broken_metadata(
    tensors: Weights, about: dict[str, str], random: Random, folder: Path
) -> Attempt:
    recipe = Recipe(family="edm-unet", prediction="edm", timesteps=(999,), noise_scale=80.0)
    if random.random() < 0.5:
        about = about | recipe.to_metadata("x", (1, 8, 8))
    save_anyhow(folder / "model.safetensors", tensors, _damaged_metadata(random, about))
    return given(random, folder, "model.safetensors", [])
