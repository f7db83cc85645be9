"""A run on the canvas: the engine's own loop, iterated by a node."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.sd
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image
from torch import nn

from ..dmd_train.config import Config
from ..dmd_train.data.pairs import StoredPairs
from ..dmd_train.errors import UserError, out_of_memory
from ..dmd_train.files.read import hash_of
from ..dmd_train.files.shards import Shards
from ..dmd_train.files.write import write_text
from ..dmd_train.method.network import Network
from ..dmd_train.networks.loaded import Loaded
from ..dmd_train.run.folder import RunFolder, require_teacher
from .conditioning import fingerprint
from .engine_network import engine_network
from .model_files import PACK
from .model_recipe import recipe_of
from .patched_copy import is_quantised
from .progress import Progress, say
from .run_folders import name_of
from .student_model import student_model, student_of
from .teacher_pairs import TeacherPairs
from .training_mode import training_mode
from .wired import PROMPTS_FILE, Wired

if TYPE_CHECKING:
    from ..dmd_train.prepare import Doing


def bring_to_its_end(config: Config, wired: Wired, node_id: str) -> io.NodeOutput:
    """Train what is left of the run, then hand its student on.

    Raises UserError where the MODEL's file is another one than the run was begun with.
    """
    _require_room(config, wired.model)
    with RunFolder(config) as run:
        say("reading the run", node_id, run=name_of(run.path))
        _keep_prompts(run, wired)
        if not run.finished:
            try:
                with training_mode(config.cpu_threads), out_of_memory(run.too_large):
                    _train(run, wired, node_id)
            except ModuleNotFoundError as error:
                raise UserError(
                    f"training needs {error.name}, which is not installed. Run "
                    f"pip install -r {PACK / 'requirements.txt'}"
                ) from None
        return _results(run, wired.model, wired.file)


def _keep_prompts(run: RunFolder, wired: Wired) -> None:
    """Write them where the run.yaml says they are. Raises UserError if others are there."""
    file = run.path / PROMPTS_FILE
    if run.config.prompts != str(file) or not wired.prompts:
        return
    text = "\n".join(wired.prompts) + "\n"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise UserError(f"{run.path}: was begun with other prompts. Choose another run name.")
    write_text(file, text)


def _require_room(config: Config, model: ModelPatcher) -> None:
    """Raises UserError where it is sure beforehand that training cannot be."""
    if config.training == "full" and is_quantised(model):
        raise UserError(
            "training: full needs weights in full precision; this model's have 8 bits or fewer, "
            "which no optimiser can step. Choose a LoRA preset, or load the model in 16 bits."
        )
    weights = sum(weight.numel() for weight in model.model.diffusion_model.parameters())
    # full: three networks and one's gradients in 4 bytes, two optimisers in 2 at the least
    needed = weights * 20 if config.training == "full" else weights
    room = comfy.model_management.get_total_memory(comfy.model_management.get_torch_device())
    if needed > room:
        way_out = "Choose a LoRA preset." if config.training == "full" else "Load it in 8 bits."
        raise UserError(
            f"training: {config.training} of this model needs {needed / 2**30:.1f} GiB or more "
            f"for teacher, critic and student; this device has {room / 2**30:.1f}. {way_out}"
        )


def _train(run: RunFolder, wired: Wired, node_id: str) -> None:
    """Iterate what the engine yields; stopped by the user, it saves, and the node says so."""
    # training's libraries, which a pack that only samples can do without
    from ..dmd_train.distil import distil
    from ..dmd_train.prepare import carried_out, prepare
    from ..dmd_train.run.journal import LOG_EVERY

    config = run.config
    say("copying the model", node_id)
    network, conditions = engine_network(wired, config)
    pairs = None if wired.pairs is None else _wired_pairs(wired.pairs, network, wired)
    real = wired.images.for_run(config, network) if wired.images else None
    loaded = _loaded(network, wired)
    preparation = prepare(run, loaded, conditions=conditions, pairs=pairs, real=real)
    try:
        with _every_call_may_stop(network.module):
            ready = carried_out(preparation, Preparing(node_id).tell)
    except comfy.model_management.InterruptProcessingException:
        say("stopped before a step was done; finished pairs are kept. Run goes on.", node_id)
        raise
    progress = Progress("step", config.steps, node_id, ready.step)
    losses, step = "", ready.step
    try:
        with closing(distil(ready)) as reports:
            for report in reports:
                step = report.step
                if step % LOG_EVERY == 0:
                    losses = f"\n{report.losses()}"
                progress.update(step, losses)  # its pictures are in the panel
    except comfy.model_management.InterruptProcessingException:
        say(f"stopped at step {step} and saved in {run.path.name}. Run goes on.", node_id)
        raise


class Preparing:
    """A bar on the node for each part of a preparation."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self.bars: dict[str, Progress] = {}

    def tell(self, doing: "Doing") -> None:
        """Raises InterruptProcessingException where the user has pressed stop."""
        what, done, total, _ = doing
        if what not in self.bars:
            self.bars[what] = Progress(what, total, self.node_id)
        self.bars[what].update(done)


