"""The state of torch and of ComfyUI in which a node may train, and their own state afterwards."""

import contextlib
import gc
from collections.abc import Iterator

import comfy.model_management
import torch

IN_TRAINING = "in_training"
"""ComfyUI's switch, since 0.33, to differentiable code in the place of fused kernels."""


@contextlib.contextmanager
def training_mode(cpu_threads: int = 0) -> Iterator[None]:
    """A way out of ComfyUI's inference_mode: inside here, tensors can have gradients.

    Other models give their GPU memory back first, as ComfyUI cannot see what is trained.
    cpu_threads: torch's, for this long; 0 leaves them.
    """
    threads = torch.get_num_threads()
    flagged = hasattr(comfy.model_management, IN_TRAINING)
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    try:
        if flagged:
            setattr(comfy.model_management, IN_TRAINING, True)
        if cpu_threads:
            torch.set_num_threads(cpu_threads)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if flagged:
            setattr(comfy.model_management, IN_TRAINING, False)
        torch.set_num_threads(threads)
        gc.collect()
        comfy.model_management.soft_empty_cache()
