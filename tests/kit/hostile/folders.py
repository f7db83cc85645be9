"""A diffusers folder with one damaged file, and a decoder."""

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from kit.command_attempt import Attempt
from kit.hostile.settings import sd_run, write_settings
from kit.hostile.values import HOLLOW, strange
from kit.hostile.weights import Weights, damage, save_anyhow
from safetensors import safe_open


def pipeline_folder(pipeline: Path, random: Random, folder: Path) -> Attempt:
    """A pipeline with one damaged file."""
    model = folder / "model"
    shutil.copytree(pipeline, model, copy_function=os.link)
    files = sorted(path for path in model.rglob("*") if path.is_file())
    configs = [path for path in files if path.suffix in (".json", ".txt")]
    path = random.choice(configs if random.random() < 0.8 else files)
    whole = path.read_bytes()
    path.unlink()
    match random.randrange(10):
        case 0:
            pass
        case 1:
            path.mkdir()
        case 2:
            os.mkfifo(path)
        case 3:
            path.symlink_to(random.choice(["/dev/zero", path, "nowhere", "/dev/stdin"]))
        case 4:
            path.write_bytes(random.choice(HOLLOW))
        case 5:
            path.write_bytes(whole[: random.randrange(len(whole))])
        case _ if path.suffix == ".json":
            path.write_text(damaged_json(random, json.loads(whole)), errors="surrogatepass")
        case _ if path.suffix == ".safetensors":
            save_anyhow(path, damage(random, read_weights(whole, folder)), {})
        case _:
            data = bytearray(whole)
            for _ in range(random.randrange(1, 20)):
                data[random.randrange(len(data))] = random.randrange(256)
            path.write_bytes(data)
    if random.random() < 0.3:
        write_settings(folder, sd_run(pipeline) | {"teacher": "model"})
        return Attempt(["train", "run.yaml"], ("run/", "run"))
    return Attempt(
        ["sample", "model", "--prompt", "a 3", "--count", "1", "--out", "out.npy"], ("out.npy",)
    )


def damaged_json(random: Random, values: Any) -> str:
    """A config with a strange value somewhere."""
    target = values
    while isinstance(target, dict) and target:
        key = random.choice(list(target))
        if not isinstance(target[key], dict) or not target[key] or random.random() < 0.3:
            if random.random() < 0.15:
                del target[key]
            else:
                target[key] = strange(random)
            break
        target = target[key]
    else:
        values = {random.choice(["_class_name", "auto_map", "x"]): strange(random)}
    if isinstance(values, dict) and random.random() < 0.1:
        values["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    return json.dumps(values)


def read_weights(whole: bytes, folder: Path) -> Weights:
    path = folder / ".whole.safetensors"
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in list(file.keys())}
    path.unlink()
    return tensors


def decoder(pipeline: Path, random: Random, folder: Path) -> Attempt:
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng():
        tensors = AutoencoderTiny().decoder.layers.state_dict()
    prefix = random.choice(["decoder.layers.", ""])
    tensors = {prefix + key: value for key, value in tensors.items()}
    tensors = damage(random, tensors)
    if random.random() < 0.2:
        tensors[random.choice(["9" * 5000 + ".weight", "٣.weight", "-1.weight", "1."])] = (
            torch.ones(2)
        )
    name = random.choice(["taesd.safetensors", "taesd.pth"])
    if name.endswith("pth"):
        torch.save(tensors, folder / name)
    else:
        save_anyhow(folder / name, tensors, {})
    write_settings(folder, sd_run(pipeline) | {"decoder": name})
    return Attempt(["train", "run.yaml"], ("run/", "run"))
