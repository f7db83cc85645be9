"""What the configs of a diffusers folder may say: what sizes follow from is bounded.

Anybody may have written them. The rest goes to diffusers as it is, which builds without memory and
is then held against the weights.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UserError
from ..method.recipe import said

LONGEST = 1 << 20
"""Bytes of a config; those of published pipelines have a few thousand."""

Count = Annotated[int, Field(ge=0, le=128)]
Counts = Annotated[tuple[Count, ...], Field(max_length=16)]
Blocks = Annotated[tuple[str, ...], Field(max_length=16)]


class Settings(BaseModel):
    """A config. What is not named here is kept."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    def values_(self) -> dict[str, Any]:
        """All that the file says, under its names there."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class UNetSettings(Settings):
    """unet/config.json."""

    sample_size: Annotated[int, Field(ge=1, le=1024)] | list[int] | None = None
    down_block_types: Blocks = ()
    up_block_types: Blocks = ()
    layers_per_block: Count | Counts = 2
    transformer_layers_per_block: Count | tuple[Count | Counts, ...] = 1
    reverse_transformer_layers_per_block: tuple[Count | Counts, ...] | None = None


class VAESettings(Settings):
    """vae/config.json."""

    class_name: Literal["AutoencoderKL", "AutoencoderTiny"] = Field(alias="_class_name")
    down_block_types: Blocks = ()
    up_block_types: Blocks = ()
    block_out_channels: Annotated[tuple[int, ...], Field(min_length=1, max_length=8)] | None = None
    layers_per_block: Count = 1
    num_encoder_blocks: Counts = ()
    num_decoder_blocks: Counts = ()
    scaling_factor: float | None = Field(None, gt=0, le=1000)


class TextSettings(Settings):
    """text_encoder/config.json: of it, what a CLIP text model is made of."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    vocab_size: int = Field(49408, ge=1, le=10_000_000)
    hidden_size: int = Field(512, ge=1, le=1 << 16)
    intermediate_size: int = Field(2048, ge=1, le=1 << 20)
    projection_dim: int = Field(512, ge=1, le=1 << 16)
    num_hidden_layers: int = Field(12, ge=1, le=128)
    num_attention_heads: int = Field(8, ge=1, le=1024)
    max_position_embeddings: int = Field(77, ge=77, le=10_000)
    hidden_act: str = Field("quick_gelu", max_length=100)
    layer_norm_eps: float = Field(1e-5, gt=0, le=1)
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None


class SchedulerSettings(Settings):
    """scheduler/scheduler_config.json."""

    prediction_type: str = "epsilon"


Kind = TypeVar("Kind", bound=Settings)


def read_config(path: Path, kind: type[Kind]) -> Kind:
    """A config of this kind. Raises UserError for what is none."""
    again = "Download the whole pipeline again."
    if not os.path.isfile(path):
        raise UserError(f"{path}: missing. {again}")
    with path.open("rb") as file:
        text = file.read(LONGEST + 1)
    if len(text) > LONGEST:
        raise UserError(f"{path}: damaged (more than {LONGEST} bytes). {again}")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{path}: damaged ({said(error)}). {again}") from None
