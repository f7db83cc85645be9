"""Random-weight transformers whose latents have a time axis, (B, 16, T, H, W), and their VAE.

Each is one block of one head, 128 wide, about a million parameters. Of Wan 2.1 and Krea 2 ComfyUI
reads the sizes off the file; of Qwen-Image and Cosmos Predict2 it knows the published widths alone,
so that those two need Probe_LoadNarrow. Their VAE is Wan 2.1's, a file of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from kit.checkpoints import UNET
from kit.comfy_host import Server
from kit.flow_model import Shapes, layer, random_weights
from kit.graphs import SEED, Graph, Node, models, put
from safetensors.torch import save_file

from dmd_train.method.noise import EDM, Flow, Noise

WIDTH, CHANNELS, PATCH = 128, 16, 4
"""Of a network; of a latent; values of a channel that become a token: 2 by 2."""

TEXT = {"wan": 4096, "krea2": 80, "qwen": 3584, "cosmos": 1024}
"""Widths of the text conditions. Krea 2's is that of two layers of 40."""


@dataclass(frozen=True)
class TimeAxis:
    """One of them. noise: its own, in the engine's terms; published: what LoadNarrow is told."""

    name: str
    family: str
    noise: Noise
    shapes: Shapes
    published: str = ""
    is_new: bool = False
    """Whether 0.3.75 does not know it."""

    def load(self, server: Server, graph: Graph) -> Node:
        """The MODEL."""
        if self.is_new and server.get("/system_stats")["system"]["comfyui_version"] == "0.3.75":
            pytest.skip(f"0.3.75 does not know {self.family}")
        shapes = {UNET + key: shape for key, shape in self.shapes.items()}
        name = put(server, partial(write, shapes), f"{self.name}.safetensors")
        if not self.published:
            return graph.add("CheckpointLoaderSimple", ckpt_name=name)
        return graph.add("Probe_LoadNarrow", ckpt_name=name, config=self.published)

    def condition(self, graph: Graph, seed: int = SEED) -> Node:
        return graph.add("Probe_Conditioning", seed=seed, width=TEXT[self.name], pooled_width=0)


def one_vae(server: Server, graph: Graph) -> Node:
    """The VAE that they share: pictures of one frame are (B, 1, H, W, 3)."""
    path = models(server, "vae", "tiny_wan_vae.safetensors")
    if not path.exists():
        write(wan_vae(4), path)
    return graph.add("VAELoader", vae_name=path.name)


def write(shapes: Shapes, path: Path) -> None:
    """Random weights in half precision."""
    save_file({key: value.half() for key, value in random_weights(shapes, 0).items()}, path)


def bare(name: str, out: int, *given: int) -> Shapes:
    """A layer without a bias."""
    return {f"{name}.weight": (out, *given)}


def linears(names: str, of: Callable[..., Shapes], prefix: str, given: int = WIDTH) -> Shapes:
    """Layers of one shape under these names."""
    made: Shapes = {}
    for name in names.split():
        made |= of(prefix + name, WIDTH, given)
    return made


def wan() -> Shapes:
    """Wan 2.1 T2V."""
    block, ffn = "blocks.0.", 2 * WIDTH
    return {
        **layer("patch_embedding", WIDTH, CHANNELS, 1, 2, 2),
        **layer("text_embedding.0", WIDTH, TEXT["wan"]),
        **layer("text_embedding.2", WIDTH, WIDTH),
        **layer("time_embedding.0", WIDTH, 256),
        **layer("time_embedding.2", WIDTH, WIDTH),
        **layer("time_projection.1", 6 * WIDTH, WIDTH),
        f"{block}modulation": (1, 6, WIDTH),
        **linears("self_attn.q self_attn.k self_attn.v self_attn.o", layer, block),
        **linears("cross_attn.q cross_attn.k cross_attn.v cross_attn.o", layer, block),
        **{
            f"{block}{way}_attn.norm_{x}.weight": (WIDTH,)
            for way in ("self", "cross")
            for x in "qk"
        },
        **layer(f"{block}norm3", WIDTH),
        **layer(f"{block}ffn.0", ffn, WIDTH),
        **layer(f"{block}ffn.2", WIDTH, ffn),
        "head.modulation": (1, 2, WIDTH),
        **layer("head.head", PATCH * CHANNELS, WIDTH),
    }


