"""Nodes that only the tests load: a condition without a text encoder, exact latents in and out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file

from .canvas import NODES as CANVAS_NODES
from .conditions import CONDITION_NODES
from .student import ShowText, Student


def condition(seed: int, width: int) -> torch.Tensor:
    """What Probe_Conditioning gives: (1, 77, width) float32, or for tests to compute beside it."""
    return torch.randn(1, 77, width, generator=torch.Generator().manual_seed(seed))


def pooled_condition(seed: int, width: int) -> torch.Tensor:
    """The pooled text vector beside it: (1, width) float32."""
    return torch.randn(1, width, generator=torch.Generator().manual_seed(seed + 1))


class Conditioning:
    """A condition from a seed: the tiny checkpoints have no text encoder, which does not shrink."""

    CATEGORY = "probe"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**31}),
                "width": ("INT", {"default": 768, "min": 1}),  # SD 1.x 768, SD 2.x 1024, SDXL 2048
                "pooled_width": ("INT", {"default": 0, "min": 0}),  # SDXL 1280; 0: none
            }
        }

    def make(self, seed: int, width: int, pooled_width: int) -> tuple[list[Any]]:
        extra = {"pooled_output": pooled_condition(seed, pooled_width)} if pooled_width else {}
        return ([[condition(seed, width), extra]],)


class LoadConditioning:
    """Read a text encoder's output, {"text", "pooled" for SDXL}, from input/NAME.safetensors."""

    CATEGORY = "probe"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {"default": "condition"})}}

    def load(self, name: str) -> tuple[list[Any]]:
        from folder_paths import get_input_directory

        whole = load_file(_inside(get_input_directory(), name))
        extra = {"pooled_output": whole["pooled"]} if "pooled" in whole else {}
        return ([[whole["text"], extra]],)


class SaveConditioning:
    """Write a condition's text as float32 to output/NAME.safetensors, under the key `text`."""

    CATEGORY = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "conditioning": ("CONDITIONING",),
                "name": ("STRING", {"default": "condition"}),
            }
        }

    def save(self, conditioning: list[Any], name: str) -> dict[str, Any]:
        from folder_paths import get_output_directory

        ((text, _),) = conditioning
        save_file({"text": text.float().contiguous()}, _inside(get_output_directory(), name))
        return {}


class SaveLatent:
    """Write a latent's samples as float32 to output/NAME.safetensors, under the key `samples`."""

    CATEGORY = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"latent": ("LATENT",), "name": ("STRING", {"default": "latent"})}}

    def save(self, latent: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
        from folder_paths import get_output_directory

        file = _inside(get_output_directory(), name)
        save_file({"samples": latent["samples"].float().contiguous()}, file)
        return {"ui": {"files": [{"filename": file.name, "subfolder": "", "type": "output"}]}}


class LoadLatent:
    """Read input/NAME.safetensors, as SaveLatent writes it, without ComfyUI's rescaling."""

    CATEGORY = "probe"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {"default": "latent"})}}

    def load(self, name: str) -> tuple[dict[str, torch.Tensor]]:
        from folder_paths import get_input_directory

        return (load_file(_inside(get_input_directory(), name)),)


class StepNoise:
    """What the samplers add after step 1, 2, ... of a run with this seed, one after another."""

    CATEGORY = "probe"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "draw"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "latent": ("LATENT",),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**31}),
                "count": ("INT", {"default": 1, "min": 1}),
            }
        }

    def draw(self, latent: dict[str, Any], seed: int, count: int) -> tuple[dict[str, torch.Tensor]]:
        from comfy.k_diffusion.sampling import default_noise_sampler

        sampler = default_noise_sampler(latent["samples"].cpu(), seed=seed)
        return ({"samples": torch.cat([sampler(None, None) for _ in range(count)])},)


class Watch:
    """A MODEL that counts the calls of its network under a name, and takes a while over each.

    Over the first, as networks that warm up do, two seconds more.
    """

    CATEGORY = "probe"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "watch"
    CALLS: ClassVar[dict[str, int]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "name": ("STRING", {"default": ""}),
                "seconds": ("FLOAT", {"default": 0.0, "min": 0.0}),
            }
        }

    def watch(self, model: Any, name: str, seconds: float) -> tuple[Any]:
        def call(network: Any, arguments: dict[str, Any]) -> torch.Tensor:
            self.CALLS[name] = self.CALLS.get(name, 0) + 1
            time.sleep(seconds + 2 * (self.CALLS[name] == 1) * bool(seconds))
            return network(arguments["input"], arguments["timestep"], **arguments["c"])

        watched = model.clone()
        watched.set_model_unet_function_wrapper(call)
        return (watched,)


class Calls:
    """How often the MODEL watched under this name was called, once `latent` is there."""

    CATEGORY = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "tell"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"name": ("STRING", {"default": ""})},
            "optional": {"latent": ("LATENT",)},
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return float("nan")

    def tell(self, name: str, latent: Any = None) -> dict[str, Any]:
        return {"ui": {"calls": [Watch.CALLS.get(name, 0)]}}


class Sigmas:
    """An end for a prompt that only makes SIGMAS; shows them."""

    CATEGORY = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "tell"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"sigmas": ("SIGMAS",)}}

    def tell(self, sigmas: torch.Tensor) -> dict[str, Any]:
        return {"ui": {"sigmas": sigmas.tolist()}}


class UnetNames:
    """ComfyUI's own table of a UNet of these shapes: diffusers' name of a weight -> LDM's."""

    CATEGORY = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "tell"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"shapes": ("STRING", {"default": "{}"})}}

    def tell(self, shapes: str) -> dict[str, Any]:
        from comfy.model_detection import model_config_from_unet
        from comfy.utils import unet_to_diffusers

        state = {k: torch.empty(shape, device="meta") for k, shape in json.loads(shapes).items()}
        config = model_config_from_unet(state, "model.diffusion_model.").unet_config
        return {"ui": {"names": [unet_to_diffusers(config)]}}


class Anything(str):
    """A type that validation takes for any other, as many packs have one."""

    def __ne__(self, other: object) -> bool:
        return False


class Any_:
    """A text that goes into any socket, past the list of a combo box."""

    CATEGORY = "probe"
    RETURN_TYPES = (Anything("*"),)
    FUNCTION = "give"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"text": ("STRING", {"default": ""})}}

    def give(self, text: str) -> tuple[str]:
        return (text,)


def _inside(folder: str, name: str) -> Path:
    """A prompt names a file, never a place: this server also answers to a browser."""
    file = Path(folder, f"{name}.safetensors")
    if file.parent != Path(folder):
        raise ValueError(f"{name!r} is not a plain file name")
    return file


NODE_CLASS_MAPPINGS = (
    {
        "Probe_Conditioning": Conditioning,
        "Probe_LoadConditioning": LoadConditioning,
        "Probe_SaveConditioning": SaveConditioning,
        "Probe_SaveLatent": SaveLatent,
        "Probe_LoadLatent": LoadLatent,
        "Probe_StepNoise": StepNoise,
        "Probe_Watch": Watch,
        "Probe_Calls": Calls,
        "Probe_Sigmas": Sigmas,
        "Probe_UnetNames": UnetNames,
        "Probe_Any": Any_,
        "Probe_Student": Student,
        "Probe_ShowText": ShowText,
    }
    | CONDITION_NODES
    | CANVAS_NODES
)
