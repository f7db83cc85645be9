"""A run's student as the files that ComfyUI, A1111, Forge and diffusers load."""

from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..config import load_config
from ..errors import UserError
from ..files.read import read_weights
from ..method.adapters import Adapted, Adapters
from ..method.network import Network
from ..networks.ldm_names import LDM
from ..networks.load import load_teacher
from ..networks.loaded import student_recipe
from .folder import exporting, newest_checkpoint, require_teacher, student_marks
from .student import write_weights

Form = Literal["lora", "unet", "checkpoint"]
Dtype = Literal["fp16", "bf16", "fp32"]
FOLDERS: dict[Form, str] = {
    "lora": "ComfyUI/models/loras",
    "unet": "ComfyUI/models/diffusion_models",
    "checkpoint": "ComfyUI/models/checkpoints",
}
"""Where ComfyUI reads each form from."""

CPU = torch.device("cpu")
DTYPES: dict[Dtype, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}


def require_known_alone(where: str, family: str, prediction: str, way_out: str) -> None:
    """Raises UserError for a UNet that ComfyUI would not know for what it is without the rest."""
    if (family, prediction) == ("sdxl", "v"):
        raise UserError(
            f"{where}: ComfyUI would take a lone SDXL UNet for an eps model, and this predicts v. "
            f"{way_out}"
        )


def export(
    run: Path, form: Form, dtype: Dtype, out: Path | None = None, notes: list[str] | None = None
) -> Path:
    """Write the newest student of the run folder. Returns the path, run/student-FORM by default.

    lora: the adapter. unet: the UNet, a LoRA merged into it. checkpoint: the teacher's single file
    with that UNet; its text encoders and VAE stay as they are. dtype: of the student's weights.
    notes: checkpoints that had to be passed over are added.
    Raises UserError for a form that the run cannot give.
    """
    config = load_config(run / "run.yaml", [])
    newest = newest_checkpoint(run / "checkpoints", notes)
    if newest is None:
        raise UserError(f"{run}: holds no checkpoint yet. Train it first, or wait for its first.")
    if form == "lora" and config.training == "full":
        raise UserError(
            f"{run}: was trained with training: full, so there is no LoRA. "
            "Use --as unet or --as checkpoint."
        )
    if form == "checkpoint" and Path(config.teacher).is_dir():
        raise UserError(
            f"{config.teacher}: a folder, not a single file, so there is no checkpoint to put the "
            "student into. Use --as unet, with the folder's text encoder and VAE beside it."
        )
    loaded = load_teacher(config.model_copy(update={"precision": "fp32"}), CPU)
    require_teacher(newest.teacher, loaded.sha256, config.teacher)
    network = loaded.network
    if loaded.text is None:
        raise UserError(
            f"{run}: a {network.family} student is whole already: {run}/student.safetensors"
        )
    if form == "unet":
        way_out = "Use --as checkpoint or --as lora."
        require_known_alone(str(run), network.family, network.prediction, way_out)
    weights = _student_weights(newest.tensors)
    student: Network = network
    if config.training == "full":
        network.module.load_state_dict(weights)
        tensors = network.file_tensors()
    else:
        network.module.requires_grad_(False)
        rank, alpha = config.lora_rank, config.lora_alpha
        adapters = Adapters(network, ("student",), rank, alpha, config.seed)
        own = adapters.parameters("student")
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)
        if form == "lora":
            student = Adapted(network, adapters, "student")
            tensors = student.file_tensors()
        else:
            tensors = network.renamed(adapters.merged("student"))
    beside = _rest_of_teacher(Path(config.teacher)) if form == "checkpoint" else {}
    path = out or run / f"student-{form}.safetensors"
    recipe = student_recipe(loaded, config)
    said = student_marks(run / "checkpoints", newest.step)
    within = path.resolve().parent == run.resolve()
    with exporting(run) if within else nullcontext():
        write_weights(path, tensors, recipe, student, DTYPES[dtype], beside, said)
    return path


def _student_weights(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """The averaged student; without an average, the student."""
    prefix = "ema/" if any(key.startswith("ema/") for key in checkpoint) else "student/"
    return {
        key.removeprefix(prefix): value
        for key, value in checkpoint.items()
        if key.startswith(prefix) and "@" not in key
    }


def _rest_of_teacher(teacher: Path) -> dict[str, Tensor]:
    """Text encoders and VAE of a single file, under their names there."""
    tensors, _ = read_weights(teacher)
    dropped = (LDM, "model_ema.")
    return {key: value for key, value in tensors.items() if not key.startswith(dropped)}
