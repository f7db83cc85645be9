"""DMD Save Student: a student on the canvas as a file in the folder that ComfyUI reads it from."""

import os
from pathlib import Path, PurePosixPath

import comfy.model_base
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..dmd_train.errors import UserError
from ..dmd_train.files.names import is_name
from ..dmd_train.files.write import write_atomically, write_safetensors
from ..dmd_train.run.export import FOLDERS, Form, require_known_alone
from .edm_model import EDMConfig
from .model_recipe import family_of
from .progress import say
from .student_model import Student, student_of

LORA, UNET, CHECKPOINT = "LoRA", "UNet", "checkpoint"
FORMS: dict[str, Form] = {LORA: "lora", UNET: "unet", CHECKPOINT: "checkpoint"}

NO_LORA = "this student was trained in full, so there is no LoRA"

LORAS_OWN = "ss_"
"""Start of the metadata by which other programs list a LoRA."""


class DMDSaveStudent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_SaveStudent",
            display_name="DMD Save Student",
            category="DMD One-Step",
            description="Save a student, its recipe inside, where Load DMD LoRA and Load DMD "
            "Checkpoint find it. Never over another file.",
            inputs=[
                io.Model.Input("model", tooltip="A student from DMD Distill."),
                io.Combo.Input(
                    "save_as",
                    options=list(FORMS),
                    default=LORA,
                    tooltip="LoRA: small, for this teacher and its relatives. UNet: the MODEL as "
                    "wired, LoRAs merged. Checkpoint: the same with clip and vae in one file.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="dmd/student",
                    tooltip="Folder and name inside models/loras, models/diffusion_models or "
                    "models/checkpoints. A number is added.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="For a checkpoint: the teacher's."),
                io.Vae.Input("vae", optional=True, tooltip="For a checkpoint: the teacher's."),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The path of the new file.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        save_as: str,
        filename_prefix: str,
        clip: comfy.sd.CLIP | None = None,
        vae: comfy.sd.VAE | None = None,
    ) -> io.NodeOutput:
        student = student_of(model)
        if student is None:
            raise UserError(
                "model: not a student of DMD Distill. Any other MODEL is saved by Save Checkpoint"
            )
        require_possible(save_as, model, student, clip, vae)
        is_pixel = isinstance(model.model.model_config, EDMConfig)  # whole by its own weights
        path = new_path(FORMS[CHECKPOINT if is_pixel else save_as], filename_prefix)
        say(f"writing {path.name}", cls.hidden.unique_id)
        if is_pixel or save_as == LORA:
            write_safetensors(path, student.tensors, student.metadata)
        elif save_as == UNET:
            write_merged(path, model, student)
        else:
            write_merged(path, model, student, clip, vae)
        loader = "Load DMD LoRA" if save_as == LORA else "Load DMD Checkpoint"
        return io.NodeOutput(str(path), ui={"text": (f"{path}: press R, then use {loader}",)})


def require_possible(
    save_as: str,
    model: ModelPatcher,
    student: Student,
    clip: comfy.sd.CLIP | None,
    vae: comfy.sd.VAE | None,
) -> None:
    """Raises UserError for a file that would not give this student back."""
    if save_as not in FORMS:  # older ComfyUIs do not look into a combo box that a wire goes to
        raise UserError(f"save_as: there is no '{save_as}'. Choose one of {', '.join(FORMS)}")
    if isinstance(model.model.model_config, EDMConfig):
        if student.is_lora:
            raise UserError(
                "model: a LoRA of a class-conditional model, which no loader reads. Distil it with "
                "training: full"
            )
        if save_as == LORA:
            raise UserError(f"save_as: {NO_LORA}. Choose {CHECKPOINT}")
        return
    if save_as == LORA and not student.is_lora:
        raise UserError(f"save_as: {NO_LORA}. Choose {UNET} or {CHECKPOINT}")
    if save_as == CHECKPOINT and (clip is None or vae is None):
        missing = " and ".join(k for k, v in (("clip", clip), ("vae", vae)) if v is None)
        raise UserError(
            f"save_as: a checkpoint holds text encoders and VAE, and {missing} is not wired: wire "
            f"the teacher's, or choose {UNET}"
        )
    if save_as == UNET:
        is_v = model.model.model_type == comfy.model_base.ModelType.V_PREDICTION
        prediction, way_out = "v" if is_v else "eps", f"Choose {CHECKPOINT} or {LORA}"
        require_known_alone("save_as", family_of(model), prediction, way_out)


def new_path(form: Form, prefix: str) -> Path:
    """PREFIX_00001_.safetensors in the form's folder, with the next free number.

    Raises UserError for a prefix that is no name of a file in there.
    """
    key = PurePosixPath(FOLDERS[form]).name
    # ComfyUI lists the old `unet` before `diffusion_models`
    folders = [os.path.abspath(path) for path in folder_paths.get_folder_paths(key)]
    folder = next((path for path in folders if Path(path).name != "unet"), folders[0])
    refusal = UserError(
        f"filename_prefix: {prefix!r} is no name for a file inside {folder}: write for example "
        "dmd/student"
    )
    pure = PurePosixPath(prefix)
    # a name that ends in a slash would be counted from 1 again, and written over
    if not pure.name or prefix.endswith("/") or not all(map(is_name, pure.parts)):
        raise refusal
    try:
        where, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder)
    except Exception:  # a plain one, of several lines
        raise refusal from None
    path = Path(where, f"{name}_{counter:05}_.safetensors")
    if path.exists():
        raise UserError(f"{path}: exists. Choose another filename_prefix")
    return path


def write_merged(
    path: Path,
    model: ModelPatcher,
    student: Student,
    clip: comfy.sd.CLIP | None = None,
    vae: comfy.sd.VAE | None = None,
) -> None:
    """The MODEL with everything patched into its weights, as ComfyUI saves checkpoints. Atomic."""
    metadata = {k: v for k, v in student.metadata.items() if not k.startswith(LORAS_OWN)}
    # ComfyUI marks v-prediction by itself, this not: nodes_model_merging.save_checkpoint
    is_zero_snr = getattr(model.get_model_object("model_sampling"), "zsnr", False)
    marks = {"ztsnr": torch.tensor([])} if is_zero_snr else {}
    write_atomically(
        path,
        lambda temporary: comfy.sd.save_checkpoint(
            str(temporary), model, clip, vae, metadata=metadata, extra_keys=marks
        ),
    )
