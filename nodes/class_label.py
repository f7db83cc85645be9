"""DMD Class Label: the conditioning that tells a class-conditional model what to draw."""

import torch
from comfy_api.latest import io

from ..dmd_train.errors import UserError

LABEL = "class_label"
NO_CLASS = -1
MOST = 100_000
"""Labels, and one more than the largest: many more than a model has classes."""


def parse_labels(text: str) -> torch.Tensor:
    """ "7", "0-9", "1, 3, 5-7" -> (N,) int64; nothing -> the label that stands for "no class"."""
    labels: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        try:
            own = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise UserError(f"labels: '{part}' is no class; write 7, 0-9 or 1, 3, 5-7") from None
        if own.stop > MOST or len(labels) + len(own) > MOST:
            raise UserError(f"labels: '{part}' is too many: classes are below {MOST}")
        labels += own
    return torch.tensor(labels or [NO_CLASS])


class DMDClassLabel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_ClassLabel",
            display_name="DMD Class Label",
            category="DMD One-Step",
            description="Which class a class-conditional model (digits, ImageNet-64) draws.",
            inputs=[
                io.String.Input(
                    "labels",
                    default="0-9",
                    tooltip="One class (7), a range (0-9) or a list (1, 3, 5-7). Image i of the "
                    "batch gets label i, round and round. Empty: no class, for the negative of a "
                    "many-step teacher.",
                )
            ],
            outputs=[io.Conditioning.Output(tooltip="For any sampler, in the place of a prompt.")],
        )

    @classmethod
    def execute(cls, labels: str) -> io.NodeOutput:
        return io.NodeOutput([[None, {LABEL: parse_labels(labels)}]])
