"""run.yaml as a validated model, and the presets that fill in what it leaves out."""

import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from .errors import UserError, shown
from .files.text import read_text
from .files.yaml import MOST, WAY_OUT, read_yaml
from .method.noise import TIMESTEPS
from .method.recipe import Sampler, falls
from .presets import PRESETS

DIGITS = "digits"
"""The name of the embedded teacher."""

CANVAS = "ComfyUI MODEL"
"""How the name of a teacher begins that is no file: a MODEL as wired, LoRAs and merges applied."""

DEFAULT_PRESET = "digits-one-step"
"""The embedded teacher's preset."""


UPDATES = 10**7
"""Most student updates: five hundred times the longest run published (DMD B.3)."""

NEVER = 10**9
"""Longest interval, beyond every run."""

SAMPLES = 2**16
"""Most samples of an update: the largest published is 2,304 (DMD B.3)."""

PAIRS = 10**7
"""Most pairs: twenty times the most published (DMD B.3)."""

PIXELS = 8192
"""Longest side of a picture: 16 times that of Stable Diffusion 1.x."""

RANK = 4096
"""Highest rank: beyond nearly every layer's width."""

STEPS = 8
"""Most steps of a student: DMD's kind has four (DMD2 4.4), the largest of later work eight."""

THREADS = 1024
"""Most threads: more cores than a machine has. Each one asked for is started."""


LATER = {
    *("beta1", "input_noise", "sampler"),
    *("images", "captions", "flip_images", "adversarial_weight", "critic_adversarial_weight"),
    *("adversarial_t_min", "adversarial_t_max"),
}
"""Settings that the first runs did not have: at their defaults they do what those did."""


Words = Annotated[str, StringConstraints(max_length=4096)]
"""A path or a name: what systems take of one."""


