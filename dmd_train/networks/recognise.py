"""What a file on disk is: layout, family, recipe, licence. A wrong file in one line.

The layout is read off key names and shapes. What weights cannot tell (DMD2's one-step and
four-step UNets are alike) is read off the recipe in the file's metadata, else off the name of a
published file; where neither tells, the recipe is None and `Found.summary` asks.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from textwrap import shorten
from typing import Literal

from ..errors import UserError, one_line
from ..families import FAMILIES, TITLES, TOLD_PROMPTS, of_width
from ..files.read import Shapes
from ..method.lora import OWN_KEY
from ..method.network import NETWORK_KEY
from ..method.recipe import LICENSE, Recipe, read_recipe
from .described import described
from .ldm_names import LDM
from .published import DMD2_LICENSE, is_dmd2, published_recipe

Kind = Literal["checkpoint", "LoRA"]
Layout = Literal[
    "our student",
    "our teacher",
    "diffusers UNet",
    "LDM UNet",
    "LDM single file",
    "diffusion model",
    "single file",
    "EDM class-conditional",
    "kohya LoRA",
    "PEFT LoRA",
]

CLASS_CONDITIONAL: tuple[Layout, ...] = ("our student", "our teacher", "EDM class-conditional")
"""Layouts of networks that are told a class."""

FOREIGN = {
    r"(real_unet|fake_unet|cls_pred_branch)\.": "DMD2's guidance network, which only training "
    "needs; its student is pytorch_model.bin",
    r".*\.base_layer\.": "a training state that mixes a model and its LoRA",
    r".*\.lora[_.]": "a LoRA for another model, or one that leaves cross-attention out",
    r".*\.(hada_w|lokr_w|oft_)": "a LyCORIS adapter",
    r"joint_blocks\.": "an SD3 model",
    r"(double_blocks|single_blocks|single_transformer_blocks)\.": "a Flux model",
    r"(transformer_blocks|blocks|layers)\.\d": "a diffusion transformer",
    r"(control_model|controlnet_|zero_convs|input_hint_block)": "a ControlNet",
    r"(text_model|text_encoders?|transformer\.resblocks|cond_stage_model|conditioner|"
    r"encoder\.block|shared\.weight|model\.layers)\b": "a text encoder",
    r"(first_stage_model|vae|encoder|decoder|quant_conv|post_quant_conv)\.": "a VAE",
}
"""Start of a key -> what has such keys. The first that matches names the file."""


@dataclass(frozen=True)
class Found:
    """What a file is. recipe: None where nothing in the file or its name tells."""

    kind: Kind
    layout: Layout
    family: str
    recipe: Recipe | None
    license: str
    text_encoder: bool = False
    vae: bool = False

    def summary(self, unknown: str = "which recipe?") -> str:
        """One line for the user: family, layout, steps, conditioning timesteps, licence.

        unknown: in place of the steps, where neither the file nor its name tells the recipe.
        """
        extra = [name for name, is_in in (("CLIP", self.text_encoder), ("VAE", self.vae)) if is_in]
        layout = self.layout + (f" with {' and '.join(extra)}" if extra else "")
        family = FAMILIES[self.family].title if self.family in FAMILIES else self.family
        license = shorten(self.license, 80)
        return one_line(f"{family}, {layout}: {self._steps or unknown}; licence {license}")

    @property
    def _steps(self) -> str:
        if self.recipe:
            return self.recipe.steps
        return "many steps" if self.layout == "our teacher" else ""


def recognise(
    shapes: Shapes,
    metadata: dict[str, str],
    name: str,
    wanted: Kind | None = None,
    elsewhere: str = "",
    ours: str = "that dmd_train wrote",
) -> Found:
    """The contents (see `peek`) of the file `name`: its path, for the hints of file and folder.

    elsewhere: the way out where it is of the other kind. ours: whose other LoRAs are taken.
    Raises UserError for anything else than `wanted`, naming the file and some of its keys.
    """
    if not shapes:
        raise UserError(f"{name}: empty, it holds no weights. Download or copy it again.")
    try:
        found = _recognise(shapes, metadata, name)
    except ValueError as error:
        raise UserError(f"{name}: {error}. Download or copy it again.") from None
    if found is None:
        raise _refusal(name, _foreign(shapes), shapes, f"Give {_accepted(wanted, ours)}.")
    if wanted not in (None, found.kind):
        raise _refusal(name, f"a {found.kind}, not a {wanted}", shapes, elsewhere)
    return found


def _recognise(shapes: Shapes, metadata: dict[str, str], name: str) -> Found | None:
    recipe = read_recipe(metadata, name)
    if NETWORK_KEY in metadata:
        network = described(metadata, name)
        layout: Layout = "our student" if recipe else "our teacher"
        license = recipe.license if recipe else network.license
        return Found("checkpoint", layout, network.family, recipe, license)
    told = recipe.family if recipe else None
    known = _of_comfyui(shapes, told) or _lora(shapes, told) or _edm(shapes) or _unet(shapes, told)
    if known is None:
        return None
    layout, family = known
    recipe = recipe or published_recipe(family, name)
    told_license = metadata.get("modelspec.license", "unknown")[:LICENSE]
    license = DMD2_LICENSE if is_dmd2(name) else told_license
    return Found(
        "LoRA" if "LoRA" in layout else "checkpoint",
        layout,
        family,
        recipe,
        recipe.license if recipe else license,
        text_encoder=_any_starts(shapes, "cond_stage_model.", "conditioner.", "text_encoders."),
        vae=_any_starts(shapes, "first_stage_model.", "vae."),
    )


def _of_comfyui(shapes: Shapes, told: str | None) -> tuple[Layout, str] | None:
    """A student of ours whose network ComfyUI alone has. told: the family by its own recipe."""
    if told is None or told in TOLD_PROMPTS:
        return None
    if all(OWN_KEY.fullmatch(key) for key in shapes):
        return "kohya LoRA", told
    if not _any_starts(shapes, LDM):
        return None
    alone = all(key.startswith(LDM) for key in shapes)
    return "diffusion model" if alone else "single file", told


def _lora(shapes: Shapes, told: str | None) -> tuple[Layout, str] | None:
    """A LoRA on cross-attention. told: the family by its own recipe, for models of other widths."""
    down = re.compile(r"attn2[._]to_k\.(lora_down|lora_A|lora\.down)(\.\w+)?\.weight$")
    if any(".base_layer." in key for key in shapes):
        return None
    widths = {_inputs(shapes, key) for key in shapes if down.search(key)}
    family = (of_width(widths.pop()) or told) if len(widths) == 1 else None
    if family is None:
        return None
    kohya = any(key.endswith(".lora_down.weight") for key in shapes)
    return "kohya LoRA" if kohya else "PEFT LoRA", family


def _edm(shapes: Shapes) -> tuple[Layout, str] | None:
    needed = ("model.map_label.weight", "model.map_layer0.weight", "model.out_conv.weight")
    if not all(key in shapes for key in needed) or not _any_starts(shapes, "model.enc."):
        return None
    is_imagenet = _inputs(shapes, needed[0]) == 1000 and "model.enc.64x64_conv.weight" in shapes
    return "EDM class-conditional", "edm-imagenet64" if is_imagenet else "edm-unet"


def _unet(shapes: Shapes, told: str | None) -> tuple[Layout, str] | None:
    """A UNet that makes its family's latents from text; inpainting ones read more channels."""
    own = _without_prefix(shapes)
    contexts = {_inputs(own, key) for key in own if key.endswith("attn2.to_k.weight")}
    layout: Layout
    if _any_starts(own, "up_blocks.") and "conv_out.weight" in own:
        layout, first, pooled = "diffusers UNet", "conv_in.weight", "add_embedding.linear_1.weight"
    elif _any_starts(own, "output_blocks."):
        alone = all(key.startswith(LDM) for key in shapes) or own is shapes
        layout = "LDM UNet" if alone else "LDM single file"
        first, pooled = "input_blocks.0.0.weight", "label_emb.0.0.weight"
    else:
        return None
    family = (of_width(contexts.pop(), pooled in own) or told) if len(contexts) == 1 else None
    if family is None or family not in TOLD_PROMPTS:
        return None
    if first not in own or _inputs(own, first) != TOLD_PROMPTS[family].latent_channels:
        return None
    return layout, family


