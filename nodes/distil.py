"""DMD Distill and DMD Continue Run: their inputs and outputs, and the config these make."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..dmd_train.config import CANVAS, DIGITS, Config, load_config, make_config
from ..dmd_train.data.prompts import read_prompts
from ..dmd_train.errors import UserError
from ..dmd_train.files.read import peek
from ..dmd_train.files.yaml import read_yaml
from ..dmd_train.networks.load import DIGITS_TEACHER, load
from ..dmd_train.networks.recognise import CLASS_CONDITIONAL, recognise
from ..dmd_train.presets import PRESETS, presets_for
from ..dmd_train.run.folder import RunFolder
from .conditioning import Conditioning, all_classes
from .edm_model import edm_model
from .model_files import PACK
from .model_recipe import family_of
from .progress import say
from .prompts import encode
from .real_images import BATCH, RealImages
from .run import bring_to_its_end
from .run_folders import run_folders, run_name, run_path
from .teacher_pairs import TeacherPairs
from .widgets import IMAGES, LORA_MODEL, LOSS_MAP, PAIRS
from .wired import Wired, wired_file

AUTO = "right for the model"

FROM_THE_GRAPH = ("teacher", "prompts", "images", "output", "preset", "device", "seed")
"""Settings that are wires or widgets of their own."""

WIRED_PAIRS = 0.25
"""Weight of the regression on wired pairs where the preset has none (DMD 3.3)."""


def _outputs() -> list[io.Output]:
    return [
        io.Model.Output(
            display_name="student", tooltip="One step: lcm, simple, cfg 1, any KSampler."
        ),
        LORA_MODEL.Output(
            display_name="lora", tooltip="The student as a LoRA, for Save LoRA Weights."
        ),
        LOSS_MAP.Output(
            display_name="loss",
            tooltip="For Plot Loss Graph: the regression where there is one, else the critic's. "
            "The distribution matching loss says nothing about progress.",
        ),
        io.Image.Output(
            display_name="sheet",
            tooltip="The newest picture of the run: teacher, student, gradient.",
        ),
        io.String.Output(display_name="folder", tooltip="The run's folder."),
    ]


def _advanced_input() -> io.Input:
    """A text field, hidden until the user asks for advanced widgets."""
    text = io.String.Input(
        "advanced",
        default="",
        multiline=True,
        tooltip="Any other setting as in run.yaml, one 'key: value' a line, such as batch_size: 2. "
        "All of them are on this node's help page.",
    )
    text.extra_dict = {"advanced": True}  # 0.3.75 has no word for it
    return text


class DMDDistill(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_Distill",
            display_name="DMD Distill",
            category="DMD One-Step",
            description="Make a one-step version of this MODEL, with the LoRAs and merges wired "
            "into it. Stop when you like: what is learned is saved, and Run goes on from there.",
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The many-step model to distil. It stays as it is."
                ),
                io.Conditioning.Input(
                    "conditions",
                    tooltip="What to draw while learning: DMD Prompts, DMD Class Label, or any "
                    "CONDITIONING of one or more prompts.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[AUTO, *PRESETS],
                    default=AUTO,
                    tooltip="All other numbers; python -m dmd_train presets names their sources. "
                    "The first choice takes the preset of the model's family for one GPU.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=10**7,
                    tooltip="Student updates. 0: the preset's number.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=8192,
                    step=64,
                    tooltip="Side of the pictures in pixels. 0: the size the model was made for. "
                    "Smaller is faster and takes less memory.",
                ),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="The teacher's cfg. It is baked into the student, which samples at cfg "
                    "1. 0: the preset's.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Of the LoRAs of student and critic. 0: the preset's.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,  # another seed would be another run
                    tooltip="Of everything random in the run: the same seed, the same student.",
                ),
                io.String.Input(
                    "run",
                    default="",
                    tooltip="Name of the run's folder in output/dmd_runs. Empty: named after its "
                    "settings, so that the same settings go on and others begin anew.",
                ),
                _advanced_input(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What guidance leads away from: DMD Prompts' negative. Not needed at "
                    "guidance 1 and for classes.",
                ),
                PAIRS.Input(
                    "pairs",
                    optional=True,
                    tooltip="From DMD Teacher Pairs, for the regression. Without, a preset that "
                    "needs pairs makes its own.",
                ),
                IMAGES.Input(
                    "images",
                    optional=True,
                    tooltip="From DMD Real Images: the student learns to look like them, too.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="For the previews, and to encode images. Without, previews have rough "
                    "colours.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        conditions: Conditioning,
        preset: str,
        steps: int,
        resolution: int,
        guidance: float,
        rank: int,
        seed: int,
        run: str,
        advanced: str,
        negative: Conditioning | None = None,
        pairs: TeacherPairs | None = None,
        vae: comfy.sd.VAE | None = None,
        images: RealImages | None = None,
    ) -> io.NodeOutput:
        node_id = str(cls.hidden.unique_id)
        file = wired_file(model, cls.hidden.prompt, node_id)
        wired = Wired(model, conditions, negative, pairs, vae, file, images)
        family = family_of(model)
        values = chosen(preset, family, steps, resolution, guidance, rank, seed, advanced)
        return bring_to_its_end(_config(values, run, wired), wired, node_id)


class DMDContinueRun(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_ContinueRun",
            display_name="DMD Continue Run",
            category="DMD One-Step",
            description="Go on with a run that was stopped, here or in a terminal, by the settings "
            "it was begun with. Of a run of a checkpoint nothing needs to be wired.",
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "run",
                    options=list(run_folders()),
                    tooltip="A folder of output/dmd_runs, or of the pack's own runs/ (those of "
                    "python -m dmd_train). The newest is the first.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Only for a run of a MODEL with LoRAs or other patches: the same one.",
                ),
                io.Conditioning.Input(
                    "conditions", optional=True, tooltip="With model: the same conditions."
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="With model: the same negative."
                ),
                PAIRS.Input(
                    "pairs", optional=True, tooltip="With model: the same pairs, if there were any."
                ),
                IMAGES.Input(
                    "images",
                    optional=True,
                    tooltip="Of a run with an IMAGE from the graph: the same one.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="For the previews. Without, the checkpoint's own, or rough colours.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, run: str, **_: Any) -> float:
        """A run that has gone on elsewhere in the meantime is not the cached one."""
        path = run_folders().get(run, Path("none"))
        return max((file.stat().st_mtime for file in path.glob("checkpoints/*")), default=0.0)

    @classmethod
    def execute(
        cls,
        run: str,
        model: ModelPatcher | None = None,
        conditions: Conditioning | None = None,
        negative: Conditioning | None = None,
        pairs: TeacherPairs | None = None,
        vae: comfy.sd.VAE | None = None,
        images: RealImages | None = None,
    ) -> io.NodeOutput:
        node_id = str(cls.hidden.unique_id)
        path = run_folders().get(run)
        if path is None:
            raise UserError(f"run: there is no '{run}'. Press R to read the folders again.")
        begun = load_config(path / "run.yaml", [])
        config = begun.model_copy(update={"output": path, "device": _device(begun.device)})
        if str(config.images).startswith(BATCH) and images is None:
            raise UserError(
                f"{path}: was begun with an IMAGE. Wire the same one, as DMD Real Images."
            )
        if not config.teacher.startswith(CANVAS):
            say("loading the teacher", node_id)
            wired = _from_file(config, node_id)
            return bring_to_its_end(config, replace(wired, vae=vae or wired.vae), node_id)
        if model is None or conditions is None:
            raise UserError(
                f"{path}: was begun with a MODEL that is no file by itself. Wire that MODEL and "
                "its conditions into this node."
            )
        file = wired_file(model, cls.hidden.prompt, node_id)
        wired = Wired(model, conditions, negative, pairs, vae, file, images)
        config = config.model_copy(update=wired.names(config))
        return bring_to_its_end(config, wired, node_id)


def chosen(
    preset: str,
    family: str,
    steps: int,
    resolution: int,
    guidance: float,
    rank: int,
    seed: int,
    advanced: str,
) -> dict[str, Any]:
    """The settings that the widgets name; 0 names none. Raises UserError.

    family: the MODEL's, for the preset that is right for it: its first, the one for one GPU.
    """
    widgets = {"steps": steps, "resolution": resolution, "guidance": guidance, "lora_rank": rank}
    values = _advanced(advanced) | {key: value for key, value in widgets.items() if value}
    return values | {"seed": seed, "preset": presets_for(family)[0] if preset == AUTO else preset}


def _advanced(text: str) -> dict[str, Any]:
    """Lines of run.yaml. Raises UserError for what is none, and for what a workflow may not set.

    A workflow may come from anybody: it names no file, and sends nothing anywhere.
    """
    values = read_yaml(text, "advanced") or {}
    if not isinstance(values, dict):
        raise UserError("advanced: write one 'key: value' a line, for example batch_size: 2")
    for key in FROM_THE_GRAPH:
        if key in values:
            raise UserError(f"advanced: {key} is set by the graph. Take this line out.")
    if "decoder" in values:
        raise UserError(
            "advanced: decoder: a workflow names no files. Take this line out; a wired vae draws "
            "the pictures."
        )
    if "wandb" in str(values.get("trackers")):
        raise UserError(
            "advanced: trackers: wandb sends data, which no workflow may ask for. Take it out, or "
            "train by python -m dmd_train."
        )
    return {str(key): value for key, value in values.items()}


def _device(chosen: str) -> str:
    """ComfyUI's device, for the config. Raises UserError for one that does not train."""
    device = comfy.model_management.get_torch_device()
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"ComfyUI runs on {device.type}, where training does not. Start it with --cpu, or "
            "on an NVIDIA or AMD GPU."
        )
    return "cpu" if device.type == "cpu" else chosen


