"""Inputs that several nodes have, and the sockets of types that ComfyUI has no word for."""

import comfy.samplers
from comfy_api.latest import io

PAIRS = io.Custom("DMD_PAIRS")
"""A `TeacherPairs`, from DMD Teacher Pairs to DMD Distill."""

IMAGES = io.Custom("DMD_IMAGES")
"""A `RealImages`, from DMD Real Images to DMD Distill."""

LORA_MODEL, LOSS_MAP = io.Custom("LORA_MODEL"), io.Custom("LOSS_MAP")
"""What ComfyUI's own Save LoRA Weights and Plot Loss Graph take."""


def side_inputs() -> list[io.Input]:
    """Width and height."""
    return [
        io.Int.Input(
            side,
            default=0,
            min=0,
            max=16384,
            step=8,
            tooltip="In pixels. 0: the size the model was made for.",
        )
        for side in ("width", "height")
    ]


def size_inputs() -> list[io.Input]:
    """Width, height and batch size."""
    batch = io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Pictures at once.")
    return [*side_inputs(), batch]


def steps_input(name: str, most: int, tooltip: str) -> io.Input:
    """KSampler's steps, of a teacher."""
    return io.Int.Input(name, default=30, min=1, max=most, tooltip=tooltip)


def cfg_input(least: float, tooltip: str) -> io.Input:
    """KSampler's cfg, of a teacher."""
    return io.Float.Input("cfg", default=7.5, min=least, max=100.0, step=0.1, tooltip=tooltip)


def sampler_inputs(sampler_tooltip: str, scheduler_tooltip: str) -> list[io.Input]:
    """KSampler's sampler_name and scheduler, of a teacher."""
    known = comfy.samplers.KSampler
    return [
        io.Combo.Input(
            "sampler_name", options=known.SAMPLERS, default="dpmpp_2m", tooltip=sampler_tooltip
        ),
        io.Combo.Input(
            "scheduler", options=known.SCHEDULERS, default="karras", tooltip=scheduler_tooltip
        ),
    ]