def krea2() -> Shapes:
    """Krea 2, whose text has 20 heads whatever its width."""
    text = 40
    shapes = {
        **layer("first", WIDTH, PATCH * CHANNELS),
        "blocks.0.mod.lin": (6 * WIDTH,),
        **krea2_block("blocks.0.", WIDTH, WIDTH, 3 * WIDTH),
        **layer("tmlp.0", WIDTH, 256),
        **layer("tmlp.2", WIDTH, WIDTH),
        "txtfusion.projector.weight": (1, TEXT["krea2"] // text),
        "txtmlp.0.scale": (text,),
        **layer("txtmlp.1", WIDTH, text),
        **layer("txtmlp.3", WIDTH, WIDTH),
        "last.norm.scale": (WIDTH,),
        **layer("last.linear", PATCH * CHANNELS, WIDTH),
        "last.modulation.lin": (2, WIDTH),
        **layer("tproj.1", 6 * WIDTH, WIDTH),
    }
    for blocks in ("layerwise_blocks", "refiner_blocks"):
        for i in range(2):
            shapes |= krea2_block(f"txtfusion.{blocks}.{i}.", text, text // 20, 128)
    return shapes


def krea2_block(name: str, width: int, head: int, mlp: int) -> Shapes:
    square = {f"{name}attn.{x}.weight": (width, width) for x in ("wq", "wk", "wv", "gate", "wo")}
    return {
        f"{name}prenorm.scale": (width,),
        f"{name}postnorm.scale": (width,),
        **square,
        f"{name}attn.qknorm.qnorm.scale": (head,),
        f"{name}attn.qknorm.knorm.scale": (head,),
        **bare(f"{name}mlp.gate", mlp, width),
        **bare(f"{name}mlp.up", mlp, width),
        **bare(f"{name}mlp.down", width, mlp),
    }


def qwen() -> Shapes:
    """Qwen-Image."""
    block = "transformer_blocks.0."
    attention = "to_q to_k to_v add_q_proj add_k_proj add_v_proj to_out.0 to_add_out"
    shapes = {
        **layer("time_text_embed.timestep_embedder.linear_1", WIDTH, 256),
        **layer("time_text_embed.timestep_embedder.linear_2", WIDTH, WIDTH),
        "txt_norm.weight": (TEXT["qwen"],),
        **layer("img_in", WIDTH, PATCH * CHANNELS),
        **layer("txt_in", WIDTH, TEXT["qwen"]),
        **linears(attention, layer, f"{block}attn."),
        **{f"{block}attn.norm_{x}.weight": (WIDTH,) for x in ("q", "k", "added_q", "added_k")},
        **layer("norm_out.linear", 2 * WIDTH, WIDTH),
        **layer("proj_out", PATCH * CHANNELS, WIDTH),
    }
    for stream in ("img", "txt"):
        shapes |= layer(f"{block}{stream}_mod.1", 6 * WIDTH, WIDTH)
        shapes |= layer(f"{block}{stream}_mlp.net.0.proj", 4 * WIDTH, WIDTH)
        shapes |= layer(f"{block}{stream}_mlp.net.2", WIDTH, 4 * WIDTH)
    return shapes


def cosmos() -> Shapes:
    """Cosmos Predict2, which is told of its padding in a channel more."""
    block, lora = "blocks.0.", 256
    shapes = {
        **bare("t_embedder.1.linear_1", WIDTH, WIDTH),
        **bare("t_embedder.1.linear_2", 3 * WIDTH, WIDTH),
        **bare("x_embedder.proj.1", WIDTH, PATCH * (CHANNELS + 1)),
        **linears("self_attn.q_proj self_attn.k_proj self_attn.v_proj", bare, block),
        **linears("self_attn.output_proj cross_attn.q_proj cross_attn.output_proj", bare, block),
        **linears("cross_attn.k_proj cross_attn.v_proj", bare, block, TEXT["cosmos"]),
        **{
            f"{block}{way}_attn.{x}_norm.weight": (WIDTH,)
            for way in ("self", "cross")
            for x in "qk"
        },
        **bare(f"{block}mlp.layer1", 4 * WIDTH, WIDTH),
        **bare(f"{block}mlp.layer2", WIDTH, 4 * WIDTH),
        **bare("final_layer.linear", PATCH * CHANNELS, WIDTH),
        **bare("final_layer.adaln_modulation.1", lora, WIDTH),
        **bare("final_layer.adaln_modulation.2", 2 * WIDTH, lora),
        "t_embedding_norm.weight": (WIDTH,),
    }
    for part in ("self_attn", "cross_attn", "mlp"):
        shapes |= bare(f"{block}adaln_modulation_{part}.1", lora, WIDTH)
        shapes |= bare(f"{block}adaln_modulation_{part}.2", 3 * WIDTH, lora)
    return shapes


def wan_vae(width: int) -> Shapes:
    """Wan 2.1's VAE: 8 pixels a side, 4 frames after the first."""
    down, up = "encoder.downsamples.", "decoder.upsamples."
    w1, w2, w4 = width, 2 * width, 4 * width
    encoder = [
        (w1, w1),
        (w1, w1),
        2,
        (w1, w2),
        (w2, w2),
        3,
        (w2, w4),
        (w4, w4),
        3,
        (w4, w4),
        (w4, w4),
    ]
    decoder = [(w4, w4)] * 3 + [3] + [(w2, w4)] + [(w4, w4)] * 2 + [3]
    decoder += [(w2, w2)] * 3 + [2] + [(w1, w1)] * 3
    shapes = {
        **layer("encoder.conv1", w1, 3, 3, 3, 3),
        **vae_middle("encoder.middle.", w4),
        "encoder.head.0.gamma": (w4, 1, 1, 1),
        **layer("encoder.head.2", 2 * CHANNELS, w4, 3, 3, 3),
        **layer("conv1", 2 * CHANNELS, 2 * CHANNELS, 1, 1, 1),
        **layer("conv2", CHANNELS, CHANNELS, 1, 1, 1),
        **layer("decoder.conv1", w4, CHANNELS, 3, 3, 3),
        **vae_middle("decoder.middle.", w4),
        "decoder.head.0.gamma": (w1, 1, 1, 1),
        **layer("decoder.head.2", 3, w1, 3, 3, 3),
    }
    at = w1
    for i, part in enumerate(encoder):
        if isinstance(part, tuple):
            shapes |= vae_residual(f"{down}{i}.", *part)
            at = part[1]
        else:
            shapes |= layer(f"{down}{i}.resample.1", at, at, 3, 3)
            shapes |= layer(f"{down}{i}.time_conv", at, at, 3, 1, 1) if part == 3 else {}
    for i, part in enumerate(decoder):
        if isinstance(part, tuple):
            shapes |= vae_residual(f"{up}{i}.", *part)
            at = part[1]
        else:
            shapes |= layer(f"{up}{i}.resample.1", at // 2, at, 3, 3)
            shapes |= layer(f"{up}{i}.time_conv", 2 * at, at, 3, 1, 1) if part == 3 else {}
    return shapes


def vae_middle(name: str, width: int) -> Shapes:
    return {
        **vae_residual(f"{name}0.", width, width),
        f"{name}1.norm.gamma": (width, 1, 1),
        **layer(f"{name}1.to_qkv", 3 * width, width, 1, 1),
        **layer(f"{name}1.proj", width, width, 1, 1),
        **vae_residual(f"{name}2.", width, width),
    }


def vae_residual(name: str, given: int, out: int) -> Shapes:
    return {
        f"{name}residual.0.gamma": (given, 1, 1, 1),
        **layer(f"{name}residual.2", out, given, 3, 3, 3),
        f"{name}residual.3.gamma": (out, 1, 1, 1),
        **layer(f"{name}residual.6", out, out, 3, 3, 3),
        **(layer(f"{name}shortcut", out, given, 1, 1, 1) if given != out else {}),
    }


ONE_HEAD = json.dumps({"num_attention_heads": 1})
ONE_HEAD_ONE_BLOCK = json.dumps({"num_heads": 1, "num_blocks": 1})
WAN = TimeAxis("wan", "WAN21_T2V", Flow(8.0), wan())
OF_A_PICTURE = layer("patch_embedding", WIDTH, 36, 1, 2, 2) | {"img_emb.proj.0.bias": (1280,)}
WAN_OF_A_PICTURE = TimeAxis("wan_of_a_picture", "WAN21_I2V", Flow(8.0), wan() | OF_A_PICTURE)
KREA2 = TimeAxis("krea2", "Krea2", Flow(math.exp(1.15)), krea2(), is_new=True)
QWEN = TimeAxis("qwen", "QwenImage", Flow(math.exp(1.15)), qwen(), ONE_HEAD)
COSMOS = TimeAxis("cosmos", "CosmosT2IPredict2", EDM(0.002, 80.0), cosmos(), ONE_HEAD_ONE_BLOCK)
