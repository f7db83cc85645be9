"""Load DMD Checkpoint and Load DMD LoRA: the file says how it must be sampled."""

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..dmd_train.errors import UserError
from ..dmd_train.files.read import peek, read_weights
from ..dmd_train.method.lora import kohya_key
from ..dmd_train.networks.load import load
from ..dmd_train.networks.recognise import Found, recognise
from .edm_model import edm_model, pixel_vae
from .model_files import PACK, choices, file_of, path_of
from .model_recipe import family_of, with_recipe

UNKNOWN = "which recipe? pick one in DMD Model Sampling"
"""Where nothing tells how many steps a file takes."""


class LoadDMDCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_LoadCheckpoint",
            display_name="Load DMD Checkpoint",
            category="DMD One-Step",
            description="Load a one-step or few-step model. The MODEL that comes out is right in "
            "the stock KSampler too: lcm, simple, its number of steps, cfg 1.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=choices(),
                    tooltip="A file of models/checkpoints or models/diffusion_models, or a student "
                    "of this pack (dmd_students). .bin files are read without running their code.",
                )
            ],
            outputs=[
                io.Model.Output(tooltip="With the recipe of its file applied."),
                io.Clip.Output(tooltip="Where the file holds text encoders."),
                io.Vae.Output(tooltip="Where the file holds a VAE, or draws pixels."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> int:
        return path_of(file).stat().st_mtime_ns

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = path_of(file)
        shapes, metadata = peek(path)
        found = recognise(
            shapes, metadata, str(path), "checkpoint", elsewhere="Open it with Load DMD LoRA."
        )
        model, clip, vae = _load(path, found)
        if found.recipe:
            model = with_recipe(model, found.recipe)
        return io.NodeOutput(
            model,
            clip or _absent(file, "text encoder", "CLIP"),
            vae or _absent(file, "VAE", "VAE"),
            ui={"text": (found.summary(UNKNOWN),)},
        )


def _absent(file: str, part: str, socket: str) -> ExecutionBlocker:
    """In place of a part that the file has not; said once something is wired to it."""
    return ExecutionBlocker(f"{file} holds no {part}: load one with Load {socket}.")


def _load(path: Path, found: Found) -> tuple[ModelPatcher, Any, Any]:
    """MODEL, CLIP, VAE; the last two None where the file has none."""
    match found.layout:
        case "our student" | "our teacher" | "EDM class-conditional":
            try:
                network = load(str(path), torch.device("cpu")).network
            except ModuleNotFoundError as error:
                raise UserError(
                    f"{path}: reading it needs {error.name}, which is not installed. Run "
                    f"pip install -r {PACK / 'requirements.txt'}"
                ) from None
            return edm_model(network), None, pixel_vae(network.shape[0])
        case "LDM single file" | "single file":
            embeddings = folder_paths.get_folder_paths("embeddings")
            model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
                str(path),
                output_vae=found.vae,
                output_clip=found.text_encoder,
                embedding_directory=embeddings,
            )
            return model, clip, vae
        case _:
            return comfy.sd.load_diffusion_model(str(path)), None, None


class LoadDMDLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_LoadLoRA",
            display_name="Load DMD LoRA",
            category="DMD One-Step",
            description="Make a MODEL few-step by a LoRA (DMD2's, or one trained here). The recipe "
            "of the LoRA is applied to the MODEL.",
            inputs=[
                io.Model.Input("model", tooltip="The base model, with any other LoRAs before it."),
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A file of models/loras.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    tooltip="1 as trained; a little less can look better on community checkpoints.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="With the LoRA and its recipe applied.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, file: str, strength: float) -> io.NodeOutput:
        path = file_of("loras", file, file)
        shapes, metadata = peek(path)
        found = recognise(
            shapes,
            metadata,
            str(path),
            "LoRA",
            elsewhere="Open it with Load DMD Checkpoint.",
            ours="that DMD Distill made",
        )
        if found.family != family_of(model):
            raise UserError(
                f"{path}: this LoRA is for {found.family}, the model is {family_of(model)}"
            )
        tensors, _ = read_weights(path)
        lora = {kohya_key(key): value for key, value in tensors.items()}
        patched, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0)
        if _patch_count(patched) == _patch_count(model):
            raise UserError(f"{path}: this LoRA fits no layer of the model")
        if found.recipe:
            patched = with_recipe(patched, found.recipe)
        return io.NodeOutput(patched, ui={"text": (found.summary(UNKNOWN),)})


def _patch_count(model: ModelPatcher) -> int:
    return sum(len(patches) for patches in model.patches.values())
