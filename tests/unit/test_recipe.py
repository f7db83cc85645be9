"""What a student's file says of how to sample it."""

import json
from pathlib import Path

import pytest
import torch
from kit.tiny import config, gaussian, recipe
from pydantic import ValidationError

from dmd_train.errors import UserError
from dmd_train.files.read import read_safetensors
from dmd_train.method.noise import VP
from dmd_train.method.recipe import RECIPE_KEY, Recipe, StockSettings, read_recipe
from dmd_train.networks.edm_unet import edm_unet
from dmd_train.networks.load import load
from dmd_train.networks.loaded import Loaded, student_recipe
from dmd_train.run.student import write_student

CPU = torch.device("cpu")
FOUR = (999, 749, 499, 249)


def metadata(**changes: object) -> dict[str, str]:
    """The metadata of a good recipe with fields of its JSON changed; None takes one out."""
    whole = recipe().to_metadata("a title", (3, 8, 16))
    values = json.loads(whole[RECIPE_KEY]) | changes
    return whole | {RECIPE_KEY: json.dumps({k: v for k, v in values.items() if v is not None})}


@pytest.mark.parametrize(
    "plan",
    [recipe(), recipe(timesteps=FOUR, noise_scale=1.0, prediction="eps", baked_guidance=7.5)],
    ids=["one step", "four steps"],
)
def test_a_recipe_read_from_its_own_metadata_is_the_same_recipe(plan: Recipe) -> None:
    assert read_recipe(plan.to_metadata("a title", (3, 8, 16)), "file") == plan


def test_a_recipe_survives_the_file_itself(tmp_path: Path) -> None:
    teacher = load("digits", CPU)
    plan = student_recipe(teacher, config(guidance=2.0))
    write_student(tmp_path / "student.safetensors", teacher.network, plan)
    loaded = load(str(tmp_path / "student.safetensors"), CPU)
    assert loaded.recipe == plan
    for key, value in teacher.network.module.state_dict().items():
        assert torch.equal(loaded.network.module.state_dict()[key], value)


def test_a_student_recipe_is_conditioned_at_the_last_timestep_with_the_teachers_noise() -> None:
    teacher = load("digits", CPU)
    plan = student_recipe(teacher, config(guidance=2.0))
    assert (plan.timesteps, plan.nfe, plan.noise_scale) == ((999,), 1, 80.0)
    assert plan.baked_guidance == 2.0
    assert plan.teacher_sha256 == teacher.sha256
    assert plan.license == teacher.network.license


def test_the_metadata_has_the_keys_that_model_spec_1_0_1_requires_and_all_are_text() -> None:
    spec = metadata()
    required = ("sai_model_spec", "architecture", "implementation", "title")
    assert all(spec[f"modelspec.{key}"] for key in required)
    assert spec["modelspec.sai_model_spec"] == "1.0.1"
    assert spec["modelspec.title"] == "a title"
    assert all(isinstance(value, str) for value in spec.values())


def test_the_resolution_is_width_by_height() -> None:
    assert metadata()["modelspec.resolution"] == "16x8"


def test_the_timestep_range_ends_above_the_largest_timestep() -> None:
    spec = recipe(timesteps=FOUR).to_metadata("a title", (3, 8, 8))
    assert spec["modelspec.timestep_range"] == "249,1000"


@pytest.mark.parametrize(("ours", "theirs"), [("eps", "epsilon"), ("v", "v"), ("edm", None)])
def test_the_prediction_type_is_named_only_where_model_spec_has_a_name(
    ours: str, theirs: str | None
) -> None:
    spec = recipe(prediction=ours).to_metadata("a title", (3, 8, 8))
    assert spec.get("modelspec.prediction_type") == theirs


def test_a_file_without_a_recipe_has_none() -> None:
    assert read_recipe({}, "file") is None
    assert read_recipe({"modelspec.title": "another's"}, "file") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "heun"},
        {"timesteps": []},
        {"timesteps": ["late"]},
        {"prediction": "score"},
        {"noise_scale": 0},
        {"noise_scale": -80.0},
        {"noise_scale": None},
    ],
    ids=lambda changes: json.dumps(changes),
)
def test_a_recipe_this_version_does_not_understand_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"^some/file: its recipe is not one this version reads"):
        read_recipe(metadata(**changes), "some/file")