@contextmanager
def _every_call_may_stop(module: nn.Module) -> Iterator[None]:
    """Before the first step a stop loses nothing, so that it need not wait for a whole picture."""
    is_before = [True]

    def look(*_: object) -> None:
        if is_before:  # copies of the module take this along
            comfy.model_management.throw_exception_if_processing_interrupted()

    hook = module.register_forward_pre_hook(look)
    try:
        yield
    finally:
        is_before.clear()
        hook.remove()


def _loaded(network: Network, wired: Wired) -> Loaded:
    """Who the teacher is, for the recipe. A student's own recipe is refused by the engine."""
    recipe = recipe_of(wired.model)
    if wired.file:
        return Loaded(network, recipe, wired.file.stem, hash_of(wired.file))
    return Loaded(network, recipe, f"{network.family}, as wired in ComfyUI", "")


def _wired_pairs(pairs: TeacherPairs, network: Network, wired: Wired) -> StoredPairs:
    """Raises UserError where they were made for something else."""
    if pairs.shape != network.shape:
        raise UserError(
            f"pairs: {pairs.folder.name} has samples of {pairs.shape}, this run {network.shape}. "
            "Make them at the same resolution."
        )
    if pairs.conditions != fingerprint(wired.rows):
        raise UserError(
            f"pairs: {pairs.folder.name} was made from other conditions. Wire the same ones into "
            "both nodes."
        )
    return StoredPairs(Shards(pairs.folder))


def _results(run: RunFolder, model: ModelPatcher, file: Path | None) -> io.NodeOutput:
    """The student on the MODEL, and what the run's folder has to show. file: which the MODEL is."""
    student = student_model(model, run.student)
    made_by = student_of(student)
    assert made_by
    if file:
        require_teacher(made_by.recipe.teacher_sha256, hash_of(file), run.config.teacher)
    rows = run.read_metrics()
    losses = [row["student/regression"] for row in rows if "student/regression" in row]
    losses = losses or [row["critic/denoising"] for row in rows if "critic/denoising" in row]
    picture = np.asarray(Image.open(max(run.samples.glob("*.png"))).convert("RGB"))
    sheet = torch.from_numpy(picture.astype(np.float32) / 255)[None]
    no_lora = ExecutionBlocker("a student of full training is no LoRA: wire DMD Save Student.")
    step = rows[-1]["step"] if rows else 0
    said = (
        f"{run.config.preset}, step {step} of {run.config.steps}: {made_by.recipe.steps}, "
        f"cfg 1. Saved in {run.path}"
    )
    return io.NodeOutput(
        student,
        dict(made_by.tensors) if made_by.is_lora else no_lora,
        {"loss": losses},
        sheet,
        str(run.path),
        ui={"text": (said,), "run": (name_of(run.path),)},
    )
