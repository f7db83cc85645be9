"""From a name or a file to a Network."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import DIGITS
from ..errors import UserError
from ..files import write_safetensors
from ..network import NETWORK_KEY, Network
from ..recipe import Recipe
from ..recognise import recognise
from ..weights import peek, read_weights
from .edm import EDMNetwork

DIGITS_TEACHER = Path(__file__).with_name("digits-teacher.safetensors")


READABLE = ("our student", "our teacher", "EDM class-conditional")


@dataclass(frozen=True)
class Loaded:
    """A class-conditional network from disk. recipe: None for a teacher."""

    network: EDMNetwork
    recipe: Recipe | None
    source: str
    sha256: str


def load(name: str, device: torch.device) -> Loaded:
    """'digits', a file written by this package, or DMD2's ImageNet-64 generator.

    Raises UserError for anything else.
    """
    path = DIGITS_TEACHER if name == DIGITS else Path(name)
    shapes, metadata = peek(path)
    found = recognise(shapes, metadata, str(path), wanted="checkpoint")
    if found.layout not in READABLE:
        raise UserError(
            f"{path}: {found.summary}. Only class-conditional EDM networks are read here so far; "
            "give 'digits' or a file written by dmd_train."
        )
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
    return Loaded(network, found.recipe, path.stem, hash_of(path))


def hash_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
