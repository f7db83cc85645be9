"""The engine's Network of a MODEL, asked directly; and weights, to see whether they change."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def pack(name: str) -> Any:
    """A module of the pack, which is imported under the path of its folder."""
    (module,) = (module for key, module in sys.modules.items() if key.endswith(f".{name}"))
    return module


class PredictX0:
    """mu(x_t, t, condition) of input/NAME.safetensors (x_t, t, row), its gradients, the pictures.

    settings: YAML over the preset. The gradients are those of mu's sum with respect to x_t.
    images: also what real images need, the pictures encoded again and the middle's features.
    """

    CATEGORY = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "predict"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "conditions": ("CONDITIONING",),
                "name": ("STRING", {"default": ""}),
                "settings": ("STRING", {"default": "", "multiline": True}),
            },
            "optional": {
                "negative": ("CONDITIONING",),
                "vae": ("VAE",),
                "images": ("BOOLEAN", {"default": False}),
            },
        }

    def predict(
        self,
        model: Any,
        conditions: Any,
        name: str,
        settings: str,
        negative: Any = None,
        vae: Any = None,
        images: bool = False,
    ) -> dict[str, Any]:
        from folder_paths import get_input_directory, get_output_directory

        values = {"teacher": "probe", "output": "probe"} | (yaml.safe_load(settings) or {})
        config = pack("dmd_train.config").make_config(values, "probe")
        wired = pack("nodes.wired").Wired(model, conditions, negative, vae=vae)
        given = load_file(Path(get_input_directory(), f"{Path(name).name}.safetensors"))
        canvas = pack("nodes.canvas_network")
        with pack("nodes.training_mode").training_mode():
            network = canvas.CanvasNetwork(wired, config, torch.device("cpu"))
            network.freeze()
            if config.gradient_checkpointing:
                network.checkpoint_gradients()
            x_t = given["x_t"].clone().requires_grad_()
            mu = network.predict_x0(x_t, given["t"].clone(), {"row": given["row"].clone()})
            mu.sum().backward()
            found = {"mu": mu.detach(), "gradient": x_t.grad, "image": network.to_images(mu)}
            if images:
                found["encoded"] = network.encode(found["image"])
                found["features"] = network.features(x_t, given["t"], {"row": given["row"]})
                found["features"] = found["features"].detach()
        whole = {key: value.clone().float().contiguous() for key, value in found.items()}
        save_file(whole, Path(get_output_directory(), f"{Path(name).name}.safetensors"))
        told = [network.family, network.prediction, *map(str, network.shape)]
        return {"ui": {"text": told}}


class ApplyModel:
    """ComfyUI's own estimate of x0 of input/NAME.safetensors (x: one batch; sigma: (B,)).

    As its samplers ask for it, one sample at a time, in the MODEL's axes.
    """

    CATEGORY = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "conditions": ("CONDITIONING",),
                "name": ("STRING", {"default": ""}),
            }
        }

    def apply(self, model: Any, conditions: Any, name: str) -> dict[str, Any]:
        import comfy.samplers
        from folder_paths import get_input_directory, get_output_directory

        given = load_file(Path(get_input_directory(), f"{Path(name).name}.safetensors"))
        found = []

        def look(denoise: Any, _x: Any, _sigmas: Any, extra_args: Any, **_: Any) -> torch.Tensor:
            for x, sigma in zip(given["x"].split(1), given["sigma"].split(1), strict=True):
                found.append(denoise(x, sigma, **extra_args))
            return found[-1]

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(conditions, conditions)
        guider.set_cfg(1.0)
        empty = torch.zeros_like(given["x"][:1])
        levels = torch.tensor([1.0, 0.0])
        guider.sample(empty, empty, comfy.samplers.KSAMPLER(look), levels, disable_pbar=True)
        file = Path(get_output_directory(), f"{Path(name).name}.safetensors")
        save_file({"x0": torch.cat(found).clone()}, file)
        return {}


class LoadNarrow:
    """Load Checkpoint, where ComfyUI knows an architecture by its published width alone.

    config: what it then takes for granted, as JSON.
    """

    CATEGORY = "probe"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "ckpt_name": ("STRING", {"default": ""}),
                "config": ("STRING", {"default": "{}"}),
            }
        }

    def load(self, ckpt_name: str, config: str) -> tuple[Any, ...]:
        import comfy.model_detection
        import comfy.sd
        from folder_paths import get_full_path_or_raise

        detect = comfy.model_detection.detect_unet_config

        def narrow(*args: Any, **kwargs: Any) -> dict[str, Any]:
            return detect(*args, **kwargs) | json.loads(config)

        path = get_full_path_or_raise("checkpoints", ckpt_name)
        with mock.patch.object(comfy.model_detection, "detect_unet_config", narrow):
            return tuple(comfy.sd.load_checkpoint_guess_config(path)[:3])


class PreviewColours:
    """How many levels of 255 our colours of random latents are from ComfyUI's own previews."""

    CATEGORY = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "compare"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"latent_format": ("STRING", {"default": "SD15"})}}

    def compare(self, latent_format: str) -> dict[str, Any]:
        import comfy.latent_formats
        from latent_preview import Latent2RGBPreviewer

        kind = getattr(comfy.latent_formats, latent_format)()
        random = torch.Generator().manual_seed(0)
        x0 = torch.randn(1, kind.latent_channels, 4, 6, generator=random)
        latents = pack("nodes.latents")
        colours = latents.preview_colours(kind, x0)[0]
        previewer = Latent2RGBPreviewer(
            kind.latent_rgb_factors, kind.latent_rgb_factors_bias, kind.latent_rgb_factors_reshape
        )
        preview = previewer.decode_latent_to_preview(latents.as_latent(kind, x0))
        ours = (colours + 1) / 2 * 255
        theirs = torch.from_numpy(np.array(preview)).movedim(-1, 0).float()
        return {"ui": {"text": [str(float((ours - theirs).abs().max())), str(preview.size)]}}


