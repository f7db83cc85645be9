"""Networks from a name, a file or a folder.

ComfyUI's nodes come here too, for the class-conditional ones: what Stable Diffusion needs beside
torch is imported when a file of it is met.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..config import CANVAS, DIGITS, Config
from ..errors import UserError
from ..families import TOLD_PROMPTS
from ..files.read import Weights, hash_of, peek, read_weights
from ..files.write import write_safetensors
from ..method.network import NETWORK_KEY, Network
from .described import Description, described
from .edm import EDMNetwork
from .loaded import Loaded
from .recognise import CLASS_CONDITIONAL, Found, recognise

DIGITS_TEACHER = Path(__file__).with_name("digits-teacher.safetensors")


def load_teacher(config: Config, device: torch.device) -> Loaded:
    """The network that config.teacher names: 'digits', a file, or a diffusers folder.

    Raises UserError for a MODEL of ComfyUI's, which is no file.
    """
    path = Path(config.teacher)
    if config.teacher.startswith(CANVAS):
        raise UserError(
            f"teacher: {config.teacher} was wired in ComfyUI, with what was patched into it. Go on "
            "with the run there."
        )
    if config.teacher == DIGITS or _is_edm(path):
        return load(config.teacher, device)
    from .sd_load import load_sd_teacher

    # a student is refused here, and not looked for the base it was made from
    half = config.half(device)
    # full training copies the weights before it halves them
    dtype = torch.bfloat16 if half and config.training == "lora" else torch.float32
    return load_sd_teacher(path, device, half, config.resolution, config.decoder, dtype)


def load(name: str, device: torch.device, base: Path | None = None) -> Loaded:
    """A network by itself, in float32. Raises UserError for what is none.

    base: where a student's text encoder, VAE and, for a LoRA, its UNet come from.
    """
    path = DIGITS_TEACHER if name == DIGITS else Path(name)
    found = None
    if not os.path.isdir(path):  # False of a name too long, which Path.is_dir fails on
        shapes, metadata = peek(path)
        found = recognise(shapes, metadata, str(path))
        if found.layout in CLASS_CONDITIONAL:
            network = _edm(path, found, metadata, device)
            return Loaded(network, found.recipe, path.stem, hash_of(path))
        if found.family not in TOLD_PROMPTS:
            raise UserError(
                f"{path}: a student of {found.family}, which ComfyUI has and this package has not. "
                "Open it there."
            )
    from .sd_load import load_sd_student, load_sd_teacher

    if found and (found.recipe or found.kind == "LoRA"):
        return load_sd_student(path, found, base, device)
    return load_sd_teacher(path, device)


def _is_edm(path: Path) -> bool:
    if os.path.isdir(path):
        return False
    shapes, metadata = peek(path)
    return NETWORK_KEY in metadata or "model.map_label.weight" in shapes


def _edm(path: Path, found: Found, metadata: dict[str, str], device: torch.device) -> EDMNetwork:
    """The network of a file written by this package, or of DMD2's ImageNet-64 generator."""
    tensors, _ = read_weights(path)
    if found.layout == "EDM class-conditional":
        from .imagenet64 import imagenet64_network

        network = imagenet64_network(tensors, str(path), found.license)
    else:
        network = _own(described(metadata, str(path)), tensors, str(path))
        network.module.load_state_dict(tensors)
    network.module.to(device).eval()
    return network


def save(path: Path, teacher: Network) -> None:
    """A teacher's weights, with what is needed to load them again. Atomic."""
    write_safetensors(path, teacher.module.state_dict(), teacher.file_metadata())


def _own(description: Description, weights: Weights, file: str) -> EDMNetwork:
    """The described network, with fresh weights, which `weights` fit. Raises UserError, also where
    the description is of no network."""
    build = _builder(description, file)
    try:
        # a description may ask for more memory than there is: first without any
        with torch.device("meta"):
            own = build().module.state_dict()
    except Exception as error:  # diffusers fails in whatever it happened to be doing
        raise UserError(
            f"{file}: what it says of its network makes none ({error}). Get the file again "
            "from its author."
        ) from None
    wrong = sorted(
        key
        for key in own.keys() | weights.keys()
        if key not in own
        or key not in weights
        or own[key].shape != weights[key].shape
        or not weights[key].is_floating_point()
    )
    if wrong:
        raise UserError(
            f"{file}: its weights do not fit its network ({wrong[0]} and {len(wrong) - 1} "
            "others). Get the file again from its author."
        )
    return build()


def _builder(description: Description, file: str) -> Callable[[], EDMNetwork]:
    match description.family:
        case "digits":
            from .digits import digits_network

            return digits_network
        case "edm-unet":
            from .edm_unet import edm_unet

            return partial(
                edm_unet,
                classes=description.classes,
                sigma_data=description.sigma_data,
                license=description.license,
                **description.unet(file),
            )
        case unknown:
            raise UserError(
                f"{file}: network family '{unknown}' is not known to this version. Update "
                "dmd-one-step."
            )
