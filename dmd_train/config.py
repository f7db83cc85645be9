"""run.yaml as a validated model, and the presets that fill in what it leaves out."""

import difflib
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import UserError
from .noise import TIMESTEPS

DIGITS = "digits"
"""The name of the embedded teacher."""

PRESETS: dict[str, dict[str, Any]] = {
    "digits-one-step": {
        "cpu_threads": 1,  # these matrices are too small to share
        "steps": 1500,
        "batch_size": 32,
        "learning_rate": 4e-3,
        "warmup_steps": 50,
        "schedule": "cosine",
        "ema_decay": 0.995,
        "regression_weight": 16.0,
        "pairs": 16000,
        "pair_batch_size": 512,
        "checkpoint_every": 250,
        "sample_every": 250,
    },
}


class Config(BaseModel):
    """One run. Every number has the default of its preset; names are those of the papers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str = Field(description="'digits' (embedded) or the path of a .safetensors file")
    output: Path = Field(description="the run folder")
    preset: str = Field("digits-one-step", description="a row of the preset table")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything random in the run")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train")
    cpu_threads: int = Field(0, ge=0, description="0 leaves torch's own choice")

    steps: int = Field(ge=1, description="student updates")
    batch_size: int = Field(ge=1, description="samples of an update, of student and critic")
    learning_rate: float = Field(gt=0, description="of student and critic alike")
    warmup_steps: int = Field(ge=0, description="linear, in student updates")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="of the learning rate after the warm-up"
    )
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")
    clip_norm: float = Field(10.0, gt=0, description="largest gradient L2 norm of an update")
    ema_decay: float = Field(ge=0, lt=1, description="of the student that is saved; 0 is off")

    critic_updates: int = Field(5, ge=1, description="critic updates per student update")
    guidance: float = Field(1.0, ge=0, description="of the teacher; baked into the student")
    t_min: int = Field(20, ge=0, lt=TIMESTEPS, description="least timestep matched")
    t_max: int = Field(980, ge=0, lt=TIMESTEPS, description="greatest timestep matched")
    regression_weight: float = Field(ge=0, description="0: no regression, no pairs")
    pairs: int = Field(ge=1, description="noise-image pairs made by the teacher")
    pair_batch_size: int = Field(ge=1, description="pairs of a student update")
    pair_steps: int = Field(18, ge=1, description="Heun steps of a pair")

    checkpoint_every: int = Field(ge=1, description="student updates between checkpoints")
    sample_every: int = Field(ge=1, description="student updates between pictures")

    def device_object(self) -> torch.device:
        """The device to train on. Raises UserError if it is not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device: cuda is not available here. Use auto or cpu.")
        return torch.device(self.device)


def make_config(values: dict[str, Any], source: str) -> Config:
    """Values over preset over defaults. `source` names the file in an error."""
    for key in values:
        if key not in Config.model_fields:
            raise UserError(f"{source}: unknown key '{key}'.{_nearest(key, Config.model_fields)}")
    preset = values.get("preset", Config.model_fields["preset"].default)
    if preset not in PRESETS:
        raise UserError(
            f"{source}: preset: there is no '{preset}'.{_nearest(str(preset), PRESETS)}"
        )
    try:
        config = Config.model_validate(PRESETS[preset] | values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        given = "" if first["type"] == "missing" else f" (given: {first['input']!r})"
        raise UserError(f"{source}: {key}: {first['msg'].lower()}{given}") from None
    if config.t_min > config.t_max:
        raise UserError(f"{source}: t_min ({config.t_min}) is above t_max ({config.t_max}).")
    return config


def load_config(path: Path, overrides: list[str]) -> Config:
    """run.yaml, with `key=value` overrides on top."""
    return make_config(_read_yaml(path) | parse_overrides(overrides), str(path))


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """["steps=10"] -> {"steps": 10}; values are YAML."""
    values = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: write it as key=value, e.g. --set steps=500")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {override}: the value is not valid YAML.") from None
    return values


def dump_config(config: Config) -> str:
    """The run.yaml that gives this very config again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Write one, e.g. 'teacher: digits'.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}).") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UserError(f"{path}: not valid YAML{line}. Write one 'key: value' a line.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no settings. Write one 'key: value' a line.")
    return {str(key): value for key, value in values.items()}


def _nearest(name: str, known: Any) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else f" Known: {', '.join(known)}."