def _inputs(shapes: Shapes, key: str) -> int:
    """How many numbers a layer reads. Raises ValueError for what is no layer's weight."""
    if len(shapes[key]) < 2:
        raise ValueError(f"its {key} has the shape {shapes[key]}, which is no layer's")
    return shapes[key][1]


def _foreign(shapes: Shapes) -> str:
    own = _without_prefix(shapes)
    for pattern, what in FOREIGN.items():
        if any(re.match(pattern, key) for key in own):
            return what
    if _any_starts(own, "up_blocks.", "output_blocks."):
        return "a UNet of another family, or for inpainting or editing"
    return "not a layout that is known here"


def _accepted(wanted: Kind | None, ours: str) -> str:
    checkpoint = (
        f"an {TITLES} checkpoint or UNet, DMD2's ImageNet-64 generator, or a file written by "
        "dmd_train"
    )
    lora = f"a kohya or PEFT LoRA for {TITLES}, or one {ours}"
    return {"checkpoint": checkpoint, "LoRA": lora, None: f"{checkpoint}; or {lora}"}[wanted]


def _refusal(name: str, what: str, keys: Iterable[str], way_out: str) -> UserError:
    listed = list(keys)
    some = dict.fromkeys((listed[0], listed[len(listed) // 2], listed[-1]))
    return UserError(f"{name}: {what} (keys such as {', '.join(some)}). {way_out}".rstrip())


def _any_starts(keys: Iterable[str], *prefixes: str) -> bool:
    return any(key.startswith(prefixes) for key in keys)


def _without_prefix(shapes: Shapes) -> Shapes:
    """The diffusion model of an LDM file, by its own names; any other file as it is."""
    own = {key[len(LDM) :]: shape for key, shape in shapes.items() if key.startswith(LDM)}
    return own or shapes
