"""DMD Prompts: a list of prompts as the conditions of a distillation."""

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.sdxl_clip
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..dmd_train.data.prompts import MOST_TEXT, SHIPPED, WAY_OUT, prompts_in
from ..dmd_train.errors import UserError
from ..dmd_train.files.text import read_text
from .conditioning import PROMPT, Conditioning
from .progress import Progress

TEXT, SHIPPED_LIST = "the text below", "the shipped list"
GIB = 1 << 30
MOST = 4 * GIB
"""Bytes of encoded prompts: all of them are held in memory."""


class DMDPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_Prompts",
            display_name="DMD Prompts",
            category="DMD One-Step",
            description="A list of prompts, encoded: what a student learns to draw, for DMD "
            "Distill and DMD Teacher Pairs.",
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model that is distilled."),
                io.Combo.Input(
                    "source",
                    options=[TEXT, SHIPPED_LIST, *text_files()],
                    default=TEXT,
                    tooltip="The shipped list: over a thousand prompts of all kinds. Otherwise a "
                    ".txt file of ComfyUI's input folder, one prompt a line.",
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    tooltip="One prompt a line, where it is the source.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditions", tooltip="One entry for each prompt."
                ),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The empty prompt, as the model was trained with it: of SDXL, zeros.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, source: str = TEXT, **_: Any) -> int:
        """A text file that was edited is read again."""
        return path_of(source).stat().st_mtime_ns if source in text_files() else 0

    @classmethod
    def execute(cls, clip: comfy.sd.CLIP | None, source: str, text: str) -> io.NodeOutput:
        if clip is None:
            raise UserError(
                "clip: the checkpoint holds no text encoder. Load the model's own with Load CLIP."
            )
        if source != TEXT:
            text = read_text(path_of(source), MOST_TEXT, WAY_OUT)
        prompts = prompts_in(text, source)
        if not prompts:
            raise UserError(f"{source}: holds no prompts. Write one a line.")
        conditions, negative = encode(clip, prompts, str(cls.hidden.unique_id))
        line = f"{len(prompts)} prompts, the first: {prompts[0][:60]}"
        return io.NodeOutput(conditions, negative, ui={"text": (line,)})


def text_files() -> list[str]:
    """Every *.txt of the input folder, by its name there."""
    folder = Path(folder_paths.get_input_directory())
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt"))


def path_of(source: str) -> Path:
    """Raises UserError for a name that is not (or no longer) offered."""
    if source == SHIPPED_LIST:
        return SHIPPED
    if source not in text_files():
        raise UserError(
            f"source: '{source}' is no .txt file of the input folder. Press R to read it again."
        )
    return Path(folder_paths.get_input_directory(), source)


def encode(
    clip: comfy.sd.CLIP, prompts: list[str], node_id: str
) -> tuple[Conditioning, Conditioning]:
    """The prompts as a CONDITIONING of one entry each, and the negative that goes with them."""
    progress = Progress("prompts", len(prompts), node_id)
    conditions: Conditioning = []
    for done, prompt in enumerate(prompts, 1):
        conditions += _encoded(clip, prompt)
        if done == 1:
            _require_room(conditions, len(prompts))
        progress.update(done)
    negative = _encoded(clip, "")
    if isinstance(clip.cond_stage_model, comfy.sdxl_clip.SDXLClipModel):
        # SDXL's own training dropped prompts so; DMD2 guides its teacher by it
        negative = [[torch.zeros_like(text), _zeros(options)] for text, options in negative]
    return conditions, negative


def _encoded(clip: comfy.sd.CLIP, prompt: str) -> Conditioning:
    """What CLIP Text Encode makes of the prompt, but in float16: half the memory."""
    entries = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    return [
        [_half(text), {key: _half(value) for key, value in options.items()} | {PROMPT: prompt}]
        for text, options in entries
    ]


def _half(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    half = value.half()
    return half if half.isfinite().all() else value  # some language models' are out of its range


def _zeros(options: dict[str, Any]) -> dict[str, Any]:
    return {
        key: torch.zeros_like(value) if isinstance(value, Tensor) else value
        for key, value in options.items()
    }


def _require_room(first: Conditioning, count: int) -> None:
    values = [value for text, options in first for value in (text, *options.values())]
    whole = count * sum(value.nbytes for value in values if isinstance(value, Tensor))
    if whole > MOST:
        raise UserError(
            f"{count} prompts would take {whole / GIB:.1f} GiB encoded, more than {MOST // GIB}. "
            f"Take the first {count * MOST // whole}, or train by python -m dmd_train."
        )