class Weights:
    """SHA-256 of a MODEL's weights as they lie in memory, once `after` is there."""

    CATEGORY = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "tell"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL",), "nonce": ("INT", {"default": 0})},
            "optional": {"after": ("*",)},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: dict[str, str]) -> bool:
        return True

    def tell(self, model: Any, nonce: int, after: Any = None) -> dict[str, Any]:
        import comfy.model_management

        comfy.model_management.unload_all_models()
        digest = hashlib.sha256()
        for value in model.model.diffusion_model.state_dict().values():
            digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
        return {"ui": {"text": [digest.hexdigest()]}}


class Memory:
    """Bytes that the server's process holds, after what nobody needs is given back."""

    CATEGORY = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "tell"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"nonce": ("INT", {"default": 0})}}

    def tell(self, nonce: int) -> dict[str, Any]:
        import ctypes
        import gc

        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free, the allocator may still hold
        return {"ui": {"text": [psutil.Process().memory_info().rss]}}


class OutOfMemory:
    """A MODEL whose network finds no memory at its N-th call."""

    CATEGORY = "probe"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "call": ("INT", {"default": 1, "min": 1})}}

    def make(self, model: Any, call: int) -> tuple[Any]:
        calls = 0

        def run(network: Any, arguments: dict[str, Any]) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == call:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return network(arguments["input"], arguments["timestep"], **arguments["c"])

        tight = model.clone()
        tight.set_model_unet_function_wrapper(run)
        return (tight,)


class Prompts:
    """What DMD Prompts gives, of encodings in input/NAME.safetensors; the last is the negative.

    text: (N, 77, D); pooled: (N, P), of SDXL. The prompts are in the metadata, as YAML.
    """

    CATEGORY = "probe"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {"default": "prompts"})}}

    def load(self, name: str) -> tuple[list[Any], list[Any]]:
        from folder_paths import get_input_directory

        file = Path(get_input_directory(), f"{Path(name).name}.safetensors")
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            prompts = yaml.safe_load(opened.metadata()["prompts"])
        entries = []
        for i, prompt in enumerate(prompts):
            options = {"dmd_prompt": prompt}
            if "pooled" in tensors:
                options["pooled_output"] = tensors["pooled"][i : i + 1]
            entries.append([tensors["text"][i : i + 1], options])
        return (entries[:-1], entries[-1:])


class NoLayers:
    """A MODEL whose network has no linear layer, nor a convolution, by its type."""

    CATEGORY = "probe"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def make(self, model: Any) -> tuple[Any]:
        class Quantised(torch.nn.Module):
            def __init__(self, linear: Any) -> None:
                super().__init__()
                self.weight, self.bias = linear.weight, linear.bias

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.linear(x, self.weight, self.bias)

        bare = model.clone()
        for name, layer in model.model.diffusion_model.named_modules():
            if isinstance(layer, torch.nn.Linear):
                bare.add_object_patch(f"diffusion_model.{name}", Quantised(layer))
        return (bare,)


class SmallDevice:
    """A MODEL after which the device has one MiB, until it is asked once."""

    CATEGORY = "probe"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def make(self, model: Any) -> tuple[Any]:
        import comfy.model_management as management

        truly = management.get_total_memory

        def once(*_: Any) -> int:
            management.get_total_memory = truly
            return 1 << 20

        management.get_total_memory = once
        return (model,)


NODES = {
    "Probe_NoLayers": NoLayers,
    "Probe_SmallDevice": SmallDevice,
    "Probe_Prompts": Prompts,
    "Probe_PredictX0": PredictX0,
    "Probe_ApplyModel": ApplyModel,
    "Probe_LoadNarrow": LoadNarrow,
    "Probe_PreviewColours": PreviewColours,
    "Probe_Weights": Weights,
    "Probe_Memory": Memory,
    "Probe_OutOfMemory": OutOfMemory,
}
