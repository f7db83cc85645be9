"""A diffusers pipeline of Stable Diffusion in a folder, as `save_pretrained` writes it, offline.

Read by this package's own readers, not by from_pretrained: nothing is looked up, a pickle runs no
code, and a damaged file is one line.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

from ..errors import UserError
from ..families import TOLD_PROMPTS
from ..files.read import Weights, hash_of, read_weights
from ..method.noise import TIMESTEPS
from . import sd_layout, text
from .sd_file import GIVE, ZERO_SNR, SDFile, named, other_noise, predicts
from .text import TextEncoder

BETAS = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": TIMESTEPS,
    "trained_betas": None,
}
NOT_CONDITIONED = ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class SDFolder(SDFile):
    """One pipeline."""

    def unet(self) -> UNet2DConditionModel:
        return self._model(UNet2DConditionModel, "unet")

    def text_encoder(self) -> TextEncoder:
        last = len(self.row.text_encoders) - 1
        parts = []
        for i in range(last + 1):
            name = f"text_encoder_{i + 1}" if i else "text_encoder"
            config = _config(self.path / name / "config.json")
            weights = _folder_weights(self.path / name)
            tokenizer = self.path / name.replace("text_encoder", "tokenizer")
            if not tokenizer.is_dir():
                raise UserError(f"{tokenizer}: missing. Download the whole pipeline again.")
            with named(self.path / name, "text encoder"):
                is_projected = self.row.pooled and i == last
                parts.append(text.from_diffusers(config, weights, tokenizer, is_projected))
        return TextEncoder(parts, penultimate=self.row.pooled)

    def vae(self) -> AutoencoderKL | AutoencoderTiny | None:
        if not (self.path / "vae").is_dir():
            return None
        is_tiny = self._vae_config["_class_name"] == "AutoencoderTiny"
        return self._model(AutoencoderTiny if is_tiny else AutoencoderKL, "vae")

    @property
    def latent_scale(self) -> float:
        return float(self._vae_config.get("scaling_factor", super().latent_scale))

    @property
    def native_size(self) -> int:
        size = _config(self.path / "unet" / "config.json").get("sample_size")
        return size * self.downscale if isinstance(size, int) else super().native_size

    @property
    def downscale(self) -> int:
        widths = self._vae_config.get("block_out_channels")
        return 2 ** (len(widths) - 1) if widths else super().downscale

    @property
    def _vae_config(self) -> dict[str, Any]:
        path = self.path / "vae" / "config.json"
        return _config(path) if path.parent.is_dir() else {}

    def _model(self, kind: Any, name: str) -> Any:
        config = _config(self.path / name / "config.json")
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
        if not (path / needed).is_file():
            raise UserError(
                f"{path}: a folder without {needed}, so no diffusers pipeline of Stable Diffusion. "
                "Give the folder that holds model_index.json and unet/, or one file."
            )
    unet = _config(path / "unet" / "config.json")
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
    scheduler = _config(scheduler_path)
    if scheduler.get("rescale_betas_zero_snr"):
        raise other_noise(path, ZERO_SNR)
    for key, value in BETAS.items():
        if scheduler.get(key) != value:
            raise other_noise(path, f"its scheduler has {key} {scheduler.get(key)}, not {value}")
    prediction = predicts(path, scheduler.get("prediction_type", "epsilon"))
    hashes = [hash_of(file) for file in _weight_files(path / "unet")]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return SDFolder(path, family.name, prediction, "unknown", sha256)


def _config(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise UserError(f"{path}: {reason}. Download the whole pipeline again.") from None
    return found


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
