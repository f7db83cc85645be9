"""From a name or a file to a Network."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import DIGITS
from ..errors import UserError
from ..files import read_safetensors, write_safetensors
from ..network import NETWORK_KEY, Network
from ..recipe import Recipe, read_recipe
from . import edm
from .edm import EDMNetwork

DIGITS_TEACHER = Path(__file__).with_name("digits-teacher.safetensors")


@dataclass(frozen=True)
class Loaded:
    """A network from disk. recipe: None for a teacher."""

    network: EDMNetwork
    recipe: Recipe | None
    source: str
    sha256: str


def load(name: str, device: torch.device) -> Loaded:
    """'digits' or the path of a file written by this package. Raises UserError for others."""
    path = DIGITS_TEACHER if name == DIGITS else Path(name)
    tensors, metadata = read_safetensors(path)
    network = build(metadata, str(path))
    try:
        network.module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{path}: its weights do not fit its network ({reason})") from None
    network.module.to(device).eval()
    recipe = read_recipe(metadata, str(path))
    return Loaded(network, recipe, path.stem, hashlib.sha256(path.read_bytes()).hexdigest())


def save(path: Path, teacher: Network) -> None:
    """A teacher's weights, with what is needed to load them again. Atomic."""
    write_safetensors(path, teacher.module.state_dict(), teacher.file_metadata())


def build(metadata: dict[str, str], file: str) -> EDMNetwork:
    """The network that a file's metadata describes, with fresh weights."""
    from . import digits

    try:
        described = json.loads(metadata[NETWORK_KEY])
    except (KeyError, json.JSONDecodeError):
        raise UserError(
            f"{file}: does not say what network it holds (no {NETWORK_KEY} in its metadata). "
            "Give 'digits' or a file written by dmd_train."
        ) from None
    match described["family"]:
        case digits.FAMILY:
            return digits.digits_network()
        case edm.FAMILY:
            return edm.edm_unet(
                classes=described["classes"],
                sigma_data=described["sigma_data"],
                license=described["license"],
                **described["config"],
            )
        case unknown:
            raise UserError(f"{file}: network family '{unknown}' is not known to this version.")
