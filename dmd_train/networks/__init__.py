"""From a name, a file or a folder to a Network."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters import merge_lora
from ..config import DIGITS, Config, load_config
from ..errors import UserError
from ..files import hash_of, write_safetensors
from ..network import NETWORK_KEY, Network
from ..recipe import Recipe
from ..recognise import Found, recognise
from ..weights import peek, read_weights
from .edm import EDMNetwork
from .sd_file import SDFile, open_sd
from .stable_diffusion import StableDiffusion, stable_diffusion
from .taesd import taesd
from .text import TextEncoder

DIGITS_TEACHER = Path(__file__).with_name("digits-teacher.safetensors")

EDM_LAYOUTS = ("our student", "our teacher", "EDM class-conditional")


@dataclass(frozen=True)
class Loaded:
    """A network from disk. recipe: None for a teacher; text: of one that is told prompts."""

    network: Network
    recipe: Recipe | None
    source: str
    sha256: str
    text: TextEncoder | None = None


def load_teacher(config: Config, device: torch.device) -> Loaded:
    """What config.teacher names: 'digits', a file, or a diffusers folder."""
    half = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    loaded = load(config.teacher, device, half=half, resolution=config.resolution)
    if config.decoder and isinstance(loaded.network, StableDiffusion):
        loaded.network.decoder = taesd(config.decoder)
    return loaded


def load(
    name: str,
    device: torch.device,
    base: Path | None = None,
    half: bool = False,
    resolution: int = 0,
) -> Loaded:
    """A network by itself, in float32. Raises UserError for what is none.

    base: where a student's text encoder, VAE and, for a LoRA, its UNet come from. half and
    resolution: see `stable_diffusion`; for a student and a resolution of 0, that of its recipe.
    """
    path = DIGITS_TEACHER if name == DIGITS else Path(name)
    if path.is_dir():
        return _teacher(open_sd(path), device, half, resolution)
    shapes, metadata = peek(path)
    found = recognise(shapes, metadata, str(path))
    if found.layout in EDM_LAYOUTS:
        return Loaded(_edm(path, found, metadata, device), found.recipe, path.stem, hash_of(path))
    if found.recipe is None and found.kind == "checkpoint":
        return _teacher(open_sd(path), device, half, resolution)
    return _student(path, found, base, device, resolution)


def _teacher(file: SDFile, device: torch.device, half: bool, resolution: int) -> Loaded:
    text = file.text_encoder()
    network = stable_diffusion(file, text, device, half, resolution)
    return Loaded(network, None, file.path.stem, file.sha256, text)


def _student(
    path: Path, found: Found, base: Path | None, device: torch.device, resolution: int
) -> Loaded:
    """A Stable Diffusion student: LoRA, UNet or checkpoint, with what it lacks from `base`."""
    if base is None:
        base = path if found.text_encoder else _base_of(path, found)
    file, own = open_sd(base, student=base == path), peek(path)[1]
    if file.family != found.family:
        raise UserError(f"{path}: {found.family}, but {base} is {file.family}. Give its own base.")
    text = file.text_encoder()
    pixels = resolution or int(own.get("modelspec.resolution", "0").partition("x")[0])
    network = stable_diffusion(file, text, device, False, pixels)
    if found.kind == "LoRA":
        merge_lora(network.module, read_weights(path)[0], str(path))
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


def _edm(path: Path, found: Found, metadata: dict[str, str], device: torch.device) -> EDMNetwork:
    """'digits', a file written by this package, or DMD2's ImageNet-64 generator."""
    tensors, _ = read_weights(path)
    if found.layout == "EDM class-conditional":
        from .imagenet64 import imagenet64_network

        network = imagenet64_network(tensors, str(path), found.license)
    else:
        network = build(metadata, str(path))
        try:
            network.module.load_state_dict(tensors)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"{path}: its weights do not fit its network ({reason})") from None
    network.module.to(device).eval()
    return network


def save(path: Path, teacher: Network) -> None:
    """A teacher's weights, with what is needed to load them again. Atomic."""
    write_safetensors(path, teacher.module.state_dict(), teacher.file_metadata())


def build(metadata: dict[str, str], file: str) -> EDMNetwork:
    """The network that a file's metadata describes, with fresh weights."""
    described = json.loads(metadata[NETWORK_KEY])
    match described["family"]:
        case "digits":
            from .digits import digits_network

            return digits_network()
        case "edm-unet":
            from .edm_unet import edm_unet

            return edm_unet(
                classes=described["classes"],
                sigma_data=described["sigma_data"],
                license=described["license"],
                **described["config"],
            )
        case unknown:
            raise UserError(f"{file}: network family '{unknown}' is not known to this version.")
