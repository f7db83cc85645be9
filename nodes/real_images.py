"""DMD Real Images: pictures of one's own for the adversarial objective of DMD Distill."""

from dataclasses import dataclass
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..dmd_train.config import Config
from ..dmd_train.data.pictures import PictureBatch, PictureFolder, Pictures
from ..dmd_train.errors import UserError
from ..dmd_train.method.network import Network
from .fingerprint import digest
from .widgets import IMAGES

BATCH = "ComfyUI IMAGE"
"""How the name of images begins that are no folder."""

NO_FOLDER = "none: the wired images"


@dataclass(frozen=True)
class RealImages:
    """Pictures for the discriminator: those of a folder, or of a batch (N, C, H, W) in [-1, 1].

    flip: whether their mirror images count, too.
    """

    folder: Path | None
    batch: Tensor | None
    flip: bool

    @property
    def name(self) -> str:
        """The setting `images` of their run."""
        return str(self.folder) if self.folder else f"{BATCH} {digest(self.batch)[:16]}"

    def for_run(self, config: Config, network: Network) -> Pictures:
        """Raises UserError for a folder without pictures."""
        if self.folder:
            return PictureFolder(self.folder, config.captions, network.classes is not None)
        assert self.batch is not None
        return PictureBatch(self.batch)


def _folders() -> list[str]:
    """Folders in ComfyUI's own input folder: a workflow names no other place."""
    root = Path(folder_paths.get_input_directory())
    return sorted(path.name for path in root.glob("[!.]*") if path.is_dir())


class DMDRealImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_RealImages",
            display_name="DMD Real Images",
            category="DMD One-Step",
            description="Your own pictures for DMD Distill: its student learns to look like them "
            "beside its teacher (the adversarial objective of DMD2).",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=[NO_FOLDER, *_folders()],
                    default=NO_FOLDER,
                    tooltip="A folder in ComfyUI's input folder, with folders in it if you like. "
                    "For a model of classes, pictures lie in folders named after the classes.",
                ),
                io.Boolean.Input(
                    "flip",
                    default=False,
                    tooltip="Learn from their mirror images, too. Not for text or letters.",
                ),
                io.Image.Input(
                    "images", optional=True, tooltip="Pictures from the graph, without a folder."
                ),
            ],
            outputs=[IMAGES.Output(display_name="images", tooltip="For DMD Distill.")],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **_: object) -> float:
        """Pictures may have come into the folder since."""
        root = Path(folder_paths.get_input_directory(), folder)
        return max((path.stat().st_mtime for path in root.rglob("*")), default=0.0)

    @classmethod
    def execute(cls, folder: str, flip: bool, images: Tensor | None = None) -> io.NodeOutput:
        if (folder == NO_FOLDER) == (images is None):
            raise UserError("images: choose a folder or wire images, one of the two.")
        if images is None:
            path = Path(folder_paths.get_input_directory(), folder)
            return io.NodeOutput(RealImages(path, None, flip))
        pixels = torch.clamp(images.float().cpu() * 2 - 1, -1, 1)
        batch = pixels[..., :3].movedim(-1, 1).contiguous()  # BHWC -> BCHW, without alpha
        return io.NodeOutput(RealImages(None, batch, flip))
