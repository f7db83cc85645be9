"""The text encoders of single-file checkpoints: their names, their shapes, and the way back.

As wide as the real ones, one or two layers deep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

Shapes = dict[str, tuple[int, ...]]

TOKENS, LENGTH = 49408, 77
PARTS = {
    768: [("cond_stage_model.transformer.text_model.", 768, 1)],
    1024: [("cond_stage_model.model.", 1024, 2)],
    2048: [
        ("conditioner.embedders.0.transformer.text_model.", 768, 2),
        ("conditioner.embedders.1.model.", 1280, 2),
    ],
}
"""Width of the text context -> its text encoders: (prefix, width, layers)."""

OPENCLIP = {
    "token_embedding.": "embeddings.token_embedding.",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.": "final_layer_norm.",
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
"""OpenCLIP's names -> transformers'."""


def clip_shapes(context: int) -> Shapes:
    """What a file holds for a text context of this width, less `position_ids`."""
    shapes: Shapes = {}
    for prefix, width, layers in PARTS[context]:
        own = _openai(width, layers) if width == 768 else _openclip(width, layers)
        shapes |= {prefix + key: shape for key, shape in own.items()}
    return shapes


def position_ids(context: int) -> dict[str, Tensor]:
    """A constant that OpenAI's models carry along."""
    return {
        f"{prefix}embeddings.position_ids": torch.arange(LENGTH)[None]
        for prefix, width, _ in PARTS[context]
        if width == 768
    }


def _openai(width: int, layers: int) -> Shapes:
    shapes: Shapes = {
        "embeddings.token_embedding.weight": (TOKENS, width),
        "embeddings.position_embedding.weight": (LENGTH, width),
    } | _both("final_layer_norm.", width)
    for layer in range(layers):
        own = f"encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _both(f"{own}self_attn.{name}.", width, width)
        shapes |= _both(f"{own}mlp.fc1.", 4 * width, width) | _both(f"{own}layer_norm1.", width)
        shapes |= _both(f"{own}mlp.fc2.", width, 4 * width) | _both(f"{own}layer_norm2.", width)
    return shapes


def _openclip(width: int, layers: int) -> Shapes:
    shapes: Shapes = {
        "token_embedding.weight": (TOKENS, width),
        "positional_embedding": (LENGTH, width),
        "text_projection": (width, width),
        "logit_scale": (),
    } | _both("ln_final.", width)
    for layer in range(layers):
        own = f"transformer.resblocks.{layer}."
        shapes |= _both(f"{own}attn.in_proj_", 3 * width, width)
        shapes |= _both(f"{own}attn.out_proj.", width, width)
        shapes |= _both(f"{own}mlp.c_fc.", 4 * width, width) | _both(f"{own}ln_1.", width)
        shapes |= _both(f"{own}mlp.c_proj.", width, 4 * width) | _both(f"{own}ln_2.", width)
    return shapes


def _both(name: str, *shape: int) -> Shapes:
    return {f"{name}weight": shape, f"{name}bias": shape[:1]}


def as_transformers(weights: dict[str, Tensor], context: int) -> list[Any]:
    """The text encoders of a file's weights, in float32, as their diffusers pipeline has them."""
    return [_model(weights, context, *part) for part in PARTS[context]]


def _model(weights: dict[str, Tensor], context: int, prefix: str, width: int, layers: int) -> Any:
    own = {
        key.removeprefix(prefix): value.float()
        for key, value in weights.items()
        if key.startswith(prefix) and not key.endswith(("position_ids", "logit_scale"))
    }
    if width != 768:
        own = _from_openclip(own)
    if context == 1024:  # SD 2 stops before the last layer
        layers -= 1
        own = {key: value for key, value in own.items() if f"layers.{layers}." not in key}
    projection = own.pop("text_projection.weight", None)
    config = CLIPTextConfig(
        vocab_size=TOKENS,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads={768: 12, 1024: 16, 1280: 20}[width],
        hidden_act="quick_gelu" if width == 768 else "gelu",
        bos_token_id=49406,
        eos_token_id=49407,
    )
    with torch.device("meta"):
        model: Any = (CLIPTextModelWithProjection if width == 1280 else CLIPTextModel)(config)
    body = getattr(model, "text_model", model)
    body.load_state_dict(own, assign=True)
    body.embeddings.position_ids = torch.arange(LENGTH)[None]
    if width == 1280:
        model.text_projection.load_state_dict({"weight": projection}, assign=True)
    return model.eval()


def _from_openclip(own: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {"text_projection.weight": own["text_projection"].T.contiguous()}
    for key, value in own.items():
        if ".attn.in_proj_" in key:
            layer, kind = key.removeprefix("transformer.resblocks.").split(".attn.in_proj_")
            for name, third in zip("qkv", value.chunk(3), strict=True):
                renamed[f"encoder.layers.{layer}.self_attn.{name}_proj.{kind}"] = third.clone()
        elif key != "text_projection":
            for theirs, name in OPENCLIP.items():
                key = key.replace(theirs, name)
            renamed[key] = value
    return renamed
