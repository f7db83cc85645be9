"""Gradient checkpointing of ComfyUI's networks, whose blocks write into what they are given."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint


def recompute_blocks(module: nn.Module, checkpoint: Callable[..., Any] | None = None) -> None:
    """Has every block computed again in the backward, by `checkpoint`, else by torch's own."""
    recompute = checkpoint or partial(torch_checkpoint, use_reentrant=False)
    for block in _blocks(module):
        if getattr(block.forward, "func", None) is not _recomputed:  # two adapters ask twice
            block.forward = partial(_recomputed, recompute, block.forward)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of a network, in whose backward their forward is computed again."""
    blocks = []
    for child in module.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            blocks += list(block) if isinstance(block, nn.Sequential) else [block]
    return blocks


def _recomputed(
    checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """A block under `checkpoint`, computed both times from what it is given now.

    Blocks add to their input in place, and networks write into their options between blocks.
    """

    def compute(*args: Any, **kwargs: Any) -> Any:
        return forward(*map(_copied, args), **{key: _copied(v) for key, v in kwargs.items()})

    args = tuple(dict(arg) if isinstance(arg, dict) else arg for arg in args)
    kwargs = {key: dict(arg) if isinstance(arg, dict) else arg for key, arg in kwargs.items()}
    return checkpoint(compute, *args, **kwargs)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value)
    return value.clone() if isinstance(value, Tensor) else value
