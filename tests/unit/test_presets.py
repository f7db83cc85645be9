"""Which preset is for which model, and what `presets` says of it."""

from pathlib import Path

import pytest
import torch
import yaml
from kit.command_line import Command
from kit.tiny import constant

from dmd_train.config import LATER, Config, load_config, make_config
from dmd_train.errors import UserError
from dmd_train.families import FAMILIES
from dmd_train.files.write import make_folder
from dmd_train.method.noise import VP
from dmd_train.method.recipe import Recipe
from dmd_train.networks.loaded import Loaded
from dmd_train.prepare import require_possible
from dmd_train.presets import PRESETS, presets_for
from dmd_train.run.folder import RunFolder

ANY = ["any-one-step-lora", "any-four-step-lora"]


def model_of(family: str) -> Loaded:
    network = constant(0.0)
    network.family = family
    return Loaded(network, None, "a model", "")


def of_preset(name: str) -> Config:
    return make_config({"teacher": "a model", "output": "unused", "preset": name}, "test")


@pytest.mark.parametrize("family", [*FAMILIES, "SD3", "Flux", "SDXLRefiner"])
def test_every_family_has_a_preset_that_a_run_accepts(family: str) -> None:
    for name in presets_for(family):
        require_possible(of_preset(name), model_of(family))
    assert presets_for(family)
    assert (presets_for(family) == ANY) == (family not in FAMILIES)


def test_two_presets_are_no_familys() -> None:
    named = {name for family in FAMILIES.values() for name in family.presets}
    assert PRESETS.keys() - named == set(ANY)


def test_students_of_several_steps_need_no_node_of_ours() -> None:
    """The stock KSampler draws them exactly, see Recipe.stock."""
    noise = VP.scaled_linear()
    for name in PRESETS:
        config = of_preset(name)
        if len(config.timesteps) > 1:
            sigma = float(noise.sigma(torch.tensor(config.timesteps[:1])))
            recipe = Recipe(
                family="any",
                prediction="eps",
                timesteps=config.timesteps,
                sampler=config.sampler,
                noise_scale=sigma if config.input_noise == "sigma" else 1.0,
            )
            assert recipe.stock and recipe.stock.sampler == "euler"


def test_another_familys_preset_is_refused_with_the_one_for_any() -> None:
    with pytest.raises(
        UserError, match=r"is for sdxl, .* is SD3\. Choose one of any-one-step-lora, any-four-"
    ):
        require_possible(of_preset("sdxl-one-step-lora"), model_of("SD3"))
    with pytest.raises(UserError, match=r"is sdxl\. Choose one of sdxl-one-step-lora, sdxl-"):
        require_possible(of_preset("sd2-one-step-lora"), model_of("sdxl"))


def test_the_preset_for_any_model_is_for_the_last_timestep_and_gives_a_lora() -> None:
    whole = of_preset("any-one-step-lora")
    assert (whole.training, whole.timesteps) == ("lora", (999,))
    assert (whole.pair_sampler, whole.pair_steps, whole.guidance) == ("euler", 28, 4.5)


def test_presets_prints_every_number_with_its_source(
    dmd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = dmd("presets").out.splitlines()
    for name, preset in PRESETS.items():
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{name}: "))
        assert preset.about in lines[start]
        table = lines[start + 4 : start + 4 + len(preset.choices)]
        for line, (key, choice) in zip(table, preset.choices.items(), strict=True):
            cells = [cell.strip() for cell in line.strip("│┃ ").split("│")]
            assert cells == [key, str(choice.value), choice.source]
            assert choice.source.strip() and key in Config.model_fields


BEFORE = {
    "conditioning_timestep": 999,
    "regression_weight": 0.0,
    "pairs": 1000,
}
"""What the LoRA presets said before they were measured."""


def test_a_run_begun_before_its_preset_was_measured_goes_on_as_it_was(tmp_path: Path) -> None:
    """Its run.yaml was written by a version that had fewer settings, too."""
    told = {"teacher": "a model", "output": str(tmp_path / "run"), "preset": "sd15-one-step-lora"}
    written = make_config(told | BEFORE, "then").model_dump(mode="json")
    make_folder(tmp_path / "run")
    (written["conditioning_timestep"],) = written.pop("timesteps")
    begun = {key: value for key, value in written.items() if key not in LATER}
    (tmp_path / "run/run.yaml").write_text(yaml.safe_dump(begun))
    with RunFolder(make_config(told, "the same run.yaml as then")) as run:
        assert run.config.timesteps == (999,)
        assert (run.config.pairs, run.config.regression_weight) == (1000, 0.0)
        assert (run.config.beta1, run.config.input_noise) == (0.9, "unit")
        assert "timesteps: [999]" in "".join(run.notes)
    assert load_config(tmp_path / "run/run.yaml", []) == run.config
    with pytest.raises(UserError, match=r"begun with pairs: 1000, now it is 64"):
        RunFolder(make_config(told | {"pairs": 64}, "another")).__enter__()
