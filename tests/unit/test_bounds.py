"""Bounds of the settings: a number that can only be a slip is refused by its name."""

from typing import Any

import pytest
import torch
import yaml

from dmd_train.config import Config, make_config
from dmd_train.errors import OutOfMemory, UserError, out_of_memory
from dmd_train.presets import PRESETS

NUMBERS = [name for name, field in Config.model_fields.items() if field.annotation in (int, float)]


def told(**settings: Any) -> Config:
    return make_config({"teacher": "digits", "output": "run"} | settings, "run.yaml")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 2**63, 10**12 + 1, -1, True, 10**99])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_makes_no_sense_is_refused_by_its_name(name: str, value: float) -> None:
    if name == "seed" and value == 10**12 + 1:
        assert told(seed=value).seed == value
        return
    with pytest.raises(UserError, match=f"^run.yaml: {name}: "):
        told(**{name: value})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_within_the_bounds(name: str) -> None:
    assert told(preset=name).preset == name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"preset": ["digits-one-step"]}, "preset: there is no"),
        ({"preset": {"a": 1}}, "preset: there is no"),
        ({"preset": None}, "preset: there is no"),
        ({"output": ""}, "output: is empty"),
        ({"teacher": ""}, "teacher: is empty"),
        ({"decoder": ""}, "decoder: is empty"),
        ({"teacher": "x" * 5000}, "teacher: "),
        ({"trackers": ["wandb"] * 1000}, "trackers: "),
        ({"x" * 100_000: 1}, "unknown key"),
    ],
)
def test_a_setting_of_another_kind_is_one_short_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"^run.yaml: {words}") as caught:
        told(**settings)
    assert len(str(caught.value)) <= 1000


def test_numbers_are_read_as_people_write_them() -> None:
    settings = yaml.safe_load("learning_rate: 1e-4\nsteps: '5'\nbatch_size: 2.0\nclip_norm: 1e9")
    config = told(**settings)
    numbers = (config.learning_rate, config.steps, config.batch_size, config.clip_norm)
    assert numbers == (1e-4, 5, 2, 1e9)


def test_a_cpu_without_memory_is_out_of_memory() -> None:
    with pytest.raises(OutOfMemory, match="too large"), out_of_memory("too large"):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(OutOfMemory), out_of_memory("too large"):
        raise MemoryError
    with pytest.raises(RuntimeError, match="another"), out_of_memory("too large"):
        raise RuntimeError("another")
