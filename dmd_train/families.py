"""The families of networks, a row each: all that is known of one besides how its files are read.

To add a family is to add a row here, and a reader to networks/. Whatever is no row is a family that
ComfyUI alone has.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .method.noise import Prediction

UNET_LAYERS = (
    r".*\.(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2|"
    r"conv_shortcut|downsamplers\.0\.conv|upsamplers\.0\.conv|time_emb_proj)"
)
"""Of a Stable Diffusion UNet, those that adapters go on, by diffusers' names (DMD2 B.5)."""


@dataclass(frozen=True)
class Family:
    """One family. What is said of latents and texts is for those that have them."""

    name: str
    """In recipes, in the metadata of files and in the code."""

    title: str
    """In messages."""

    presets: tuple[str, ...]
    """Of training, for this family; the first is the one for one consumer GPU."""

    text_width: int = 0
    """Of the text that cross-attention reads: its files, LoRAs too, are recognised by it."""

    pooled: bool = False
    """Whether it is also told one embedding of the whole text."""

    text_encoders: tuple[Literal["openai", "openclip"], ...] = ()
    """Those whose outputs lie side by side in that width; the last one's embedding is pooled."""

    latent_channels: int = 0
    downscale: int = 1
    """Pixels a side that one latent stands for."""

    latent_scale: float = 1.0
    """What the VAE's latents are multiplied by for the network."""

    size: int = 0
    """Pixels a side that it was made for."""

    size_of_v: int = 0
    """The same of those that predict v, where it is another."""

    lora_layers: str = r".*"
    """A regular expression for the names of the layers that adapters go on."""

    lora_metadata: Mapping[str, str] = field(default_factory=dict)
    """By which A1111 and Forge list a LoRA; one that says nothing is for SD 1 to them."""

    comfy: tuple[str, ...] = ()
    """The classes of comfy.supported_models that are of it."""

    def native_size(self, prediction: Prediction) -> int:
        """Pixels a side that a model of it was made for; 0 where each has its own."""
        return self.size_of_v if prediction == "v" and self.size_of_v else self.size


FAMILIES = {
    family.name: family
    for family in (
        Family("digits", "digits", ("digits-one-step",)),
        Family("edm-unet", "edm-unet", ("digits-one-step",)),
        Family("edm-imagenet64", "ImageNet-64", ("digits-one-step",)),
        Family(
            "sd1",
            "SD 1.x",
            (
                "sd15-one-step-lora",
                "sd15-four-step-lora",
                "sd15-two-step-lora",
                "sd15-one-step-full",
                "sd15-paper",
                "sd15-dmd2",
            ),
            text_width=768,
            text_encoders=("openai",),
            latent_channels=4,
            downscale=8,
            latent_scale=0.18215,
            size=512,
            lora_layers=UNET_LAYERS,
            lora_metadata={"ss_base_model_version": "sd_v1"},
            comfy=("SD15",),
        ),
        Family(
            "sd2",
            "SD 2.x",
            ("sd2-one-step-lora", "sd2-one-step-full"),
            text_width=1024,
            text_encoders=("openclip",),
            latent_channels=4,
            downscale=8,
            latent_scale=0.18215,
            size=512,
            size_of_v=768,
            lora_layers=UNET_LAYERS,
            lora_metadata={"ss_base_model_version": "sd_v2", "ss_v2": "True"},
            comfy=("SD20", "SD21UnclipL", "SD21UnclipH"),
        ),
        Family(
            "sdxl",
            "SDXL",
            ("sdxl-one-step-lora", "sdxl-four-step-lora", "sdxl-one-step-full"),
            text_width=2048,
            pooled=True,
            text_encoders=("openai", "openclip"),
            latent_channels=4,
            downscale=8,
            latent_scale=0.13025,
            size=1024,
            lora_layers=UNET_LAYERS,
            lora_metadata={"ss_base_model_version": "sdxl_base_v1-0"},
            comfy=("SDXL", "SSD1B", "Segmind_Vega"),
        ),
    )
}

TOLD_PROMPTS = {name: family for name, family in FAMILIES.items() if family.text_encoders}
*_MOST, _LAST = (family.title for family in TOLD_PROMPTS.values())
TITLES = f"{', '.join(_MOST)} or {_LAST}"
"""Of those that are told prompts, for a message: "SD 1.x, SD 2.x or SDXL"."""


def of_width(width: int, pooled: bool | None = None) -> str | None:
    """The family that reads texts of this width. pooled: None where the file cannot tell."""
    for name, family in TOLD_PROMPTS.items():
        if family.text_width == width and pooled in (None, family.pooled):
            return name
    return None
