"""A diffusers pipeline of Stable Diffusion in a folder, as `save_pretrained` writes it, offline.

Read by this package's own readers, not by from_pretrained: nothing is looked up, a pickle runs no
code, and a damaged file is one line.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

from ..errors import UserError
from ..families import TOLD_PROMPTS
from ..files.read import Weights, hash_of, read_weights
from ..method.noise import TIMESTEPS
from . import sd_layout, text
from .sd_config import SchedulerSettings, TextSettings, UNetSettings, VAESettings, read_config
from .sd_file import GIVE, ZERO_SNR, SDFile, named, other_noise, predicts
from .text import TextEncoder

BETAS = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": TIMESTEPS,
    "trained_betas": None,
}
LARGEST_TOKENIZER = 16 << 20
"""Bytes of one file; CLIP's largest has four million."""

NOT_CONDITIONED = ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class SDFolder(SDFile):
    """One pipeline."""

    def unet(self) -> UNet2DConditionModel:
        return self._model(UNet2DConditionModel, "unet", self._unet_settings.values_())

    def text_encoder(self) -> TextEncoder:
        last = len(self.row.text_encoders) - 1
        parts = []
        for i in range(last + 1):
            name = f"text_encoder_{i + 1}" if i else "text_encoder"
            config = read_config(self.path / name / "config.json", TextSettings)
            weights = _folder_weights(self.path / name)
            tokenizer = self.path / name.replace("text_encoder", "tokenizer")
            _require_tokenizer(tokenizer)
            with named(self.path / name, "text encoder"):
                is_projected = self.row.pooled and i == last
                parts.append(
                    text.from_diffusers(config.values_(), weights, tokenizer, is_projected)
                )
        return TextEncoder(parts, penultimate=self.row.pooled)

    def vae(self) -> AutoencoderKL | AutoencoderTiny | None:
        settings = self._vae_settings
        if settings is None:
            return None
        is_tiny = settings.class_name == "AutoencoderTiny"
        return self._model(AutoencoderTiny if is_tiny else AutoencoderKL, "vae", settings.values_())

    @property
    def latent_scale(self) -> float:
        settings = self._vae_settings
        return (settings and settings.scaling_factor) or super().latent_scale

    @property
    def native_size(self) -> int:
        size = self._unet_settings.sample_size
        return size * self.downscale if isinstance(size, int) else super().native_size

    @property
    def downscale(self) -> int:
        settings = self._vae_settings
        widths = settings and settings.block_out_channels
        return 2 ** (len(widths) - 1) if widths else super().downscale

    @property
    def _unet_settings(self) -> UNetSettings:
        return read_config(self.path / "unet" / "config.json", UNetSettings)

    @property
    def _vae_settings(self) -> VAESettings | None:
        path = self.path / "vae" / "config.json"
        return read_config(path, VAESettings) if path.parent.is_dir() else None

    def _model(self, kind: Any, name: str, config: dict[str, Any]) -> Any:
        weights = _folder_weights(self.path / name)
        # VAEs of 2022 name their attention in another way; the key is whole words between dots
        old = re.compile(rf"\.({'|'.join(OLD_ATTENTION)})\.")
        weights = {
            old.sub(lambda match: f".{OLD_ATTENTION[match[1]]}.", key): value
            for key, value in weights.items()
        }
        with named(self.path / name, "network"):
            return sd_layout.build(kind, config, weights)


def open_folder(path: Path) -> SDFolder:
    """A pipeline whose noise and conditions are followed here. Raises UserError for any other."""
    for needed in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        if not os.path.isfile(path / needed):
            raise UserError(
                f"{path}: a folder without {needed}, so no diffusers pipeline of Stable Diffusion. "
                "Give the folder that holds model_index.json and unet/, or one file."
            )
    unet = read_config(path / "unet" / "config.json", UNetSettings).values_()
    added, width = unet.get("addition_embed_type"), unet.get("cross_attention_dim")
    alike = [family for family in TOLD_PROMPTS.values() if family.pooled == bool(added)]
    family = next((family for family in alike if family.text_width == width), alike[0])
    if unet.get("in_channels") != family.latent_channels:
        raise UserError(
            f"{path}: its UNet has {unet.get('in_channels')} input channels, so it is for "
            f"inpainting, editing or another kind of image. {GIVE}"
        )
    is_refiner = added and width == 1280
    if added not in (None, "text_time") or is_refiner or any(map(unet.get, NOT_CONDITIONED)):
        raise UserError(f"{path}: its UNet is told more than a prompt and t. {GIVE}")

    scheduler_path = path / "scheduler" / "scheduler_config.json"
    read = read_config(scheduler_path, SchedulerSettings)
    scheduler = read.values_()
    if scheduler.get("rescale_betas_zero_snr"):
        raise other_noise(path, ZERO_SNR)
    for key, value in BETAS.items():
        if scheduler.get(key) != value:
            raise other_noise(path, f"its scheduler has {key} {scheduler.get(key)}, not {value}")
    prediction = predicts(path, read.prediction_type)
    hashes = [hash_of(file) for file in _weight_files(path / "unet")]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return SDFolder(path, family.name, prediction, "unknown", sha256)


def _require_tokenizer(folder: Path) -> None:
    """Raises UserError for a folder that is not there, or holds what may not end."""
    if not folder.is_dir():
        raise UserError(f"{folder}: missing. Download the whole pipeline again.")
    for file in folder.iterdir():
        if not file.is_file() or file.stat().st_size > LARGEST_TOKENIZER:
            raise UserError(f"{file}: no file of a tokenizer. Download the whole pipeline again.")


def _folder_weights(folder: Path) -> Weights:
    weights: Weights = {}
    for file in _weight_files(folder):
        weights |= read_weights(file)[0]
    return weights


def _weight_files(folder: Path) -> list[Path]:
    """One file or all its shards; the full precision where there is a choice, safetensors first."""
    for suffix in ("safetensors", "bin"):
        for variant in ("", ".fp16"):
            for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
                shards = sorted(folder.glob(f"{stem}{variant}-*-of-*.{suffix}"))
                whole = folder / f"{stem}{variant}.{suffix}"
                if whole.is_file() or shards:
                    return [whole] if whole.is_file() else shards
    raise UserError(
        f"{folder}: holds no weights (.safetensors or .bin). Download the whole pipeline again."
    )