class Config(BaseModel):
    """One run. Every number has the default of its preset; names are those of the papers.

    Bounds refuse what can only be a slip: they lie far beyond what was ever published.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    teacher: Words = Field(
        description="'digits' (embedded), a .safetensors file, or a diffusers folder"
    )
    prompts: Words | None = Field(None, description="a text file, one a line; none: the shipped")
    output: Path = Field(description="the run folder")
    preset: str = Field(DEFAULT_PRESET, description="a row of the preset table")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything random in the run")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train")
    cpu_threads: int = Field(0, ge=0, le=THREADS, description="0 leaves torch's own choice")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the networks' arithmetic; auto: bf16 on a GPU. Masters are fp32"
    )

    training: Literal["lora", "full"] = Field(
        description="lora: one frozen network with two adapters; full: three networks"
    )
    lora_rank: int = Field(64, ge=1, le=RANK, description="of both adapters")
    lora_alpha: float = Field(8.0, gt=0, le=1e5, description="over the rank: the adapters' scale")
    resolution: int = Field(
        0, ge=0, le=PIXELS, description="pixels, a multiple of 64; 0: the teacher's own"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations twice instead of keeping them"
    )
    optimizer: Literal["auto", "adamw", "adamw-8bit"] = Field(
        "adamw", description="auto: 8 bits on a GPU where bitsandbytes is there"
    )

    steps: int = Field(ge=1, le=UPDATES, description="student updates")
    batch_size: int = Field(
        ge=1, le=SAMPLES, description="samples of an update, over all processes"
    )
    micro_batch_size: int = Field(
        0,
        ge=0,
        le=SAMPLES,
        description="samples in the network at a time; 0: all. Changes memory alone",
    )
    learning_rate: float = Field(gt=0, le=1e4, description="of student and critic alike")
    warmup_steps: int = Field(ge=0, le=UPDATES, description="linear, in student updates")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="of the learning rate after the warm-up"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's momentum, of student and critic")
    weight_decay: float = Field(0.01, ge=0, le=1e3, description="of AdamW")
    clip_norm: float = Field(
        10.0, gt=0, le=1e12, description="largest gradient L2 norm of an update"
    )
    ema_decay: float = Field(ge=0, lt=1, description="of the student that is saved; 0 is off")

    critic_updates: int = Field(5, ge=1, le=1000, description="critic updates per student update")
    guidance: float = Field(1.0, ge=0, le=100, description="of the teacher; baked into the student")
    t_min: int = Field(20, ge=0, lt=TIMESTEPS, description="least timestep matched")
    t_max: int = Field(980, ge=0, lt=TIMESTEPS, description="greatest timestep matched")
    timesteps: tuple[StrictInt, ...] = Field(
        (TIMESTEPS - 1,), description="of the student's steps, noisiest first; one: a one-step one"
    )
    sampler: Sampler = Field(
        "stochastic",
        description="the student's between its steps; stochastic: fresh noise, "
        "deterministic: its own again",
    )
    input_noise: Literal["unit", "sigma"] = Field(
        "unit",
        description="of the student's one step: N(0, I) as it is, or times sigma of that timestep, "
        "as samplers without our nodes give it",
    )
    regression_weight: float = Field(
        ge=0, le=1e6, description="of the regression on pairs; 0: none"
    )
    regression_warmup_steps: int = Field(
        0, ge=0, le=UPDATES, description="first student updates, on the regression alone"
    )
    regression_loss: Literal["mse", "pseudo-huber", "lpips"] = Field(
        "mse", description="mse and pseudo-huber on samples as they are, lpips on decoded ones"
    )
    pairs: int = Field(ge=1, le=PAIRS, description="noise-image pairs made by the teacher")
    pair_batch_size: int = Field(ge=1, le=SAMPLES, description="pairs of a student update")
    pair_sampler: Literal["heun", "pndm", "ddim", "euler", "dpmpp-2m"] = Field(
        "heun", description="the teacher's, for pairs and pictures"
    )
    pair_steps: int = Field(18, ge=1, le=TIMESTEPS, description="of that sampler")
    decoder: Path | None = Field(
        None, description="a TAESD file or folder, for lpips and pictures; none: the teacher's VAE"
    )

    images: Words | None = Field(
        None,
        description="a folder of real ones, or 'digits' (scikit-learn's), for the adversarial "
        "objective; none: without it",
    )
    captions: Literal["auto", "txt", "names", "folders", "none"] = Field(
        "auto",
        description="of the images: files beside them, their names, their folders' (of classes)",
    )
    flip_images: bool = Field(False, description="learn from their mirror images, too")
    adversarial_weight: float = Field(
        3e-3, ge=0, le=1e6, description="of the adversarial objective, for the student"
    )
    critic_adversarial_weight: float = Field(
        1e-2, ge=0, le=1e6, description="of the adversarial objective, for the critic"
    )
    adversarial_t_min: int = Field(
        0, ge=0, lt=TIMESTEPS, description="least timestep at which images and samples are told"
    )
    adversarial_t_max: int = Field(
        TIMESTEPS - 1, ge=0, lt=TIMESTEPS, description="greatest of these timesteps"
    )

    checkpoint_every: int = Field(ge=1, le=NEVER, description="student updates between checkpoints")
    sample_every: int = Field(ge=1, le=NEVER, description="student updates between pictures")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        [], max_length=2, description="where to log beside metrics.jsonl"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_slip(cls, value: Any, field: ValidationInfo) -> Any:
        """Refused: true and false for 1 and 0; an empty path, which would be this very folder."""
        assert field.field_name
        wanted = cls.model_fields[field.field_name].annotation
        if isinstance(value, bool) and wanted in (int, float):
            raise ValueError("should be a number")
        if value == "" and field.field_name in ("teacher", "output", "decoder", "images"):
            raise ValueError("is empty. Name a file or a folder")
        return value

    @field_validator("timesteps")
    @classmethod
    def _a_schedule(cls, timesteps: tuple[int, ...]) -> tuple[int, ...]:
        if not 1 <= len(timesteps) <= STEPS:
            raise ValueError(f"a student has 1 to {STEPS} steps, not {len(timesteps)}")
        if not falls(timesteps):
            raise ValueError(f"write numbers of {TIMESTEPS - 1} to 0 that fall, each once")
        return timesteps

    @field_validator("prompts")
    @classmethod
    def _spelt_as_paths_are(cls, prompts: str | None) -> str | None:
        """./prompts.txt and prompts.txt are one run's."""
        return prompts and str(Path(prompts))

    @property
    def needs_pairs(self) -> bool:
        return self.regression_weight > 0 or self.regression_warmup_steps > 0

    @property
    def smaller(self) -> str:
        """The setting that makes the run smaller and costs least."""
        if self.micro_batch_size != 1:
            return "Set micro_batch_size: 1. It changes memory alone."
        if not self.gradient_checkpointing:
            return "Set gradient_checkpointing: true. It takes a third more time."
        if self.training == "full":
            return "Choose a LoRA preset (training: lora)."
        return f"Set lora_rank: {max(4, self.lora_rank // 2)}, or a smaller resolution."

    def rate(self, step: int) -> float:
        """Learning rate at student update `step` (from 0): linear warm-up, then the schedule."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.schedule == "constant":
            return self.learning_rate * warmup
        decay = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * warmup * decay

    def half(self, device: torch.device) -> bool:
        """Whether networks compute in bfloat16 on this device."""
        return self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")

    def device_object(self) -> torch.device:
        """The device to train on. Raises UserError if it is not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device: cuda is not available here. Use auto or cpu.")
        return torch.device(self.device)


