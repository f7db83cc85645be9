"""What a file says of a class-conditional network, so that it can be built again: bounded.

Anybody may have written it. Nothing is built of what is outside these bounds, which are far beyond
any network there is.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UserError
from ..method.network import NETWORK_KEY
from ..method.recipe import LICENSE, said

Channels = Annotated[int, Field(ge=1, le=1 << 16)]
Down = Literal[
    "DownBlock2D",
    "ResnetDownsampleBlock2D",
    "AttnDownBlock2D",
    "SkipDownBlock2D",
    "AttnSkipDownBlock2D",
]
Up = Literal[
    "UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D"
]
Resampling = Literal["conv", "resnet"]


class UNetSettings(BaseModel):
    """The arguments of diffusers' UNet2DModel that a class-conditional network may have."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    sample_size: int = Field(ge=1, le=4096)
    in_channels: Channels = 3
    out_channels: Channels = 3
    center_input_sample: bool = False
    time_embedding_type: Literal["positional", "fourier"] = "positional"
    time_embedding_dim: Channels | None = None
    freq_shift: int = Field(0, ge=0, le=1)
    flip_sin_to_cos: bool = True
    down_block_types: tuple[Down, ...] = Field((), min_length=1, max_length=16)
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"
    up_block_types: tuple[Up, ...] = Field((), min_length=1, max_length=16)
    block_out_channels: tuple[Channels, ...] = Field((), min_length=1, max_length=16)
    layers_per_block: int = Field(2, ge=1, le=64)
    mid_block_scale_factor: float = Field(1, gt=0, le=100)
    downsample_padding: int = Field(1, ge=0, le=1)
    downsample_type: Resampling = "conv"
    upsample_type: Resampling = "conv"
    dropout: float = Field(0.0, ge=0, lt=1)
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    attention_head_dim: Channels | None = 8
    norm_num_groups: Channels = 32
    attn_norm_num_groups: Channels | None = None
    norm_eps: float = Field(1e-5, gt=0, le=1)
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True
    class_embed_type: None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = Field(None, ge=1, le=100_000)


class Description(BaseModel):
    """What is under NETWORK_KEY. config: the settings of a network that has some."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    family: str = Field(max_length=100)
    license: str = Field(max_length=LICENSE)
    classes: int = Field(10, ge=1, le=1_000_000)
    sigma_data: float = Field(0.5, gt=0, le=1000)
    config: dict[str, Any] = Field({}, max_length=100)

    def unet(self, file: str) -> dict[str, Any]:
        """The arguments of UNet2DModel. Raises UserError, naming `file`, for others."""
        try:
            settings = UNetSettings.model_validate(self.config)
        except ValidationError as error:
            raise _damaged(file, error) from None
        return settings.model_dump(exclude_unset=True)


def described(metadata: dict[str, str], file: str) -> Description:
    """What a file with NETWORK_KEY says. Raises UserError for what is out of bounds."""
    try:
        return Description.model_validate_json(metadata[NETWORK_KEY])
    except ValidationError as error:
        raise _damaged(file, error) from None


def _damaged(file: str, error: ValidationError) -> UserError:
    return UserError(
        f"{file}: its metadata {NETWORK_KEY} is damaged ({said(error)}). Get the file again from "
        "its author."
    )
