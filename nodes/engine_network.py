"""What a run in a node is given: the wired MODEL as a Network, and its conditions."""

import copy

import comfy.model_management
import torch
from torch import Tensor

from ..dmd_train.config import Config
from ..dmd_train.data.conditions import Conditions
from ..dmd_train.errors import UserError
from ..dmd_train.method.network import Condition, Network
from .canvas_network import CanvasNetwork
from .class_label import LABEL
from .edm_model import EDMModel
from .patched_copy import patched_copy
from .wired import Wired


def engine_network(wired: Wired, config: Config) -> tuple[Network, Conditions]:
    """The wired MODEL as a network of its own, and its conditions. Call it in `training_mode`.

    A class-conditional MODEL of this pack's is the engine's own network again, so that a run is
    the headless one bit for bit. Raises UserError for what does not fit together.
    """
    device = comfy.model_management.get_torch_device()
    base = wired.model.model
    if isinstance(base, EDMModel) and "model_sampling" not in wired.model.object_patches:
        edm = copy.copy(base.model_config.unet_config["network"])
        edm.module = patched_copy(wired.model, device, torch.float32).network
        return edm, Labels(_labels(wired, edm.classes), wired.conditions_for(config))
    network = CanvasNetwork(wired, config, device)
    network.try_once(config.guidance)
    return network, Rows(len(wired.rows), wired.conditions_for(config))


def _labels(wired: Wired, classes: int) -> Tensor:
    labels = torch.tensor([int(options.get(LABEL, classes)) for _, options in wired.rows])
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        raise UserError(
            f"conditions: this model draws the classes 0 to {classes - 1}. Wire DMD Class Label "
            f"with some of them."
        )
    return labels


class Rows(Conditions):
    """The conditions of a CanvasNetwork, by their numbers: uniform."""

    def take(self, rows: Tensor, device: torch.device) -> Condition:
        """Numbers stay on the CPU, where they are looked up."""
        return {"row": rows}


class Labels(Conditions):
    """Some of a network's classes: uniform over the list."""

    def __init__(self, labels: Tensor, name: str) -> None:
        super().__init__(len(labels), name)
        self.labels = labels

    def take(self, rows: Tensor, device: torch.device) -> Condition:
        return {"label": self.labels[rows].to(device)}
