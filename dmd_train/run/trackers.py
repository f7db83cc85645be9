"""TensorBoard and Weights & Biases beside metrics.jsonl, through accelerate."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL.Image import Image

from ..config import Config
from ..errors import UserError


def require_trackers(config: Config) -> None:
    """Refusal, a UserError, of a tracker that is not installed."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed. Run: pip install {name}")


class Trackers:
    """The trackers of config.trackers; none is the usual case."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.accelerator: Any = None
        if config.trackers:
            from accelerate import Accelerator

            on_cpu = config.device_object().type == "cpu"
            self.accelerator = Accelerator(
                cpu=on_cpu, log_with=list(config.trackers), project_dir=folder
            )
            shown = {k: str(v) for k, v in config.model_dump(mode="json").items()}
            self.accelerator.init_trackers(folder.name, config=shown)

    def log(self, row: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self.accelerator:
            values = {name: value for name, value in row.items() if name != "step"}
            self.accelerator.log(values, step=row["step"])

    def picture(self, step: int, image: Image) -> None:
        if self.accelerator:
            for tracker in self.accelerator.trackers:
                pixels = rearrange(torch.tensor(np.asarray(image)), "h w c -> 1 c h w")
                tracker.log_images({"samples": pixels}, step=step)

    def close(self) -> None:
        if self.accelerator:
            self.accelerator.end_training()
