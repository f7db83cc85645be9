"""A folder of real images: what is taken of it, what of each picture, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.command_line import Command, WriteRun, refused
from kit.runs import same_files
from kit.tiny import edm_mlp
from PIL import Image

from dmd_train.data.images import Images, make_images, unused
from dmd_train.data.pictures import PictureBatch, PictureFolder, class_rows
from dmd_train.errors import UserError
from dmd_train.files.shards import Shards
from dmd_train.networks.digits import digits

GREY = (1, 8, 8)
COLOUR = (3, 4, 6)


def saved(path: Path, pixels: np.ndarray[Any, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def flat(value: int, height: int = 8, width: int = 8) -> np.ndarray[Any, Any]:
    return np.full((height, width), value, dtype=np.uint8)


def encoded(folder: Path, shape: tuple[int, int, int], flip: bool = False) -> Shards:
    """All pictures of a folder, by a network of that shape that draws pixels."""
    pictures = PictureFolder(folder, "none")
    list(make_images(folder.parent / "shards", pictures, edm_mlp(shape), flip, "test"))
    return Shards(folder.parent / "shards")


# Of each picture


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (flat(255), [1, 1, 1]),
        (np.full((8, 8), 65535 // 4, dtype=np.uint16), [-0.5, -0.5, -0.5]),
        (np.full((8, 8, 3), (255, 0, 0), dtype=np.uint8), [1, -1, -1]),
        (np.full((8, 8, 4), (255, 0, 0, 0), dtype=np.uint8), [1, 1, 1]),  # clear: white
        (np.full((8, 8, 2), (0, 255), dtype=np.uint8), [-1, -1, -1]),
    ],
    ids=["grey", "16-bit", "colour", "alpha", "grey-alpha"],
)
def test_colours_are_those_of_the_picture_whatever_its_kind(
    pixels: np.ndarray[Any, Any], expected: list[float], tmp_path: Path
) -> None:
    saved(tmp_path / "own/a.png", pixels)
    x0 = encoded(tmp_path / "own", COLOUR).column("x0")[0].float()
    assert x0.shape == COLOUR
    assert torch.allclose(x0.mean(dim=(1, 2)), torch.tensor(expected).float(), atol=1e-3)


def test_the_middle_of_a_wide_picture_is_taken_and_made_smaller(tmp_path: Path) -> None:
    saved(tmp_path / "own/a.png", np.hstack([flat(0, 32, 32), flat(255, 32, 32), flat(0, 32, 32)]))
    assert encoded(tmp_path / "own", GREY).column("x0").min() == 1


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    picture = np.vstack([flat(0, 4), flat(255, 4)])
    saved(tmp_path / "own/a.png", picture, exif=upside_down)
    x0 = encoded(tmp_path / "own", GREY).column("x0")[0, 0]
    assert x0[0, 0] == 1 and x0[-1, 0] == -1


def test_mirror_images_follow_their_pictures_and_have_their_captions(tmp_path: Path) -> None:
    saved(tmp_path / "own/a.png", np.hstack([flat(0, 8, 4), flat(255, 8, 4)]))
    saved(tmp_path / "own/b.png", flat(128))
    shards = encoded(tmp_path / "own", GREY, flip=True)
    x0 = shards.column("x0")
    assert len(shards) == 4
    assert torch.equal(x0[0].flip(-1), x0[1]) and not torch.equal(x0[0], x0[1])


def test_the_digits_are_kept_bit_for_bit(tmp_path: Path) -> None:
    data = digits().image[:30]
    list(make_images(tmp_path / "shards", PictureBatch(data), edm_mlp(GREY), False, "test"))
    images = Images(Shards(tmp_path / "shards"), None, None)
    assert torch.equal(images.take(torch.arange(30), torch.device("cpu")), data)


# Of the folder


def test_pictures_are_found_in_folders_of_folders_and_hidden_files_are_not(tmp_path: Path) -> None:
    for name in ("b.png", "a/deep/c.PNG", ".hidden.png", ".trash/d.png"):
        saved(tmp_path / name, flat(1), format="png")
    (tmp_path / "notes.md").write_text("no picture")
    pictures = PictureFolder(tmp_path, "auto")
    assert [pictures.called(i) for i in range(len(pictures))] == ["a/deep/c.PNG", "b.png"]
    assert pictures.captions is None


def test_captions_come_from_texts_names_or_folders(tmp_path: Path) -> None:
    for name in ("red fox/red_fox_001.png", "blue jay/a_blue_jay-2.png"):
        file = saved(tmp_path / name, flat(1))
        file.with_suffix(".txt").write_text(f"told of\n {file.stem} \n")
    told: dict[Any, list[str]] = {
        "auto": ["told of a_blue_jay-2", "told of red_fox_001"],
        "names": ["a blue jay", "red fox"],
        "folders": ["blue jay", "red fox"],
    }
    for source, expected in told.items():
        assert PictureFolder(tmp_path, source).captions == expected


def test_classes_are_numbers_or_the_order_of_their_names() -> None:
    assert class_rows(["7", "0", "7"], 10, "captions").tolist() == [7, 0, 7]
    assert class_rows(["dog", "cat", "dog"], 2, "captions").tolist() == [1, 0, 1]


def test_what_cannot_be_used_is_named_and_keeps_its_place(tmp_path: Path) -> None:
    saved(tmp_path / "own/a.png", flat(1))
    saved(tmp_path / "own/b.png", flat(1, 8, 5))
    (tmp_path / "own/c.png").write_bytes((tmp_path / "own/a.png").read_bytes()[:50])
    (tmp_path / "own/d.jpg").write_text("no picture")
    saved(tmp_path / "own/e.png", flat(255))
    shards, pictures = encoded(tmp_path / "own", GREY), PictureFolder(tmp_path / "own", "none")
    said = unused(shards, pictures, edm_mlp(GREY))
    assert said
    assert said.startswith("images: 3 of 5 are not used: b.png (5x8 pixels, fewer than 8x8); c.png")
    images = Images(shards, None, None)
    assert len(images) == 2
    assert set(images.draw(50, torch.Generator().manual_seed(0)).tolist()) == {0, 4}


def test_encoding_goes_on_where_it_stopped_and_other_pictures_are_refused(tmp_path: Path) -> None:
    for i in range(6):
        saved(tmp_path / f"own/{i}.png", flat(40 * i, 1024, 512))
    shape = (1, 1024, 512)  # four to a file
    pictures = PictureFolder(tmp_path / "own", "none")
    made = make_images(tmp_path / "shards", pictures, edm_mlp(shape), False, "test")
    next(made)
    made.close()
    first = (tmp_path / "shards/shard-00000.safetensors").stat().st_mtime_ns
    assert list(make_images(tmp_path / "shards", pictures, edm_mlp(shape), False, "test"))[-1] == 6
    assert (tmp_path / "shards/shard-00000.safetensors").stat().st_mtime_ns == first
    (tmp_path / "own/0.png").unlink()
    fewer = PictureFolder(tmp_path / "own", "none")
    with pytest.raises(UserError, match=r"Delete .*shards, or choose another output"):
        list(make_images(tmp_path / "shards", fewer, edm_mlp(shape), False, "test"))


# A run


def test_a_run_with_a_folder_of_digits_goes_on_bit_for_bit(
    write_run: WriteRun, train: WriteRun, dmd: Command, tmp_path: Path
) -> None:
    data = digits()
    for i in range(20):
        pixels = ((data.image[i, 0].numpy() + 1) * 127.5).astype(np.uint8)
        saved(tmp_path / f"own/{data.label[i]}/{i}.png", pixels)
    saved(tmp_path / "own/0/small.png", flat(0, 3, 3))
    asked: dict[str, Any] = {"images": str(tmp_path / "own"), "steps": 4, "checkpoint_every": 2}
    run_yaml = write_run(tmp_path, **asked)
    outcome = dmd("train", run_yaml, "--set", f"output={tmp_path / 'whole'}")
    assert outcome.code == 0, outcome.err
    assert "images: 1 of 21 are not used: 0/small.png" in " ".join(outcome.out.split())
    run = train(run_yaml)
    (run / "checkpoints/step-00000004.safetensors").unlink()
    train(run_yaml)
    ends = [
        folder / "checkpoints/step-00000004.safetensors" for folder in (run, tmp_path / "whole")
    ]
    assert same_files(*ends)


Write = Callable[[Path], object]
BAD: dict[str, tuple[Write, dict[str, Any], tuple[str, ...]]] = {
    "no folder": (lambda _: None, {}, ("own", "is no folder")),
    "empty": (lambda own: own.mkdir(), {}, ("holds no pictures", ".png")),
    "captions alone": (
        lambda own: (own.mkdir(), (own / "a.txt").write_text("a fox")),
        {},
        ("holds no pictures but 1 captions",),
    ),
    "all too small": (
        lambda own: saved(own / "a.png", flat(0, 3, 3)),
        {},
        ("none of the 1 can be used: a.png (3x3 pixels, fewer than 8x8)",),
    ),
    "no caption": (
        lambda own: saved(own / "a.png", flat(0)),
        {"captions": "txt"},
        ("a.png has no .txt beside it", "captions: none"),
    ),
    "no such class": (
        lambda own: saved(own / "12/a.png", flat(0)),
        {},
        ("class 12 is none of the teacher's 0 to 9",),
    ),
    "other classes": (
        lambda own: saved(own / "fox/a.png", flat(0)),
        {},
        ("1 classes are named", "'fox'", "captions: none"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_folder_that_is_none_ends_in_one_line(
    case: str, write_run: WriteRun, dmd: Command, tmp_path: Path
) -> None:
    write, settings, words = BAD[case]
    write(tmp_path / "own")
    none = {"regression_weight": 0, "images": str(tmp_path / "own")}
    refused(dmd("train", write_run(tmp_path, **none, **settings)), *words)
