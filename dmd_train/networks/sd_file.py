"""A Stable Diffusion model in one file: its parts.

Every part is read when it is asked for, on the CPU, in eval mode. What is no such model, or one
whose noise this package does not follow, is refused in one line when it is opened.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

from ..errors import UserError, shown
from ..families import FAMILIES, TITLES, Family
from ..files.read import Shapes, hash_of, peek, read_weights
from ..method.noise import Prediction
from . import sd_layout, text
from .ldm_names import LDM
from .recognise import recognise
from .sd_layout import VAE
from .text import TextEncoder

LAYOUTS = ("LDM single file", "LDM UNet", "diffusers UNet")
TEXT = ("cond_stage_model.", "conditioner.")
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v": "v", "v_prediction": "v"}
SPREAD_KEYS = (
    f"{LDM}output_blocks.11.1.transformer_blocks.0.norm1.bias",
    "output_blocks.11.1.transformer_blocks.0.norm1.bias",
    "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
)
"""One weight under the names of the three layouts. Its spread tells SD 2's v models, in ComfyUI."""
V_SPREAD = 0.09

ZERO_SNR = "trained with zero terminal SNR"
OTHER_NOISE = {"ztsnr": ZERO_SNR, "edm_mean": "an EDM model", "edm_vpred.sigma_max": "an EDM model"}
"""A key that marks a file -> what it marks."""
GIVE = f"Give {TITLES} base, as a checkpoint or a diffusers folder."


@dataclass(frozen=True)
class SDFile:
    """One checkpoint. family: "sd1", "sd2" or "sdxl"; prediction: "eps" or "v"."""

    path: Path
    family: str
    prediction: Prediction
    license: str
    sha256: str

    def unet(self) -> UNet2DConditionModel:
        """The UNet, in the dtype of the file."""
        weights, _ = read_weights(self.path, LDM)
        if not weights:
            weights, _ = read_weights(self.path)
            if any(key.startswith("output_blocks.") for key in weights):
                weights = {LDM + key: value for key, value in weights.items()}
        with named(self.path, "UNet"):
            return sd_layout.unet(weights, self.native_size // self.downscale)

    def text_encoder(self) -> TextEncoder:
        """The text encoder, in float32. Raises UserError if the file holds none."""
        weights, _ = read_weights(self.path, *TEXT)
        if not weights:
            raise UserError(
                f"{self.path}: holds no text encoder. "
                "Give a checkpoint with CLIP in it, or a diffusers folder."
            )
        with named(self.path, "text encoder"):
            return text.from_ldm(weights, self.family)

    def vae(self) -> AutoencoderKL | AutoencoderTiny | None:
        """The VAE, in the dtype of the file; None if it holds none."""
        weights, _ = read_weights(self.path, VAE)
        if not weights:
            return None
        with named(self.path, "VAE"):
            return sd_layout.vae(weights, self.latent_scale)

    @property
    def row(self) -> Family:
        """What is known of its family."""
        return FAMILIES[self.family]

    @property
    def latent_scale(self) -> float:
        """What the VAE's latents are multiplied by for the UNet."""
        return self.row.latent_scale

    @property
    def native_size(self) -> int:
        """Pixels a side that the model was made for."""
        return self.row.native_size(self.prediction)

    @property
    def downscale(self) -> int:
        """Pixels a side that one latent stands for."""
        return self.row.downscale


def open_file(path: Path, student: bool = False) -> SDFile:
    """A checkpoint that can be a teacher. Raises UserError for what cannot.

    student: take what is a student already.
    """
    shapes, metadata = peek(path)
    if any(re.search(r"lora[_.]", key) for key in shapes):
        raise UserError(f"{path}: a LoRA, which changes a model but is none. {GIVE}")
    for key in (f"{LDM}input_blocks.0.0.weight", "input_blocks.0.0.weight", "conv_in.weight"):
        if shapes.get(key, ())[1:2] == (9,):
            raise UserError(f"{path}: an inpainting model, of 9 input channels. {GIVE}")
    found = recognise(shapes, metadata, str(path), wanted="checkpoint")
    if found.recipe and not student:
        raise UserError(
            f"{path}: is already a {found.recipe.nfe}-step student. "
            "Give the model that it was distilled from, or one like it."
        )
    if found.layout not in LAYOUTS:
        raise UserError(f"{path}: {found.summary()}. {GIVE}")
    prediction = _prediction(path, shapes, metadata, found.family)
    return SDFile(path, found.family, prediction, found.license, hash_of(path))


def _prediction(path: Path, shapes: Shapes, metadata: dict[str, str], family: str) -> Prediction:
    for key, what in OTHER_NOISE.items():
        if key in shapes:
            raise other_noise(path, what)
    if said := metadata.get("modelspec.prediction_type"):
        return predicts(path, said)
    if "v_pred" in shapes:
        return "v"
    for key in SPREAD_KEYS:
        if family == "sd2" and key in shapes:
            with named(path, "UNet"):
                spread = read_weights(path, key)[0][key].float().std(correction=0).item()
                return "v" if spread > V_SPREAD else "eps"
    return "eps"


def predicts(path: Path, said: str) -> Prediction:
    if said not in PREDICTIONS:
        raise UserError(f"{path}: predicts {shown(said)}, not epsilon or v. {GIVE}")
    return PREDICTIONS[said]


def other_noise(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: {what}, which is not supported yet. "
        "Give a model of Stable Diffusion's own noise schedule, such as SDXL base."
    )


@contextmanager
def named(path: Path, part: str) -> Iterator[None]:
    """One line, with the file's name, for what a part's layout may be wrong in."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # those who convert and build fail in whatever they were doing
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{path}: a {part} of another layout ({reason}). {GIVE}") from None
