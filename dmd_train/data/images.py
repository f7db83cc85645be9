"""Real images for the adversarial objective: pictures, encoded once into the network's scale."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files.shards import Shards, make_shards
from ..method.network import Condition, Network
from .conditions import Conditions
from .pairs import shard_size
from .pictures import Pictures, UnusablePictureError

NAMED = 3
"""Most pictures that a message names."""


class Images:
    """Real images, and what the network is told of each.

    shards: "x0" (N, C, H, W), "is_used" (N,). conditions, row: (N,) of them; None where nothing is
    known of the images.
    """

    def __init__(self, shards: Shards, row: Tensor | None, conditions: Conditions | None) -> None:
        self.shards, self.row, self.conditions = shards, row, conditions
        self.kept = shards.column("is_used").nonzero().flatten()

    def __len__(self) -> int:
        return len(self.kept)

    def draw(self, size: int, gen: torch.Generator) -> Tensor:
        """`size` random images by number, with replacement. `gen` is the CPU's."""
        return self.kept[torch.randint(len(self), (size,), generator=gen)]

    def take(self, numbers: Tensor, device: torch.device) -> Tensor:
        """x0 of these images, (B, C, H, W)."""
        return self.shards.take(numbers)["x0"].to(device).float()

    def condition(self, numbers: Tensor, device: torch.device) -> Condition | None:
        """What the network is told of these images; None where nothing is known of them."""
        if self.row is None or self.conditions is None:
            return None
        return self.conditions.take(self.row[numbers], device)


def make_images(
    folder: Path,
    pictures: Pictures,
    network: Network,
    flip: bool,
    origin: str,
    rank: int = 0,
    count: int = 1,
) -> Iterator[int]:
    """Encode pictures into `folder`, yielding how many are done. Goes on where it stopped.

    Image i is picture i; with `flip`, image 2 i is picture i and image 2 i + 1 its mirror image.
    One that cannot be used keeps its place. Stored in float16. `origin` names the teacher.
    """
    copies = 2 if flip else 1

    def make(numbers: range) -> dict[str, Tensor]:
        found = [_image(pictures, network, number // copies, number % copies) for number in numbers]
        nothing = torch.zeros(network.shape)
        return {
            "x0": torch.stack([nothing if x is None else x for x in found]).half(),
            "is_used": torch.tensor([x is not None for x in found]),
        }

    made_by = json.dumps([origin, pictures.name, flip, *network.shape])
    size, total = shard_size(network.shape), copies * len(pictures)
    for done in make_shards(folder, total, size, made_by, make, rank, count):
        yield done // copies


def _image(pictures: Pictures, network: Network, number: int, is_mirrored: int) -> Tensor | None:
    try:
        pixels = read_for(network, pictures, number)
    except UnusablePictureError:
        return None
    if is_mirrored:
        from kornia.geometry import hflip

        pixels = hflip(pixels)
    return network.encode(pixels[None].to(network.device))[0].cpu()


def read_for(network: Network, pictures: Pictures, number: int) -> Tensor:
    """A picture in the network's size and number of colours. Raises UnusablePictureError."""
    channels, height, width = network.shape
    of, side = (1 if channels == 1 else 3), network.downscale
    return pictures.read(number, side * height, side * width, of)


def unused(images: Shards, pictures: Pictures, network: Network) -> str | None:
    """A line on the pictures that cannot be used; None where all can.

    Raises UserError where none can.
    """
    is_used = images.column("is_used").view(len(pictures), -1)[:, 0]
    numbers = (~is_used).nonzero().flatten().tolist()
    if not numbers:
        return None
    reasons = "; ".join(_reason(pictures, network, number) for number in numbers[:NAMED])
    more = ", ..." if len(numbers) > NAMED else ""
    if len(numbers) == len(pictures):
        raise UserError(f"images: none of the {len(pictures)} can be used: {reasons}{more}")
    return f"images: {len(numbers)} of {len(pictures)} are not used: {reasons}{more}"


def _reason(pictures: Pictures, network: Network, number: int) -> str:
    try:
        read_for(network, pictures, number)
    except UnusablePictureError as error:
        return f"{pictures.called(number)} ({error})"
    return f"{pictures.called(number)} (not read before)"
