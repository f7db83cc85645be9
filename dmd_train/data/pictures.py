"""Pictures of people's own: a folder of files, what is said of each, and its pixels."""

import hashlib
import re
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UserError, shown
from ..files.text import read_text
from .conditions import name_of

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
MOST_CAPTION = 1 << 16
"""Bytes of a caption's file."""

CaptionsFrom = Literal["auto", "txt", "names", "folders", "none"]


class UnusablePictureError(Exception):
    """One picture that cannot be used. Says why, in a few words."""


class Pictures(Protocol):
    """Pictures by number.

    name: changes with them. captions: what is said of each; None: nothing is.
    """

    name: str
    captions: list[str] | None

    def __len__(self) -> int: ...

    def read(self, number: int, height: int, width: int, channels: int) -> Tensor:
        """(channels, height, width) in [-1, 1], the middle of it. channels: 1, grey, or 3.

        Raises UnusablePictureError.
        """

    def called(self, number: int) -> str:
        """What the user knows it by."""


class PictureFolder(Pictures):
    """The pictures in a folder and the folders in it, in the order of their paths.

    captions: "auto" is texts beside them, where there are any; of classes else the names of the
    folders that they are in. Raises UserError where there are no pictures, or captions are asked
    for and are not there.
    """

    def __init__(self, folder: Path, captions: CaptionsFrom, of_classes: bool = False) -> None:
        if not folder.is_dir():
            raise UserError(f"images: {folder} is no folder. Give the folder of the pictures.")
        self.folder = folder
        files = sorted(path for path in folder.rglob("*") if not _is_hidden(path, folder))
        self.files = [path for path in files if path.suffix.lower() in SUFFIXES]
        if not self.files:
            texts = sum(path.suffix.lower() == ".txt" for path in files)
            beside = f" but {texts} captions" if texts else ""
            raise UserError(
                f"images: {folder} holds no pictures{beside}. Put .png, .jpg or .webp files there."
            )
        if captions == "auto":
            captions = _found(folder, self.files, of_classes)
        self.captions = _captions(folder, self.files, captions)
        told = (f"{path.relative_to(folder).as_posix()} {_size(path)}" for path in self.files)
        self.name = name_of(list(told))

    def __len__(self) -> int:
        return len(self.files)

    def called(self, number: int) -> str:
        return str(self.files[number].relative_to(self.folder))

    def read(self, number: int, height: int, width: int, channels: int) -> Tensor:
        try:
            with Image.open(self.files[number]) as image:
                pixels = _pixels(image, channels)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UnusablePictureError(f"not read: {error}") from None
        return cropped(pixels, height, width)


class PictureBatch(Pictures):
    """Pictures that are in memory. pixels: (N, C, H, W) in [-1, 1], C = 1 or 3."""

    def __init__(self, pixels: Tensor, captions: list[str] | None = None) -> None:
        self.pixels, self.captions = pixels, captions
        content = hashlib.sha256(pixels.contiguous().numpy()).hexdigest()  # type: ignore[arg-type]
        self.name = f"{tuple(pixels.shape)} {content}"

    def __len__(self) -> int:
        return len(self.pixels)

    def called(self, number: int) -> str:
        return f"picture {number + 1} of the batch"

    def read(self, number: int, height: int, width: int, channels: int) -> Tensor:
        pixels = self.pixels[number]
        if len(pixels) != channels:
            pixels = pixels.mean(0, keepdim=True).expand(channels, -1, -1)
        return cropped(pixels, height, width)


def cropped(pixels: Tensor, height: int, width: int) -> Tensor:
    """The largest middle part of that shape, (C, H, W) -> (C, height, width), made smaller.

    Raises UnusablePictureError where it would have to be made larger.
    """
    from kornia.geometry import resize  # seconds, which few commands need

    high, wide = pixels.shape[1:]
    if high < height or wide < width:
        raise UnusablePictureError(f"{wide}x{high} pixels, fewer than {width}x{height}")
    scale = min(high / height, wide / width)
    part_high, part_wide = round(scale * height), round(scale * width)
    top, left = (high - part_high) // 2, (wide - part_wide) // 2
    # kornia's own crop interpolates, even where nothing is to be moved
    part = pixels[:, top : top + part_high, left : left + part_wide]
    if (part_high, part_wide) == (height, width):
        return part
    smaller: Tensor = resize(part[None], (height, width), antialias=True)[0]
    return smaller.clamp(-1, 1)


def _pixels(image: Image.Image, channels: int) -> Tensor:
    """(channels, H, W) in [-1, 1]: upright, what is transparent on white, 16 bits as they are."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # one channel of 16 bits, whatever the mode's name
        grey = torch.from_numpy(np.asarray(upright, dtype=np.float32) / 65535)[None]
        return grey.expand(channels, -1, -1) * 2 - 1
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright)
    plain = upright.convert("L" if channels == 1 else "RGB")
    values = torch.from_numpy(np.asarray(plain, dtype=np.float32) / 127.5 - 1)
    return values[None] if channels == 1 else values.permute(2, 0, 1)


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _size(path: Path) -> int:
    return path.stat().st_size


def _found(folder: Path, files: list[Path], of_classes: bool) -> CaptionsFrom:
    if any(_beside(file).exists() for file in files):
        return "txt"
    is_sorted = of_classes and all(file.parent != folder for file in files)
    return "folders" if is_sorted else "none"


def _captions(folder: Path, files: list[Path], source: CaptionsFrom) -> list[str] | None:
    match source:
        case "folders":
            outside = [file for file in files if file.parent == folder]
            _require_all(outside, files, "is in no folder of its own", "Move it into one")
            return [file.parent.name for file in files]
        case "names":
            captions = [re.sub(r"[\W_]*\d*$", "", file.stem).replace("_", " ") for file in files]
            bare = [file for file, said in zip(files, captions, strict=True) if not said]
            _require_all(bare, files, "has a name that says nothing", "Name it")
            return captions
        case "txt":
            without = [file for file in files if not _beside(file).exists()]
            _require_all(without, files, "has no .txt beside it", "Write one")
            return [_caption(_beside(file)) for file in files]
    return None


def _beside(file: Path) -> Path:
    return file.with_suffix(".txt")


def _require_all(wrong: list[Path], files: list[Path], what: str, way_out: str) -> None:
    if wrong:
        raise UserError(
            f"captions: {wrong[0]} {what}, as {len(wrong)} of {len(files)} pictures. "
            f"{way_out}, or set captions: none."
        )


def _caption(file: Path) -> str:
    said = " ".join(read_text(file, MOST_CAPTION, "Write one line.").split())
    if not said:
        raise UserError(f"captions: {file} is empty. Write one line, or set captions: none.")
    return said


def class_rows(captions: list[str], classes: int, source: str) -> Tensor:
    """The class of each caption, (N,): a number as it is, else the place among all names in order.

    Raises UserError, which begins with `source`, for what can be no class.
    """
    names = sorted(set(captions))
    if all(re.fullmatch(r"[0-9]{1,9}", name) for name in names):
        numbers = {name: int(name) for name in names}
    elif len(names) == classes:
        numbers = {name: number for number, name in enumerate(names)}
    else:
        raise UserError(
            f"{source}: {len(names)} classes are named, {shown(names[0])} first, but the teacher "
            f"has {classes}. Name them 0 to {classes - 1}, or set captions: none."
        )
    if max(numbers.values()) >= classes:
        raise UserError(
            f"{source}: class {max(numbers.values())} is none of the teacher's 0 to {classes - 1}."
        )
    return torch.tensor([numbers[caption] for caption in captions])
