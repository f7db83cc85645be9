"""Random-weight flow-matching transformers, as small as an unpatched ComfyUI recognises them.

Of SD3 it reads the depth off the width (64 channels a block), of Flux the number of heads off the
width (128 channels a head; 0.3.75 knows 24 heads alone, so `tiny_flux` is for newer ones). The
widths of what text encoders give are the published ones. Each file has a 16-channel TAESD for a
VAE and no text encoder; CheckpointLoaderSimple and UNETLoader both take it.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from kit.checkpoints import UNET, _taesd_name
from kit.graphs import SEED, Graph, Node
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd_train.method.recipe import Recipe

CONTEXT = {"SD3": (4096, 2048), "Flux": (4096, 768)}
"""ComfyUI's name of a family -> width of the text condition and of the pooled one."""

LATENT_SCALE = {"SD3": (1.5305, 0.0609), "Flux": (0.3611, 0.1159)}
"""Scale and shift: a LATENT of ComfyUI's is x0 / scale + shift."""

SHIFT = {"SD3": 3.0, "Flux": math.exp(1.15)}
"""Shift of the noise levels, as `dmd_train.method.noise.Flow` has it: SD3's; Flux's mu of 1.15."""

CHANNELS, PATCH, POSITIONS = 16, 2, 64
"""Depth of a latent; side of a patch; patches a side that SD3 has positions for: 1024 pixels."""

SINUSOID = 256
"""Width of the embedding of t before its first layer."""

RANK, ALPHA = 2, 1.0
LORA_LAYERS = (
    "x_embedder.proj",  # a convolution
    "joint_blocks.0.x_block.attn.qkv",
    "joint_blocks.0.context_block.mlp.fc2",
    "joint_blocks.1.x_block.attn.proj",
    "final_layer.linear",
)
"""A layer of each kind, for a LoRA on SD3."""

Shapes = dict[str, tuple[int, ...]]


def tiny_sd3(path: Path, seed: int = 0) -> None:
    """SD3.5: two joint blocks 128 wide, the last of which drops the text. 2.4 M parameters."""
    width = 2 * 64
    shapes = {
        **layer("x_embedder.proj", width, CHANNELS, PATCH, PATCH),
        "pos_embed": (1, POSITIONS**2, width),
        **layer("t_embedder.mlp.0", width, SINUSOID),
        **layer("t_embedder.mlp.2", width, width),
        **layer("y_embedder.mlp.0", width, CONTEXT["SD3"][1]),
        **layer("y_embedder.mlp.2", width, width),
        **layer("context_embedder", width, CONTEXT["SD3"][0]),
        **sd3_stream("joint_blocks.0.x_block.", width),
        **sd3_stream("joint_blocks.0.context_block.", width),
        **sd3_stream("joint_blocks.1.x_block.", width),
        **sd3_attention("joint_blocks.1.context_block.", width),
        **layer("joint_blocks.1.context_block.adaLN_modulation.1", 2 * width, width),
        **layer("final_layer.adaLN_modulation.1", 2 * width, width),
        **layer("final_layer.linear", PATCH**2 * CHANNELS, width),
    }
    _save(path, seed, shapes, "first_stage_model.", LATENT_SCALE["SD3"])


def sd3_stream(name: str, width: int) -> Shapes:
    """One of the two streams of a joint block."""
    return {
        **sd3_attention(name, width),
        **layer(f"{name}attn.proj", width, width),
        **layer(f"{name}mlp.fc1", 4 * width, width),
        **layer(f"{name}mlp.fc2", width, 4 * width),
        **layer(f"{name}adaLN_modulation.1", 6 * width, width),
    }


def sd3_attention(name: str, width: int) -> Shapes:
    """What every stream gives to the attention they share, with SD3.5's RMS norms on q and k."""
    return {
        **layer(f"{name}attn.qkv", 3 * width, width),
        f"{name}attn.ln_q.weight": (64,),
        f"{name}attn.ln_k.weight": (64,),
    }


def tiny_flux(path: Path, seed: int = 0) -> None:
    """Flux.1-dev, told its guidance: a double and a single block, one head. 1.6 M parameters."""
    width = 128
    shapes = {
        **layer("img_in", width, PATCH**2 * CHANNELS),
        **layer("txt_in", width, CONTEXT["Flux"][0]),
        **flux_embedder("time_in", width, SINUSOID),
        **flux_embedder("guidance_in", width, SINUSOID),
        **flux_embedder("vector_in", width, CONTEXT["Flux"][1]),
        **flux_stream("double_blocks.0.img", width),
        **flux_stream("double_blocks.0.txt", width),
        **layer("single_blocks.0.modulation.lin", 3 * width, width),
        **layer("single_blocks.0.linear1", (3 + 4) * width, width),
        **layer("single_blocks.0.linear2", width, (1 + 4) * width),
        "single_blocks.0.norm.query_norm.scale": (width,),
        "single_blocks.0.norm.key_norm.scale": (width,),
        **layer("final_layer.adaLN_modulation.1", 2 * width, width),
        **layer("final_layer.linear", PATCH**2 * CHANNELS, width),
    }
    _save(path, seed, shapes, "vae.", LATENT_SCALE["Flux"])


