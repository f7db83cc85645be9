"""What is wired into a node, and how a run.yaml says it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
from comfy.model_patcher import ModelPatcher

from ..dmd_train.config import CANVAS, DIGITS, Config
from ..dmd_train.data.conditions import name_of
from ..dmd_train.errors import UserError
from ..dmd_train.files.read import peek
from ..dmd_train.networks.load import DIGITS_TEACHER
from ..dmd_train.networks.recognise import CLASS_CONDITIONAL, recognise
from .class_label import LABEL
from .conditioning import PROMPT, Conditioning, Row, fingerprint, rows_of
from .edm_model import EDMModel
from .fingerprint import model_fingerprint
from .model_files import path_of
from .model_recipe import family_of
from .real_images import RealImages
from .teacher_pairs import TeacherPairs

PROMPTS_FILE = "prompts.txt"
"""A file in the folder of a run whose prompts came by a wire."""


@dataclass(frozen=True)
class Wired:
    """What a run is made of on the canvas. file: the checkpoint that the MODEL is, if it is one."""

    model: ModelPatcher
    conditions: Conditioning
    negative: Conditioning | None = None
    pairs: TeacherPairs | None = None
    vae: comfy.sd.VAE | None = None
    file: Path | None = None
    images: RealImages | None = None

    @cached_property
    def rows(self) -> list[Row]:
        return rows_of(self.conditions)

    @cached_property
    def conditions_name(self) -> str:
        """A fingerprint, and the pairs: other pairs, another run."""
        told = self.rows + (rows_of(self.negative) if self.negative else [])
        pairs = f", {self.pairs.count} pairs of {self.pairs.folder.name}" if self.pairs else ""
        return f"ComfyUI CONDITIONING {fingerprint(told)[:16]}{pairs}"

    @cached_property
    def model_name(self) -> str:
        return f"{CANVAS} {family_of(self.model)} {model_fingerprint(self.model)[:16]}"

    @cached_property
    def prompts(self) -> list[str] | None:
        """Their texts, None where they are not known or would not be read back as they are."""
        texts = [options.get(PROMPT) for _, options in self.rows]
        plain = all(text and text == text.strip() and "\n" not in text for text in texts)
        return texts if plain and len(set(texts)) == len(texts) else None

    @property
    def license(self) -> str:
        """The license that the model's file names."""
        return recognise(*peek(self.file), str(self.file)).license if self.file else "unknown"

    @property
    def has_all_classes(self) -> bool:
        """Whether the conditions are all classes of the model, in order."""
        if not isinstance(self.model.model, EDMModel):
            return False
        labels = [int(options[LABEL]) for _, options in self.rows if LABEL in options]
        return labels == list(range(self.model.model.classes))

    def is_headless(self, config: Config) -> bool:
        """Whether `python -m dmd_train` can be told all of it: a file, and prompts or classes."""
        if self.file is None or self.pairs is not None:
            return False
        if self.images is not None and self.images.folder is None:
            return False
        if isinstance(self.model.model, EDMModel):
            return self.has_all_classes
        empty = not self.negative or all(o.get(PROMPT) == "" for _, o in rows_of(self.negative))
        return self.prompts is not None and (empty or config.guidance == 1)

    def conditions_for(self, config: Config) -> str:
        """The name of the conditions in the engine: that of a headless run where it is one."""
        if self.is_headless(config):
            return name_of(self.prompts or [])
        return name_of([config.teacher, self.conditions_name])

    def names(self, config: Config) -> dict[str, Any]:
        """teacher, prompts, images for its run.yaml: files where a headless run can take it up."""
        return self._names(config) | self._images()

    def _images(self) -> dict[str, Any]:
        if self.images is None:
            return {}
        # no text encoder is wired for captions; a model of classes is told them by folders
        is_of_classes = isinstance(self.model.model, EDMModel)
        return {
            "images": self.images.name,
            "flip_images": self.images.flip,
            "captions": "auto" if is_of_classes else "none",
        }

    def _names(self, config: Config) -> dict[str, Any]:
        if not self.is_headless(config):
            return {"teacher": self.model_name, "prompts": self.conditions_name}
        assert self.file
        if isinstance(self.model.model, EDMModel):
            is_ours = self.file.resolve() == DIGITS_TEACHER.resolve()
            return {"teacher": DIGITS if is_ours else str(self.file), "prompts": None}
        return {"teacher": str(self.file), "prompts": str(config.output / PROMPTS_FILE)}


def wired_file(model: ModelPatcher, prompt: dict[str, Any], node_id: str) -> Path | None:
    """The checkpoint that the MODEL wired into this node is, None where it is more than a file.

    It is one where a loader of whole checkpoints comes right before, and nothing is patched.
    """
    options = model.model_options.get("transformer_options")
    if model.patches or model.object_patches or options:
        return None
    link = prompt[node_id]["inputs"].get("model")
    loader = prompt.get(link[0]) if isinstance(link, list) else None
    match loader:
        case {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": str(name)}}:
            path = folder_paths.get_full_path("checkpoints", name)
            return _whole(Path(path)) if path else None
        case {"class_type": "DMD_LoadCheckpoint", "inputs": {"file": str(name)}}:
            return _whole(path_of(name))
    return None


def _whole(path: Path) -> Path | None:
    """The path, where `python -m dmd_train` can load a teacher from it alone."""
    try:
        found = recognise(*peek(path), str(path))
    except UserError:
        return None
    is_whole = found.layout == "LDM single file" and found.text_encoder
    return path if found.layout in CLASS_CONDITIONAL or is_whole else None