def test_metadata_that_is_not_json_is_refused() -> None:
    with pytest.raises(UserError, match=r"^some/file: its recipe"):
        read_recipe({RECIPE_KEY: "{"}, "some/file")


@pytest.mark.parametrize("timesteps", [[1000], [-1], [999, 1000]])
def test_timesteps_outside_0_to_999_are_refused(timesteps: list[int]) -> None:
    with pytest.raises(UserError, match=r"some/file: its recipe") as error:
        read_recipe(metadata(timesteps=timesteps), "some/file")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("timesteps", [[249, 999], [999, 999], [999, 249, 499]])
def test_timesteps_that_do_not_fall_are_refused(timesteps: list[int]) -> None:
    with pytest.raises(UserError, match=r"^some/file: its recipe's .* do not fall"):
        read_recipe(metadata(timesteps=timesteps), "some/file")
    with pytest.raises(ValidationError):
        recipe(timesteps=timesteps)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        recipe().timesteps = FOUR  # type: ignore[misc]


def test_a_student_is_whole_on_disk_and_names_its_teacher(tmp_path: Path) -> None:
    student = edm_unet(2, sample_size=8, in_channels=1, out_channels=1, **SMALL_UNET)
    write_student(tmp_path / "student.safetensors", student, recipe(teacher="the teacher"))
    tensors, written = read_safetensors(tmp_path / "student.safetensors")
    assert tensors.keys() == student.module.state_dict().keys()
    assert "the teacher" in written["modelspec.title"]
    assert "the teacher" in written["modelspec.description"]


SMALL_UNET = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def sigma(t: int) -> float:
    return float(VP.scaled_linear().sigma(torch.tensor([t])))


@pytest.mark.parametrize(
    ("timesteps", "noise_scale", "settings"),
    [
        ((499,), sigma(499), StockSettings(1, "lcm", 0.5)),
        ((333,), sigma(333), StockSettings(1, "lcm", 0.33)),
        ((249,), sigma(249), StockSettings(1, "lcm", 0.25)),
        ((499, 249), sigma(499), StockSettings(2, "lcm", 0.5)),
        ((999,), 1.0, StockSettings(1, "lcm", 1.0)),
        (FOUR, 1.0, StockSettings(4, "lcm", 1.0)),
        ((499,), 1.0, None),
        ((499,), sigma(498), None),
        ((399,), sigma(399), None),
        ((999,), sigma(999), None),
        ((999, 749, 499), 1.0, None),
    ],
)
def test_a_recipe_knows_the_stock_settings_that_draw_it(
    timesteps: tuple[int, ...], noise_scale: float, settings: StockSettings | None
) -> None:
    own = recipe(prediction="eps", timesteps=timesteps, noise_scale=noise_scale)
    assert own.stock == settings
    hint = own.to_metadata("a title", (3, 8, 16))["modelspec.usage_hint"]
    assert hint.endswith("cfg 1" if settings is None else f"; in a stock ComfyUI {settings}")


def test_a_deterministic_recipe_is_for_the_stock_euler() -> None:
    own = recipe(prediction="eps", timesteps=FOUR, noise_scale=1.0, sampler="deterministic")
    assert own.stock == StockSettings(4, "euler", 1.0)


def test_a_class_conditional_recipe_needs_a_node_and_a_flows_does_not() -> None:
    assert recipe().stock is None
    assert recipe(prediction="flow", noise_scale=1.0).stock == StockSettings(1, "lcm", 1.0)


def test_input_noise_sigma_is_that_of_the_conditioning_timestep() -> None:
    teacher = Loaded(gaussian(0, 1, noise=VP.scaled_linear()), None, "a teacher", "")
    scaled = config(conditioning_timestep=499, input_noise="sigma")
    assert student_recipe(teacher, scaled).noise_scale == sigma(499)
    assert student_recipe(teacher, config(conditioning_timestep=499)).noise_scale == 1.0
