"""Tiny Stable Diffusion models on disk: a single file of each kind, and diffusers folders."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import (
    as_diffusers_unet,
    as_transformers_clip,
    tiny_sd2_eps,
    tiny_sd2_v,
    tiny_sd15,
    tiny_sdxl,
)
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from unit.tiny_sd import POOLED, WIDTH, tiny_sd

from dmd_train.networks import text

TINY: dict[str, Callable[..., None]] = {
    "sd15": tiny_sd15,
    "sd2-eps": tiny_sd2_eps,
    "sd2-v": tiny_sd2_v,
    "sdxl": tiny_sdxl,
}
"""Makers of single files, by name. All with the text encoder of their family."""

Tiny = Callable[[str], Path]


def single_files(folder: Path) -> Tiny:
    """The tiny file of a name, made in `folder` when it is first asked for."""

    def made(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            TINY[name](path, clip=True)
        return path

    return made


def pipelines(tiny: Tiny) -> Tiny:
    """The same weights as a diffusers folder, written by diffusers and transformers."""

    def made(name: str) -> Path:
        file = tiny(name)
        folder = file.with_suffix("")
        if folder.exists():
            return folder
        as_diffusers_unet(file).half().save_pretrained(folder / "unet")
        AutoencoderTiny().save_pretrained(folder / "vae")
        for suffix, model in zip(("", "_2"), as_transformers_clip(file), strict=False):
            model.half().save_pretrained(folder / f"text_encoder{suffix}")
            openclip = name == "sd2-eps" or suffix
            write_tokenizer(folder / f"tokenizer{suffix}", pad="!" if openclip else text.END)
        write_scheduler(folder)
        (folder / "model_index.json").write_text("{}")
        return folder

    return made


def write_scheduler(folder: Path, **settings: Any) -> None:
    """Stable Diffusion's, but for `settings`."""
    usual = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    DDIMScheduler(**(usual | settings)).save_pretrained(folder / "scheduler")


def write_tokenizer(folder: Path, pad: str) -> None:
    """As in Stability's and RunwayML's folders."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(text.vocabulary()))
    (folder / "merges.txt").write_bytes(gzip.decompress(text.MERGES.read_bytes()))
    names = {"bos_token": text.START, "eos_token": text.END, "unk_token": text.END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))


def micro_pipeline(folder: Path, family: str = "sd1") -> Path:
    """A diffusers folder of random weights with every part, small enough to train in a second.

    `tiny_sd`'s UNet at 64 pixels, CLIP's tokens, a VAE. family: "sd1" or "sdxl".
    """
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tiny_sd(family).module.save_pretrained(folder / "unet")
        AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.18215,
        ).save_pretrained(folder / "vae")
        for suffix in ("", "_2") if family == "sdxl" else ("",):
            width = WIDTH // 2 if family == "sdxl" else WIDTH
            config = CLIPTextConfig(
                hidden_size=width,
                intermediate_size=2 * width,
                projection_dim=POOLED,
                num_hidden_layers=2,
                num_attention_heads=2,
                bos_token_id=text.START_ID,
                eos_token_id=text.END_ID,
            )
            model = (CLIPTextModelWithProjection if suffix else CLIPTextModel)(config)
            # far apart, as trained ones are
            for name, value in model.named_parameters():
                if name.endswith("token_embedding.weight"):
                    value.data *= 50
            model.save_pretrained(folder / f"text_encoder{suffix}")
            write_tokenizer(folder / f"tokenizer{suffix}", pad=text.END)
    write_scheduler(folder)
    (folder / "model_index.json").write_text("{}")
    return folder
