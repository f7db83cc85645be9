"""Sheets of pictures: tensors as pixels, pictures in a grid, grids under captions."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..files.write import write_atomically

COLUMNS = 10
"""Pictures in a row of a sheet: ten classes."""

LABEL_HEIGHT, LABELS_ACROSS = 16, 40
"""Pixels of a caption: at least 16, and a 40th of the width, so that it is read on a wide sheet."""

GAP = 2
"""White pixels around each picture of a sheet."""

SOFTWARE = ("Software", "dmd-one-step")
"""A PNG's own keyword for who wrote it."""

TARGET_SIZE = 64
"""Small pictures are enlarged, by a whole factor, to at least this many pixels."""


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, C, H, W) in [-1, 1], C 1 or 3 -> (N, H, W, 3) uint8."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return rearrange(scaled.expand(-1, 3, -1, -1), "n c h w -> n h w c").numpy()


def picture(image: Tensor) -> Image.Image:
    """(C, H, W) in [-1, 1] -> RGB, pixel for pixel."""
    return Image.fromarray(to_uint8(image[None])[0])


def grid(images: Tensor, columns: int = COLUMNS, size: int = TARGET_SIZE) -> Image.Image:
    """(N, C, H, W) in [-1, 1] -> rows of `columns`, small pictures enlarged to `size` pixels."""
    pixels = to_uint8(images)
    factor = max(1, -(-size // pixels.shape[2]))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    pixels = np.pad(pixels, ((0, 0), (GAP, GAP), (GAP, GAP), (0, 0)), constant_values=255)
    blank = np.full_like(pixels[:1], 255).repeat(-len(pixels) % columns, axis=0)
    whole = np.concatenate([pixels, blank])
    return Image.fromarray(rearrange(whole, "(r c) h w k -> (r h) (c w) k", c=columns))


def stack(rows: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures of one width below each other, each under its caption."""
    width = max(image.width for _, image in rows)
    label = max(LABEL_HEIGHT, width // LABELS_ACROSS)
    font = ImageFont.load_default(label * 3 // 4)
    lengths = [font.getlength(caption) for caption, _ in rows]
    width = max(width, 8 + round(max(lengths)))
    height = sum(image.height + label for _, image in rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for caption, image in rows:
        draw.text((4, top + label // 2), caption, fill="black", font=font, anchor="lm")
        sheet.paste(image, (0, top + label))
        top += label + image.height
    return sheet


def save_picture(path: Path, image: Image.Image) -> None:
    """PNG that says who wrote it, atomically."""
    said = PngInfo()
    said.add_text(*SOFTWARE)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=said))


def is_own_picture(file: Path) -> bool:
    """Whether a file says that `save_picture` wrote it."""
    key, name = SOFTWARE
    try:
        with Image.open(file) as image:
            return bool(image.info.get(key) == name)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
