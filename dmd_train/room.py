"""Whether what is asked for can fit at all: lower bounds by arithmetic, before anything is made."""

import shutil
from pathlib import Path

import psutil
import torch

from .config import Config
from .errors import UserError
from .method.adapters import target_layers
from .method.network import Network

GIB = 1 << 30


def memory_of(device: torch.device) -> int:
    """Bytes that a device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


def disk_room(folder: Path) -> int:
    """Bytes free where the folder is, or will be."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def require_memory(told: str, needed: int, device: torch.device) -> None:
    """Raises UserError, which begins with `told`, where `needed` bytes are more than there are."""
    room = memory_of(device)
    if needed > room:
        raise UserError(
            f"{told} takes {needed / GIB:.1f} GiB of memory or more, and there are "
            f"{room / GIB:.1f}. Choose a smaller number."
        )


def require_room(config: Config, network: Network) -> None:
    """Refusal, a UserError, of a run that its batches or adapters alone make too large."""
    sample, device = 4 * torch.Size(network.shape).numel(), network.device
    require_memory(f"batch_size: {config.batch_size}", config.batch_size * sample, device)
    if config.needs_pairs:
        pairs = config.pair_batch_size * 2 * sample
        require_memory(f"pair_batch_size: {config.pair_batch_size}", pairs, device)
    if config.training == "lora":
        shapes = [layer.weight.shape for _, layer in target_layers(network)]
        a_rank = sum(shape[0] + shape[1:].numel() for shape in shapes)
        # of critic and student, values and gradients
        require_memory(f"lora_rank: {config.lora_rank}", config.lora_rank * a_rank * 16, device)


def require_disk_for_pairs(config: Config, network: Network, folder: Path) -> None:
    """Refusal, a UserError, of more pairs than the disk of their folder has room for."""
    _require_disk("pairs", config.pairs, 2, network, folder)  # noise and image


def require_disk_for_images(config: Config, count: int, network: Network, folder: Path) -> None:
    """The same of images, encoded."""
    _require_disk("images", count, 2 if config.flip_images else 1, network, folder)


def _require_disk(what: str, count: int, samples: int, network: Network, folder: Path) -> None:
    needed = count * samples * 2 * torch.Size(network.shape).numel()  # 2 bytes each
    made = sum(file.stat().st_size for file in folder.glob("shard-*"))
    room = disk_room(folder) + made
    if needed > room:
        raise UserError(
            f"{what}: {count} take {needed / GIB:.1f} GiB in {folder}, where there is room "
            f"for {room / GIB:.1f}. Choose fewer, or another output."
        )