def _config(values: dict[str, Any], name: str, wired: Wired) -> Config:
    """The run's settings, named after themselves where the user gave no name."""
    placeholder = {
        "teacher": CANVAS,
        "output": run_path(name or "unnamed"),
        "device": _device("auto"),
    }
    config = make_config(values | placeholder, "DMD Distill")
    if wired.pairs is not None and not config.needs_pairs:
        config = config.model_copy(update={"regression_weight": WIRED_PAIRS})
    config = config.model_copy(update=wired.names(config))
    if not name:
        named = run_name(config, wired.conditions_name)
        config = config.model_copy(update={"output": run_path(named)})
        config = config.model_copy(update=wired.names(config))  # prompts lie in the folder
    return config


def _from_file(config: Config, node_id: str) -> Wired:
    """A headless run's teacher as ComfyUI loads it, with its prompts. Raises UserError."""
    file = DIGITS_TEACHER if config.teacher == DIGITS else _found(Path(config.teacher))
    if file.is_dir():
        raise UserError(
            f"{file}: a diffusers folder, which ComfyUI does not load. Go on in a terminal: "
            f"python -m dmd_train train {config.output / 'run.yaml'}"
        )
    found = recognise(*peek(file), str(file))
    if found.layout in CLASS_CONDITIONAL:
        network = load(str(file), torch.device("cpu")).network
        model = edm_model(network)
        return Wired(model, all_classes(model), file=file)
    embeddings = folder_paths.get_folder_paths("embeddings")
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
        str(file), embedding_directory=embeddings
    )
    if RunFolder(config).finished:
        return Wired(model, [], vae=vae, file=file)
    prompts = config.prompts and _found(Path(config.prompts))
    conditions, negative = encode(clip, read_prompts(prompts), node_id)
    return Wired(model, conditions, negative, vae=vae, file=file)


def _found(path: Path) -> Path:
    """A path of a headless run, which may be relative to the pack."""
    return next((at for at in (path, PACK / path) if at.exists()), path)