def make_config(values: dict[str, Any], source: str) -> Config:
    """Values over preset over defaults; model_fields_set is the values' keys.

    Where the values are every setting but those of LATER, a version of before wrote them into a
    run's folder: what came later is then as it was without, whatever the preset has by now.
    `source` names the file in an error.
    """
    values = as_named_now(values)
    for key in values:
        if key not in Config.model_fields:
            near = _nearest(key, Config.model_fields)
            raise UserError(f"{source}: unknown key {shown(key)}.{near}")
    preset = values.get("preset", DEFAULT_PRESET)
    if not isinstance(preset, str) or preset not in PRESETS:
        near = _nearest(str(preset), PRESETS)
        raise UserError(f"{source}: preset: there is no {shown(preset)}.{near}")
    try:
        is_of_before = Config.model_fields.keys() - LATER <= values.keys()
        config = Config.model_validate(({} if is_of_before else PRESETS[preset].settings) | values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        given = "" if first["type"] == "missing" else f" (given: {shown(first['input'])})"
        said = first["msg"].removeprefix("Value error, ").lower()
        raise UserError(f"{source}: {key}: {said}{given}") from None
    for kind in ("", "adversarial_"):
        low, high = (getattr(config, f"{kind}t_{end}") for end in ("min", "max"))
        if low > high:
            raise UserError(f"{source}: {kind}t_min ({low}) is above {kind}t_max ({high}).")
    if config.resolution % 64:
        raise UserError(f"{source}: resolution: {config.resolution} is no multiple of 64.")
    return Config.model_construct(set(values), **dict(config))


def as_named_now(values: dict[str, Any]) -> dict[str, Any]:
    """Settings under today's names. Of one said twice the last counts, an override."""
    now: dict[str, Any] = {}
    for key, value in values.items():
        if key == "conditioning_timestep":  # before students had several steps
            now["timesteps"] = [value]
        else:
            now[key] = value
    return now


def load_config(path: Path, overrides: list[str]) -> Config:
    """run.yaml, with `key=value` overrides on top."""
    values = settings_in(read_text(path, MOST, WAY_OUT), str(path))
    return make_config(values | parse_overrides(overrides), str(path))


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """["steps=10"] -> {"steps": 10}; values are YAML."""
    values = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: write it as key=value, e.g. --set steps=500")
        values[key.strip()] = read_yaml(value, f"--set {override}")
    return values


def settings_in(text: str, source: str) -> dict[str, Any]:
    """Lines of a run.yaml. Raises UserError for what is none; `source` names it."""
    values = read_yaml(text, source)
    if not isinstance(values, dict):
        raise UserError(f"{source}: holds no settings. {WAY_OUT}")
    return {str(key): value for key, value in values.items()}


def dump_config(config: Config) -> str:
    """The run.yaml that gives this very config again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def as_before(config: Config) -> dict[str, Any]:
    """The settings, as JSON has them, under the names of before: what a run is known by."""
    values = config.model_dump(mode="json")
    for key in LATER:
        if values[key] == Config.model_fields[key].default:
            del values[key]
    if len(values["timesteps"]) == 1:
        (values["conditioning_timestep"],) = values.pop("timesteps")
    return values


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else f" Known: {', '.join(known)}."