def flux_embedder(name: str, width: int, given: int) -> Shapes:
    return {
        **layer(f"{name}.in_layer", width, given),
        **layer(f"{name}.out_layer", width, width),
    }


def flux_stream(name: str, width: int) -> Shapes:
    """One of the two streams of a double block."""
    return {
        **layer(f"{name}_mod.lin", 6 * width, width),
        **layer(f"{name}_attn.qkv", 3 * width, width),
        f"{name}_attn.norm.query_norm.scale": (width,),
        f"{name}_attn.norm.key_norm.scale": (width,),
        **layer(f"{name}_attn.proj", width, width),
        **layer(f"{name}_mlp.0", 4 * width, width),
        **layer(f"{name}_mlp.2", width, 4 * width),
    }


def layer(name: str, out: int, *given: int) -> Shapes:
    return {f"{name}.weight": (out, *given), f"{name}.bias": (out,)}


def _save(
    path: Path, seed: int, network: Shapes, vae: str, latent_scale: tuple[float, float]
) -> None:
    with torch.device("meta"):
        taesd = AutoencoderTiny(latent_channels=CHANNELS)
    shapes = {UNET + key: shape for key, shape in network.items()}
    shapes |= {vae + _taesd_name(k): tuple(v.shape) for k, v in taesd.state_dict().items()}
    tensors = random_weights(shapes, seed)
    scale, shift = latent_scale
    tensors |= {vae + "vae_scale": torch.tensor(scale), vae + "vae_shift": torch.tensor(shift)}
    save_file({key: tensor.half() for key, tensor in tensors.items()}, path)


def random_weights(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Weights that keep the signal's size, and biases and norms that show when one is misplaced."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        noise = (torch.rand(shape, generator=random) - 0.5) * math.sqrt(12)  # variance 1
        if key.endswith("bias"):
            tensors[key] = 0.05 * noise
        elif len(shape) == 1 or key.endswith("gamma"):  # the scale of a norm
            tensors[key] = 1 + 0.1 * noise
        elif key.endswith("pos_embed"):  # of the size of sines and cosines
            tensors[key] = noise / math.sqrt(2)
        else:
            tensors[key] = noise / math.sqrt(math.prod(shape[1:]))
    return tensors


def text_condition(graph: Graph, family: str, seed: int = SEED) -> Node:
    """A random text condition of the family's widths."""
    width, pooled_width = CONTEXT[family]
    return graph.add("Probe_Conditioning", seed=seed, width=width, pooled_width=pooled_width)


def sd3_weights(path: Path) -> dict[str, Tensor]:
    """The network's, by ComfyUI's names without their prefix, in float32: what a CPU runs."""
    whole = load_file(path)
    return {k.removeprefix(UNET): v.float() for k, v in whole.items() if k.startswith(UNET)}


def as_diffusers_sd3(weights: dict[str, Tensor]) -> SD3Transformer2DModel:
    """The network of `sd3_weights`, built and converted by diffusers."""
    with torch.device("meta"):
        network = SD3Transformer2DModel(
            num_layers=2,
            num_attention_heads=2,
            caption_projection_dim=128,
            pos_embed_max_size=POSITIONS,
            qk_norm="rms_norm",
        )
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(weights))
    network.load_state_dict(converted, assign=True)
    return network.eval()


def flow_recipe(family: str = "SD3", *timesteps: int) -> Recipe:
    """One step from pure noise, unless timesteps say otherwise."""
    return Recipe(
        family=family,
        prediction="flow",
        timesteps=timesteps or (999,),
        noise_scale=1.0,
        baked_guidance=4.5,
        teacher="tiny",
        license="CC0",
    )


def flow_lora(
    weights: dict[str, Tensor], layers: tuple[str, ...] = LORA_LAYERS
) -> dict[str, Tensor]:
    """A random LoRA on these layers, as a run writes it: ComfyUI's names with underscores."""
    random = torch.Generator().manual_seed(1)
    lora = {}
    for name in layers:
        out, *given = weights[f"{name}.weight"].shape
        key = f"lora_unet_{name.replace('.', '_')}"
        down = torch.randn(RANK, *given, generator=random) / torch.Size(given).numel() ** 0.5
        up = torch.randn(out, RANK, *[1] * (len(given) - 1), generator=random)
        lora |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        lora[f"{key}.alpha"] = torch.tensor(ALPHA)
    return lora


def merged(
    weights: dict[str, Tensor], lora: dict[str, Tensor], strength: float
) -> dict[str, Tensor]:
    """W + strength alpha / rank up down, of a LoRA on LORA_LAYERS."""
    whole = dict(weights)
    for name in LORA_LAYERS:
        key = f"lora_unet_{name.replace('.', '_')}"
        down, up = lora[f"{key}.lora_down.weight"], lora[f"{key}.lora_up.weight"]
        delta = (up.flatten(1) @ down.flatten(1)).view_as(whole[f"{name}.weight"])
        whole[f"{name}.weight"] = whole[f"{name}.weight"] + strength * ALPHA / RANK * delta
    return whole
