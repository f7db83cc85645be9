"""Stable Diffusion from files to Networks: a teacher, or a student with what it lacks."""

import os
from pathlib import Path

import torch

from ..config import load_config
from ..errors import UserError
from ..files.read import hash_of, peek, read_weights
from ..method.lora import merge_lora
from ..method.recipe import pixels_of
from .loaded import Loaded
from .recognise import Found
from .sd_file import SDFile, open_file
from .sd_folder import open_folder
from .stable_diffusion import stable_diffusion
from .taesd import taesd


def open_sd(path: Path, student: bool = False) -> SDFile:
    """A checkpoint or a pipeline's folder. Raises UserError unless it can be a teacher.

    student: take what is a student already.
    """
    return open_folder(path) if os.path.isdir(path) else open_file(path, student)


def load_sd_teacher(
    path: Path,
    device: torch.device,
    half: bool = False,
    resolution: int = 0,
    decoder: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Loaded:
    """A teacher. half, resolution, dtype: see `stable_diffusion`. decoder: a TAESD for the VAE."""
    file = open_sd(path)
    text = file.text_encoder()
    network = stable_diffusion(file, text, device, half, resolution, dtype)
    if decoder:
        network.decoder = taesd(decoder)
    return Loaded(network, None, path.stem, file.sha256, text)


def load_sd_student(path: Path, found: Found, base: Path | None, device: torch.device) -> Loaded:
    """A LoRA, UNet or checkpoint, with what it lacks from `base`."""
    is_named = base is not None
    if base is None:
        base = path if found.text_encoder else _base_of(path, found)
    file, own = open_sd(base, student=base == path), peek(path)[1]
    made_from = found.recipe.teacher_sha256 if found.recipe else ""
    if made_from not in ("", file.sha256) and not is_named and base != path:
        raise UserError(
            f"{base}: another file than {path} was made from, or changed since. Put the old one "
            "back, or name it if you want this one: --base FILE."
        )
    if file.family != found.family:
        raise UserError(f"{path}: {found.family}, but {base} is {file.family}. Give its own base.")
    text = file.text_encoder()
    pixels = pixels_of(own, str(path))
    network = stable_diffusion(file, text, device, False, pixels)
    if found.kind == "LoRA":
        merge_lora(network.module, read_weights(path)[0], str(path))
    elif base != path and found.layout == "LDM UNet":
        network.load_ldm_tensors(read_weights(path)[0], str(path))
    elif base != path:
        network.module = open_sd(path, student=True).unet().float().to(device)
    sha256 = file.sha256 if base == path else hash_of(path)
    return Loaded(network, found.recipe, path.stem, sha256, text)


def _base_of(path: Path, found: Found) -> Path:
    """The teacher that the run.yaml beside a student names."""
    run_yaml = path.parent / "run.yaml"
    if not run_yaml.exists():
        raise UserError(
            f"{path}: a {found.layout}, without a text encoder. Name the checkpoint that it was "
            "made from: --base FILE."
        )
    return Path(load_config(run_yaml, []).teacher)
