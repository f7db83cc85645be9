"""A teacher of Fashion-MNIST at 32x32 and its pictures as files, for benchmarks/ablation.py.

    python benchmarks/fashion_mnist.py --data /usr/share/datasets/fashion-mnist --out fashion

The data set is Debian's package dataset-fashion-mnist (Xiao et al. 2017, MIT). Writes
fashion/teacher.safetensors and fashion/images/<class>/<number>.png. One thread, bfloat16: about
half an hour.
"""

import argparse
import gzip
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from einops import rearrange  # noqa: E402
from PIL import Image  # noqa: E402
from rich.progress import track  # noqa: E402
from torch.nn import functional  # noqa: E402

from dmd_train.networks.digits import Labelled, train_teacher  # noqa: E402
from dmd_train.networks.edm import EDMNetwork  # noqa: E402
from dmd_train.networks.edm_unet import edm_unet  # noqa: E402
from dmd_train.networks.load import save  # noqa: E402

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "ankle-boot")  # fmt: skip
SIGMA_DATA = 0.66  # standard deviation of all pixels at 32x32


def fashion_mnist(folder: Path, part: str = "train") -> Labelled:
    """60,000 pictures (10,000 of part "t10k"), 28x28 with a black border to 32x32."""
    image = _idx(folder / f"{part}-images-idx3-ubyte.gz", header=16)
    label = _idx(folder / f"{part}-labels-idx1-ubyte.gz", header=8)
    pictures = rearrange(image.float() / 127.5 - 1, "(n h w) -> n 1 h w", h=28, w=28)
    return Labelled(functional.pad(pictures, (2, 2, 2, 2), value=-1.0), label.long())


def _idx(file: Path, header: int) -> torch.Tensor:
    with gzip.open(file) as stream:
        return torch.from_numpy(np.frombuffer(stream.read(), np.uint8, offset=header).copy())


def network(seed: int) -> EDMNetwork:
    """1.05 M parameters."""
    torch.manual_seed(seed)
    return edm_unet(
        len(CLASSES),
        SIGMA_DATA,
        license="MIT (Fashion-MNIST)",
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=8,
        add_attention=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the .gz files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = fashion_mnist(args.data)
    for number in track(range(args.pictures), "pictures"):
        file = args.out / "images" / CLASSES[data.label[number]] / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = ((data.image[number, 0] + 1) * 127.5).round().byte().numpy()
        Image.fromarray(pixels).save(file)
    teacher = network(args.seed)
    with torch.autocast("cpu", torch.bfloat16):
        made = train_teacher(teacher, data, args.steps, args.seed, 128, 1e-3)
        for _ in track(made, "teacher", total=args.steps):
            pass
    save(args.out / "teacher.safetensors", teacher)


if __name__ == "__main__":
    main()
