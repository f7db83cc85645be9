"""Nodes that only benchmarks/sampler.py loads: a bare network call, timed, and a count of calls."""

import time
from typing import Any

import comfy.model_management
import torch

SPENT = {"seconds": 0.0, "calls": 0.0, "images": 0.0}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class CountCalls:
    """The MODEL with a clock around its network."""

    CATEGORY, FUNCTION, RETURN_TYPES = "bench", "wrap", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def wrap(self, model: Any) -> tuple[Any]:
        def timed(apply: Any, call: dict[str, Any]) -> torch.Tensor:
            start = now()
            output: torch.Tensor = apply(call["input"], call["timestep"], **call["c"])
            SPENT["seconds"] += now() - start
            SPENT["calls"] += 1
            SPENT["images"] += len(call["input"])
            return output

        counted = model.clone()
        counted.set_model_unet_function_wrapper(timed)
        return (counted,)


class Sink:
    """The end of a graph: reports the calls counted since the last report."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "bench", "report", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",)}}

    def report(self, image: torch.Tensor) -> dict[str, Any]:
        spent = dict(SPENT)
        SPENT.update(seconds=0.0, calls=0.0, images=0.0)
        return {"ui": {"spent": [spent]}}


class BareCall:
    """One network call and one decode, with nothing around them."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "bench", "call", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "positive": ("CONDITIONING",),
                "vae": ("VAE",),
                "size": ("INT", {"default": 512, "max": 4096}),
                "seed": ("INT", {"default": 0}),
            }
        }

    def call(self, model: Any, positive: Any, vae: Any, size: int, seed: int) -> dict[str, Any]:
        comfy.model_management.load_models_gpu([model])
        device = comfy.model_management.get_torch_device()
        network = model.model
        x = torch.randn(1, 4, size // 8, size // 8, device=device)
        sigma = network.model_sampling.sigma_max.reshape(1).to(device)
        context = positive[0][0].to(device)
        start = now()
        latent = network.apply_model(x * sigma, sigma, c_crossattn=context)
        called = now()
        vae.decode(network.process_latent_out(latent))
        return {"ui": {"seconds": [{"network": called - start, "decode": now() - called}]}}


NODE_CLASS_MAPPINGS = {
    "Bench_CountCalls": CountCalls,
    "Bench_Sink": Sink,
    "Bench_BareCall": BareCall,
}
