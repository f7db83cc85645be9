"""The gradient of a fused kernel, which ComfyUI's Cosmos Predict2 and Anima call in training too.

Other networks leave the kernel out where ComfyUI says that it trains (`training_mode`).
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

KERNEL = "comfy_kitchen::rms_rope_split_half"
"""Normed queries and keys, turned by their positions. comfy-kitchen gives it no backward."""


@cache
def give_gradient() -> None:
    """Tells torch the kernel's backward. Older ComfyUIs have no such kernel, and need none."""
    try:
        from comfy_kitchen.backends.eager.rope import rms_rope_split_half
    except ImportError:
        return

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, turns, q_scale, k_scale, *ctx.numbers = inputs
        ctx.save_for_backward(q, k, turns, q_scale, k_scale)

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """By the kernel's own plain code, computed again from what it was given."""
        needs: tuple[bool, ...] = ctx.needs_input_grad
        given: list[Any] = [x if x is None else x.detach() for x in ctx.saved_tensors]
        wanted = [x for x, is_wanted in zip(given, needs, strict=False) if is_wanted]
        for x in wanted:
            x.requires_grad_()
        with torch.enable_grad():
            outputs = rms_rope_split_half(*given, *ctx.numbers)
        moved = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        of, upstream = zip(*moved, strict=True)
        found = iter(torch.autograd.grad(of, wanted, upstream))
        return tuple(next(found) if is_wanted else None for is_wanted in needs)

    torch.library.register_autograd(KERNEL, backward, setup_context=keep)
