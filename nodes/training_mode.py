"""The state of torch and of ComfyUI in which a node may train, and their own state afterwards."""

import contextlib
import gc
from collections.abc import Iterator

import comfy.model_management
import torch


@contextlib.contextmanager
def training_mode(cpu_threads: int = 0) -> Iterator[None]:
    """ComfyUI runs nodes under inference_mode; inside here, tensors can have gradients.

    Other models give their GPU memory back first, as ComfyUI cannot see what is trained.
    cpu_threads: torch's, for this long; 0 leaves them.
    """
    threads = torch.get_num_threads()
    # of 0.33: differentiable code in the place of fused kernels
    flagged = hasattr(comfy.model_management, "in_training")
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    try:
        if flagged:
            comfy.model_management.in_training = True
        if cpu_threads:
            torch.set_num_threads(cpu_threads)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if flagged:
            comfy.model_management.in_training = False
        torch.set_num_threads(threads)
        gc.collect()
        comfy.model_management.soft_empty_cache()
