"""Tiny Stable Diffusion models on disk: a single file of each kind, and diffusers folders."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from kit.checkpoints import (
    as_diffusers_unet,
    as_transformers_clip,
    tiny_sd2_eps,
    tiny_sd2_v,
    tiny_sd15,
    tiny_sdxl,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dmd_train.networks import text

TINY: dict[str, Callable[..., None]] = {
    "sd15": tiny_sd15,
    "sd2-eps": tiny_sd2_eps,
    "sd2-v": tiny_sd2_v,
    "sdxl": tiny_sdxl,
}
"""Makers of single files, by name. All with the text encoder of their family."""

COLOURED_DIGITS = Path(__file__).parents[1] / "assets" / "coloured-digits"
"""A trained teacher of 32 pixels: the folder of the repository."""

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
    """A tokenizer as in Stability's and RunwayML's folders."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(text.vocabulary()))
    (folder / "merges.txt").write_bytes(gzip.decompress(text.MERGES.read_bytes()))
    names = {"bos_token": text.START, "eos_token": text.END, "unk_token": text.END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))


def micro_pipeline(folder: Path, family: str = "sd1") -> Path:
    """A diffusers folder with every part and random weights, to train in a second at 64 pixels.

    As wide in its text as `family`, so that its students are known for what they are; "sd2" is a v
    model. The tokens are those of coloured-digits, about one a letter.
    """
    is_xl = family == "sdxl"
    widths = {"sd1": [768], "sd2": [1024], "sdxl": [768, 1280]}[family]
    config: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (32, 64) if family == "sd1" else (64, 128),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8 if family == "sd1" else (1, 2),
        "use_linear_projection": family != "sd1",
        "cross_attention_dim": sum(widths),
    }
    if is_xl:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,
        }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        UNet2DConditionModel(**config).save_pretrained(folder / "unet")
        AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.18215,
        ).save_pretrained(folder / "vae")
        for suffix, width in zip(("", "_2"), widths, strict=False):
            clip = json.loads((COLOURED_DIGITS / "text_encoder" / "config.json").read_text())
            clip |= {"hidden_size": width, "projection_dim": width, "num_attention_heads": 4}
            kind = CLIPTextModelWithProjection if suffix else CLIPTextModel
            model = kind(CLIPTextConfig.from_dict(clip))
            for name, value in model.named_parameters():
                if name.endswith("token_embedding.weight"):
                    value.data *= 50  # as far apart as trained ones
            model.save_pretrained(folder / f"text_encoder{suffix}")
            shutil.copytree(COLOURED_DIGITS / "tokenizer", folder / f"tokenizer{suffix}")
    write_scheduler(folder, prediction_type="v_prediction" if family == "sd2" else "epsilon")
    (folder / "model_index.json").write_text("{}")
    return folder
