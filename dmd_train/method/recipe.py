"""How a student must be sampled. Travels inside its file, as safetensors metadata."""

import math
import re
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from ..errors import UserError, shown
from .noise import TIMESTEPS, VP

RECIPE_KEY = "dmd.recipe"
LATER = ("sampler", "shift")
"""Fields that files of before do not have. Unsaid at their defaults, they are read by all."""

Sampler = Literal["stochastic", "deterministic"]
NOT_FALLING = "not_falling"

LICENSE = 50_000
"""Characters of a licence: the longest in use has 35,000."""

SIZES = range(8, 8193)
"""Pixels a side that a file may say it draws."""


class StockSettings(NamedTuple):
    """Of ComfyUI's own sampler, beside cfg 1 and an empty latent. denoise: of two decimals."""

    steps: int
    sampler: str
    denoise: float

    def __str__(self) -> str:
        return f"steps {self.steps}, cfg 1, {self.sampler}, simple, denoise {self.denoise:g}"


def simple(steps: int) -> tuple[int, ...]:
    """Timesteps of ComfyUI's scheduler of that name."""
    return tuple(TIMESTEPS - 1 - int(i * (TIMESTEPS / steps)) for i in range(steps))


def falls(timesteps: tuple[int, ...]) -> bool:
    """Whether they are timesteps, noisiest first and each once."""
    falling = sorted(set(timesteps), reverse=True) == list(timesteps)
    return falling and all(0 <= t < TIMESTEPS for t in timesteps)


class Recipe(BaseModel):
    """Everything a sampler needs beside the weights.

    One network evaluation per timestep, noisiest first: x0 = mu(x_t, t), then, if another
    timestep t' follows, x_t' = alpha x0 + sigma eps. eps is fresh noise if stochastic (DMD2 4.4),
    that which x_t holds by x0 if deterministic (DDIM, eta = 0). The first input is
    noise_scale * N(0, I), whatever the first timestep says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    family: str = Field(max_length=100)
    prediction: Literal["eps", "v", "flow", "edm"]
    timesteps: tuple[int, ...] = Field(min_length=1, max_length=TIMESTEPS)
    noise_scale: float = Field(gt=0, le=10_000)
    sampler: Sampler = "stochastic"
    shift: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Of a flow's timesteps: sigma = shift r / (1 + (shift - 1) r), r = (t + 1) / 1000."""
    baked_guidance: Annotated[float, Field(ge=0, le=10_000)] = 1.0
    """The teacher's guidance during training. It is in the weights: sample without guidance."""
    teacher: Annotated[str, Field(max_length=1000)] = "unknown"
    teacher_sha256: Annotated[str, Field(max_length=200)] = ""
    """SHA-256 of the teacher's file; empty where the student is somebody else's."""
    license: Annotated[str, Field(max_length=LICENSE)] = "unknown"

    @field_validator("timesteps")
    @classmethod
    def _require_falling(cls, timesteps: tuple[int, ...]) -> tuple[int, ...]:
        if not falls(timesteps):
            raise PydanticCustomError(
                NOT_FALLING,
                "timesteps {timesteps} do not fall within {last}..0",
                {"timesteps": str(timesteps[:20]), "last": TIMESTEPS - 1},
            )
        return timesteps

    @property
    def nfe(self) -> int:
        """Network function evaluations an image."""
        return len(self.timesteps)

    @property
    def stock(self) -> "StockSettings | None":
        """Those by which ComfyUI's own sampler draws it, without ours; None: it does not.

        Its scheduler "simple" with N steps takes every N-th timestep of the model's 1000, and at
        denoise n/N the last n of them. At denoise 1 it starts from N(0, I), else from sigma_t z.
        Its lcm adds fresh noise between steps, its euler is deterministic.
        """
        if self.prediction == "edm":
            return None
        n, scale = self.nfe, 1.0
        sampler = "euler" if self.sampler == "deterministic" else "lcm"
        first = torch.tensor(self.timesteps[:1])
        is_vp = self.prediction != "flow"
        for total in range(n, min(20 * n, TIMESTEPS) + 1 if is_vp else n + 1):
            if total > n:
                scale = float(VP.scaled_linear().sigma(first))
            is_same = math.isclose(self.noise_scale, scale, rel_tol=1e-5)
            denoise = math.floor(100 * n / total) / 100
            if is_same and simple(total)[-n:] == self.timesteps and int(n / denoise) == total:
                return StockSettings(n, sampler, denoise)
        return None

    @property
    def steps(self) -> str:
        """For a message: "2 steps at t = 999, 499"."""
        kind = ", deterministic" if self.sampler == "deterministic" and self.nfe > 1 else ""
        timesteps = ", ".join(map(str, self.timesteps))
        return f"{self.nfe} step{'s' * (self.nfe > 1)} at t = {timesteps}{kind}"

    def to_metadata(self, title: str, shape: tuple[int, int, int]) -> dict[str, str]:
        """The recipe, and the keys of the ModelSpec standard 1.0.1 that it answers."""
        hint = f"{self.nfe} step(s) at timesteps {list(self.timesteps)}, cfg 1"
        if self.stock:
            hint += f"; in a stock ComfyUI {self.stock}"
        spec = {
            "sai_model_spec": "1.0.1",
            "architecture": self.family,
            "implementation": "dmd-one-step",
            "title": title,
            "description": f"{self.nfe}-step student distilled from {self.teacher} with DMD",
            "license": self.license,
            "resolution": f"{shape[2]}x{shape[1]}",
            "timestep_range": f"{min(self.timesteps)},{max(self.timesteps) + 1}",
            "usage_hint": hint,
        }
        standard_name = {"eps": "epsilon", "v": "v"}.get(self.prediction)
        if standard_name:
            spec["prediction_type"] = standard_name
        fields = type(self).model_fields
        unsaid = {key for key in LATER if getattr(self, key) == fields[key].default}
        return {RECIPE_KEY: self.model_dump_json(exclude=unsaid)} | {
            f"modelspec.{key}": value for key, value in spec.items()
        }


def read_recipe(metadata: dict[str, str], file: str) -> Recipe | None:
    """The recipe in a file's metadata, None where there is none (a teacher, a foreign file)."""
    if RECIPE_KEY not in metadata:
        return None
    try:
        return Recipe.model_validate_json(metadata[RECIPE_KEY])
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        if first["type"] == NOT_FALLING:
            raise UserError(
                f"{file}: its recipe's {first['msg']}. Get the file again from its author."
            ) from None
        raise UserError(
            f"{file}: its recipe is not one this version reads ({said(error)}). "
            "Update dmd-one-step."
        ) from None


def said(error: ValidationError) -> str:
    """What is wrong with a file's metadata, in a few words: where, and why."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg'].lower()}" if where else first["msg"].lower()


def pixels_of(metadata: dict[str, str], file: str) -> int:
    """Pixels a side that a file says it draws; 0 where it says nothing. Raises UserError."""
    size = metadata.get("modelspec.resolution")
    if size is None:
        return 0
    found = re.fullmatch(r"([0-9]{1,4})(x[0-9]{1,4})?", size)
    if found is None or int(found[1]) not in SIZES:
        raise UserError(
            f"{file}: its modelspec.resolution is {shown(size)}, no size of {SIZES[0]} to "
            f"{SIZES[-1]} pixels. Get the file again from its author."
        )
    return int(found[1])
